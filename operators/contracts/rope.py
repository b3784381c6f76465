"""Rotary embedding on the last channels of each head, interleaved pairs, and its inverse.

Legend: T tokens, H heads, D channels of which the last R are rotated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ascend_v4.operators.contract import FLOATS, Spec, Tolerance, operator
from ascend_v4.operators.contracts.batch import Plan


@dataclass(frozen=True, slots=True)
class RopeFrequencies:
    """Angles per position of one kind of layer, [R/2] float32."""

    frequencies: Tensor


@dataclass(frozen=True, slots=True)
class RopeRows(Plan):
    """Rotations of T positions, complex64 [T, 1, R/2]. Other implementations bring a plan of their own."""

    forward: Tensor
    inverse: Tensor


def rope_frequencies(
    rope_dim: int,
    *,
    theta: float,
    factor: float = 1.0,
    original_positions: int = 0,
    beta_fast: float = 0.0,
    beta_slow: float = 0.0,
) -> RopeFrequencies:
    """theta^(-2i/R), stretched by YaRN between its two betas when `factor` is not 1.

    Float32 throughout, like the release, so that long positions see the release's angles.
    Source: reference/model.md 2.3.
    """
    channel = torch.arange(0, rope_dim, 2, dtype=torch.float32)
    plain = 1.0 / (theta ** (channel / rope_dim))
    if factor == 1.0:
        return RopeFrequencies(plain)

    def turning_channel(turns: float) -> float:
        return rope_dim * math.log(original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turning_channel(beta_fast)), 0)
    high = min(math.ceil(turning_channel(beta_slow)), rope_dim - 1)
    span = high - low if high != low else 0.001
    ramp = ((torch.arange(rope_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return RopeFrequencies(plain / factor * ramp + plain * (1 - ramp))


def plan_rope(positions_T: Tensor, frequencies: RopeFrequencies) -> RopeRows:
    """Rotations of the given positions (int64), once per step for all layers of a kind."""
    angles = torch.outer(positions_T.float(), frequencies.frequencies.to(positions_T.device))
    forward = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    return RopeRows(forward, forward.conj().resolve_conj())


@operator(
    source="reference/model.md 2.3; ascend-operators.md 5",
    tolerance=Tolerance(1, "one rounding of the output after a float32 rotation"),
    mutates=("x_THD",),
    plan=plan_rope,
)
def rotate(x_THD: Annotated[Tensor, Spec("T H D", FLOATS)], rows: Plan, *, inverse: bool = False) -> None:
    """Rotates the last R channels of x in place: pair (2i, 2i+1) by its token's angle, or back by it."""
    assert isinstance(rows, RopeRows), type(rows)
    turn = rows.inverse if inverse else rows.forward
    tail = x_THD[..., x_THD.shape[-1] - 2 * turn.shape[-1] :]
    # always a copy: complex views want even offsets, which a slice may not have
    wide = tail.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    pairs = wide.view(*tail.shape[:-1], tail.shape[-1] // 2, 2)
    tail.copy_(torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2))
