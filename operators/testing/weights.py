"""Weights by the name of their format, and what their layer does to its inputs.

A name is a weight's format, or a weight's and an activation's: `fp4`, `int8`, `fp4+mxfp8`.
"""

from __future__ import annotations

import torch

from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight
from ascend_v4.operators.testing.draw import Draw

OWN_ACTIVATION = {
    "fp8": ActivationFormat.FP8_GROUP,
    "fp4": ActivationFormat.FP8_GROUP,
    "mxfp8": ActivationFormat.MXFP8,
    "int8": ActivationFormat.INT8_TOKEN,
    "int4": ActivationFormat.INT8_TOKEN,
}


def weight_of(draw: Draw, format: str, num_outputs: int, num_inputs: int) -> StoredWeight:
    """A drawn weight [num_outputs, num_inputs]."""
    stored = format.split("+", maxsplit=1)[0]
    if stored == "fp8":
        return draw.fp8_weight(num_outputs, num_inputs)
    if stored == "fp4":
        return draw.fp4_weight(num_outputs, num_inputs)
    if stored == "mxfp8":
        return draw.mxfp8_weight(num_outputs, num_inputs)
    if stored in ("int8", "int4"):
        return draw.integer_weight(num_outputs, num_inputs, bits=int(stored[-1]))
    return draw.plain_weight(
        num_outputs, num_inputs, torch.float32 if stored == "float32" else torch.bfloat16
    )


def activation_of(format: str) -> ActivationFormat:
    """What the inputs of such a weight go through."""
    return OWN_ACTIVATION.get(format.rsplit("+", maxsplit=1)[-1], ActivationFormat.NONE)
