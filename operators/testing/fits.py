"""Which cases an implementation is not asked, and why: inputs that its target never gives it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.operators.contract import Implementation
from ascend_v4.operators.contracts.quantize import (
    KV_GROUP,
    ActivationFormat,
    IndexFormat,
    KvFormat,
    StoredWeight,
    WeightFormat,
)
from ascend_v4.operators.testing.recipe import Inputs, KvCache
from ascend_v4.operators.testing.stored import kv_format_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ChipFormats:
    """What a chip's numerics are made of; see `ascend_v4.model.numerics`."""

    products: frozenset[tuple[WeightFormat, ActivationFormat]]
    kv: KvFormat
    index: IndexFormat


PLAIN_PRODUCT = (WeightFormat.PLAIN, ActivationFormat.NONE)
INTEGER = ChipFormats(
    products=frozenset(
        {
            PLAIN_PRODUCT,
            (WeightFormat.INT8_CHANNEL, ActivationFormat.INT8_TOKEN),
            (WeightFormat.INT4_CHANNEL, ActivationFormat.INT8_TOKEN),
        }
    ),
    kv=KvFormat.PLAIN,
    index=IndexFormat.INT8,
)
MICROSCALED = ChipFormats(
    products=frozenset(
        {
            PLAIN_PRODUCT,
            (WeightFormat.FP8_BLOCK, ActivationFormat.MXFP8),
            (WeightFormat.FP4_GROUP, ActivationFormat.MXFP8),
            (WeightFormat.MXFP8, ActivationFormat.MXFP8),
        }
    ),
    kv=KvFormat.FP8_GROUP,
    index=IndexFormat.FP8,
)
ON_CHIP: Mapping[Chip, ChipFormats] = {Chip.A2: INTEGER, Chip.A3: INTEGER, Chip.A950: MICROSCALED}


def reason_left_out(
    inputs: Inputs, implementation: Implementation[..., Any] | None, target: Target
) -> str | None:
    """Why an implementation is not asked these inputs, or None: its limits, or formats of other chips."""
    if implementation is not None:
        refusal = implementation.refusal(target, inputs.sizes)
        if refusal is not None:
            return refusal
    if target.chip is None:
        return None
    formats = ON_CHIP[target.chip]
    return (
        inputs.not_on_chips
        or _other_format(inputs.arguments, formats, target.chip)
        or _other_product(inputs.arguments, formats, target.chip)
        or _release_rounding(inputs.arguments, target.chip)
        or _narrow_rows(inputs, target)
    )


def _other_format(arguments: Mapping[str, Any], formats: ChipFormats, chip: Chip) -> str | None:
    format = arguments.get("format")
    wanted: Enum = formats.kv if isinstance(format, KvFormat) else formats.index
    if format is None or format is wanted:
        return None
    return f"{chip.value} stores {wanted.name}, not {format.name}"


def _other_product(arguments: Mapping[str, Any], formats: ChipFormats, chip: Chip) -> str | None:
    activation = arguments.get("activation")
    if activation is None:
        return None
    for weight in _weights(arguments):
        if (weight.format, activation) not in formats.products:
            return f"{chip.value} does not multiply {weight.format.name} by {activation.name}"
    return None


def _release_rounding(arguments: Mapping[str, Any], chip: Chip) -> str | None:
    if not arguments.get("rounded_once", True):
        return f"{chip.value} rounds norms once, not at each step"
    if not arguments.get("sink_in_peak", True):
        return f"{chip.value} rounds probabilities against a peak that the sink takes part in"
    return None


def _weights(value: object) -> Iterator[StoredWeight]:
    if isinstance(value, StoredWeight):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _weights(part)
    elif isinstance(value, tuple):
        for part in value:
            yield from _weights(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _weights(getattr(value, field.name))


def _narrow_rows(inputs: Inputs, target: Target) -> str | None:
    """FP8 rows hold whole groups of channels, and pages that exist only where written are not packed."""
    for cache in inputs.caches.values():
        if not isinstance(cache, KvCache) or (cache.format or kv_format_of(target)) is KvFormat.PLAIN:
            continue
        if cache.nope_dim % KV_GROUP:
            return f"{cache.nope_dim} channels are not whole groups of {KV_GROUP}"
        if inputs.far:
            return "a cache of this size is not packed for a test"
    return None
