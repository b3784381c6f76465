"""The two ways to compute: the release's own arithmetic, and float32 without quantisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ascend_v4.errors import ConfigError
from ascend_v4.operators.contracts.quantize import ActivationFormat, IndexFormat, KvFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """What is rounded where. docs/numerics.md walks through every step."""

    name: str
    dtype: torch.dtype
    """Of the residual streams and of everything between operators."""
    activation: ActivationFormat
    """Applied in front of FP8 and FP4 weights, never in front of plain ones."""
    kv: KvFormat
    index: IndexFormat
    copies_weights: bool
    """Whether every matrix gets a float32 copy at load; otherwise only what a small budget allows."""


NATIVE = Numerics(
    name="native",
    dtype=torch.bfloat16,
    activation=ActivationFormat.FP8_GROUP,
    kv=KvFormat.FP8_GROUP,
    index=IndexFormat.FP4_GROUP,
    copies_weights=False,
)
EXACT = Numerics(
    name="exact",
    dtype=torch.float32,
    activation=ActivationFormat.NONE,
    kv=KvFormat.PLAIN,
    index=IndexFormat.PLAIN,
    copies_weights=True,
)
NUMERICS = {"auto": NATIVE, "native": NATIVE, "exact": EXACT}


def numerics_by_name(name: str) -> Numerics:
    """`auto` is the checkpoint's own: native for every release layout.

    Raises ConfigError for another name.
    """
    try:
        return NUMERICS[name]
    except KeyError:
        raise ConfigError(f"numerics {name!r} is unknown; choose one of {', '.join(NUMERICS)}.") from None
