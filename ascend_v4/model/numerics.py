"""The ways to compute: the release's own arithmetic, that of each kind of pack, and float32 unquantised."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ascend_v4.checkpoint.pack import PackScheme
from ascend_v4.device.soc import Chip
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
    rounds_once: bool
    """Whether head norms and compressed entries stay in float32 until their result, as in chips' kernels."""
    hf32_mixing: bool
    """Whether the weights of hyper-connections are rounded to what the chips' HF32 products read of them."""
    sink_in_peak: bool
    """Whether attention rounds probabilities against a maximum that the sink takes part in, as chips do."""
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

    def grouped_activation_of(self, weight: WeightFormat) -> ActivationFormat:
        """The same for the grouped output projection, whose input only Ascend 950 quantises."""
        activation = self.activation_of(weight)
        return activation if activation is ActivationFormat.MXFP8 else ActivationFormat.NONE


NATIVE = Numerics(
    name="native",
    dtype=torch.bfloat16,
    activation=ActivationFormat.FP8_GROUP,
    kv=KvFormat.FP8_GROUP,
    index=IndexFormat.FP4_GROUP,
    rounds_once=False,
    hf32_mixing=False,
    sink_in_peak=False,
    copies_weights=False,
)
EXACT = Numerics(
    name="exact",
    dtype=torch.float32,
    activation=ActivationFormat.NONE,
    kv=KvFormat.PLAIN,
    index=IndexFormat.PLAIN,
    rounds_once=False,
    hf32_mixing=False,
    sink_in_peak=False,
    copies_weights=True,
)
W8A8 = Numerics(
    name="w8a8",
    dtype=torch.bfloat16,
    activation=ActivationFormat.INT8_TOKEN,
    kv=KvFormat.PLAIN,
    index=IndexFormat.INT8,
    rounds_once=True,
    hf32_mixing=True,
    sink_in_peak=True,
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
    rounds_once=True,
    hf32_mixing=True,
    sink_in_peak=True,
    copies_weights=False,
)
"""Ascend 950: MXFP8 activations, FP8 key-values as in the release, FP8 indexer."""
BF16 = Numerics(
    name="bf16",
    dtype=torch.bfloat16,
    activation=ActivationFormat.NONE,
    kv=KvFormat.PLAIN,
    index=IndexFormat.PLAIN,
    rounds_once=False,
    hf32_mixing=False,
    sink_in_peak=False,
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


ON_CHIP = {
    Chip.A2: {PackScheme.W8A8: W8A8, PackScheme.W4A8: W4A8},
    Chip.A3: {PackScheme.W8A8: W8A8, PackScheme.W4A8: W4A8},
    Chip.A950: {PackScheme.RELEASE: MX, PackScheme.MX: MX},
}
"""What each chip computes, by how the weights are stored. 950 reads the release as the mx pack it equals."""


def numerics_on_chip(name: str, chip: Chip, *, scheme: PackScheme | None) -> Numerics:
    """The chip's own arithmetic for a pack, or for the release layout (scheme None).

    Raises ConfigError for weights whose formats the chip does not compute, and for numerics other than auto.
    """
    if name != "auto":
        raise ConfigError(
            f"--numerics {name} is for the CPU; on {chip.value} the chip's own formats decide: use auto."
        )
    found = ON_CHIP[chip].get(scheme or PackScheme.RELEASE)
    if found is None:
        kinds = ", ".join(each.value for each in ON_CHIP[chip])
        stored = "the release's FP4 and FP8 weights" if scheme is None else f"a {scheme.value} pack"
        target = next(iter(ON_CHIP[chip])).value
        raise ConfigError(
            f"{chip.value} does not run {stored}; it runs {kinds}. Use ascend-v4 repack --to "
            f"{'mx' if chip is Chip.A950 else target}, or --quantize {'mx' if chip is Chip.A950 else target} "
            "with the official files."
        )
    return found


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
