"""The ways to compute: the release's own arithmetic, that of each kind of pack, and float32 unquantised."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ascend_v4.checkpoint.pack import PackScheme
from ascend_v4.errors import ConfigError
from ascend_v4.operators.contracts.quantize import ActivationFormat, IndexFormat, KvFormat, WeightFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class Numerics:
    """What is rounded where. docs/numerics.md walks through every step."""

    name: str
    dtype: torch.dtype
    """Of the residual streams and of everything between operators."""
    activation: ActivationFormat
    """Applied in front of quantised weights, never in front of plain ones; `activation_of` says more."""
    kv: KvFormat
    index: IndexFormat
    copies_weights: bool
    """Whether every matrix gets a float32 copy at load; otherwise only what a small budget allows."""

    def activation_of(self, weight: WeightFormat) -> ActivationFormat:
        """What the input of a weight goes through: its own format decides, as on the chips."""
        if weight is WeightFormat.PLAIN or self.activation is ActivationFormat.NONE:
            return ActivationFormat.NONE
        if weight in (WeightFormat.INT8_CHANNEL, WeightFormat.INT4_CHANNEL):
            return ActivationFormat.INT8_TOKEN
        if weight is WeightFormat.MXFP8 or self.activation is ActivationFormat.MXFP8:
            return ActivationFormat.MXFP8
        return ActivationFormat.FP8_GROUP

    @property
    def has_wide_index_keys(self) -> bool:
        """Whether indexer keys need float32 in the cache."""
        return self.index in (IndexFormat.INT8, IndexFormat.FP8)


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
W8A8 = Numerics(
    name="w8a8",
    dtype=torch.bfloat16,
    activation=ActivationFormat.INT8_TOKEN,
    kv=KvFormat.PLAIN,
    index=IndexFormat.INT8,
    copies_weights=False,
)
"""Atlas A2 and A3: INT8 products, bfloat16 key-values, INT8 indexer."""
W4A8 = replace(W8A8, name="w4a8")
MX = Numerics(
    name="mx",
    dtype=torch.bfloat16,
    activation=ActivationFormat.MXFP8,
    kv=KvFormat.FP8_GROUP,
    index=IndexFormat.FP8,
    copies_weights=False,
)
"""Ascend 950: MXFP8 activations, FP8 key-values as in the release, FP8 indexer."""
BF16 = Numerics(
    name="bf16",
    dtype=torch.bfloat16,
    activation=ActivationFormat.NONE,
    kv=KvFormat.PLAIN,
    index=IndexFormat.PLAIN,
    copies_weights=False,
)
"""No quantisation at all, rounded between operators."""
NUMERICS = {"auto": NATIVE, "native": NATIVE, "exact": EXACT}
PACKED = {
    PackScheme.W8A8: W8A8,
    PackScheme.W4A8: W4A8,
    PackScheme.MX: MX,
    PackScheme.BF16: BF16,
    PackScheme.RELEASE: NATIVE,
}


def numerics_by_name(name: str, *, scheme: PackScheme | None = None) -> Numerics:
    """`auto` is the checkpoint's own: native for every release layout, that of the target for a pack.

    Raises ConfigError for another name, and for `native` on a pack that is not in the release's formats.
    """
    if name not in NUMERICS:
        raise ConfigError(f"numerics {name!r} is unknown; choose one of {', '.join(NUMERICS)}.")
    if scheme is None or name == "exact":
        return NUMERICS[name]
    if name == "native" and PACKED[scheme] is not NATIVE:
        raise ConfigError(
            f"--numerics native is the arithmetic of the release's FP4 and FP8 weights and this pack is "
            f"{scheme.value}: use --numerics auto or exact, or run the official files."
        )
    return PACKED[scheme]
