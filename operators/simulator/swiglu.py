"""SwiGLU without quantisation: plain, and with clamps, slope and bias. Float32 inside, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.state import SimulatedChip, require, undefined

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _require_input(operator: str, x: Tensor, dim: int) -> None:
    require(x.dtype in DTYPES, operator, f"x must be float16, bfloat16 or float32, is {x.dtype}")
    require(x.numel() > 0, operator, f"x is empty: {tuple(x.shape)}")
    require(x.is_contiguous(), operator, "x must be contiguous")
    require(-x.dim() <= dim < x.dim(), operator, f"dim {dim} is outside of x {tuple(x.shape)}")
    require(x.shape[dim] % 2 == 0, operator, f"axis {dim} of x {tuple(x.shape)} must be even")


def _half(x: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= 2
    return x.new_empty(shape)


def _swiglu_meta(sim: SimulatedChip, *, input: Tensor, dim: int) -> Tensor:
    return _half(input, dim)


@kernel("npu::npu_swiglu", meta=_swiglu_meta)
def npu_swiglu(sim: SimulatedChip, *, input: Tensor, dim: int) -> Tensor:
    """silu(first half) * second half along an axis."""
    _require_input("npu_swiglu", input, dim)
    gate, up = input.float().chunk(2, dim=dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def _clipped_meta(sim: SimulatedChip, *, x: Tensor, dim: int, **_: object) -> Tensor:
    return _half(x, dim)


@kernel("npu::npu_clipped_swiglu", meta=_clipped_meta, chips=A2_A3)
def npu_clipped_swiglu(
    sim: SimulatedChip,
    *,
    x: Tensor,
    group_index: Tensor | None,
    dim: int,
    alpha: float,
    limit: float,
    bias: float,
    interleaved: bool,
) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + bias), gate clamped from above and up on both sides.

    interleaved takes gate from even and up from odd channels, counted over the axis and all behind it
    together; otherwise they are the two halves. Rows behind the sum of group_index are undefined.
    """
    name = "npu_clipped_swiglu"
    _require_input(name, x, dim)
    axis = dim % x.dim()
    rows = x.float().flatten(axis) if axis else x.float().flatten()[None]
    rows = rows.flatten(0, -2)
    gate, up = (rows[:, ::2], rows[:, 1::2]) if interleaved else rows.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    result = (gate * torch.sigmoid(alpha * gate) * (up + bias)).to(x.dtype)
    if group_index is not None:
        require(group_index.dtype is torch.int64, name, f"group_index must be int64, is {group_index.dtype}")
        require(group_index.dim() == 1, name, "group_index must have one axis")
        valid = int(group_index.sum())
        require(0 <= valid <= len(result), name, f"group_index sums to {valid}, x has {len(result)} rows")
        result[valid:] = undefined(len(result) - valid, result.shape[1], dtype=result.dtype)
    return result.view(_half(x, dim).shape)
