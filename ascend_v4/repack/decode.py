"""The real numbers that stored weights stand for, in plain torch and float64.

Written from the formats alone and used by verify only: it shares nothing with the operators that convert.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ascend_v4.checkpoint.index import FP4_GROUP, FP8_BLOCK
from ascend_v4.repack.recipes import WeightForm
from ascend_v4.repack.source_forms import TensorKind

E8M0_BIAS = 127
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

StoredBytes = Mapping[TensorKind, Tensor]
"""uint8 [rows, bytes] of a weight and its companions, each with the rows it has in its file."""


def decode_rows(form: WeightForm, stored: StoredBytes, *, first: int, stop: int) -> Tensor:
    """Rows first to stop of a weight, float64 [rows, inputs]. A plain weight is bf16."""
    weight = stored[TensorKind.WEIGHT]
    if form is WeightForm.PLAIN:
        return weight[first:stop].view(torch.bfloat16).double()
    if form is WeightForm.INT8_CHANNEL:
        return weight[first:stop].view(torch.int8).double() * _channel_scale(stored, first, stop)
    if form is WeightForm.INT4_CHANNEL:
        return _unpack_row_pairs(weight, first, stop).double() * _channel_scale(stored, first, stop)
    scale = stored[TensorKind.SCALE]
    if form is WeightForm.FP8_BLOCK:
        numbers = weight[first:stop].view(torch.float8_e4m3fn).double()
        blocks = torch.arange(first, stop) // FP8_BLOCK
        return numbers * _powers(scale[blocks], FP8_BLOCK)[:, : numbers.shape[1]]
    if form is WeightForm.MXFP8:
        numbers = weight[first:stop].view(torch.float8_e4m3fn).double()
    else:
        assert form is WeightForm.FP4_GROUP, f"no decoder for {form}"
        signed = torch.tensor(E2M1 + tuple(-number for number in E2M1), dtype=torch.float64)
        codes = weight[first:stop].int()
        numbers = signed[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)]
    return numbers * _powers(scale[first:stop], FP4_GROUP)


def _channel_scale(stored: StoredBytes, first: int, stop: int) -> Tensor:
    return stored[TensorKind.CHANNEL_SCALE][first:stop].view(torch.float32).double().view(-1, 1)


def _powers(scale: Tensor, inputs_each: int) -> Tensor:
    exponents = scale.int() - E8M0_BIAS
    powers = torch.ldexp(torch.ones(exponents.shape, dtype=torch.float64), exponents)
    return powers.repeat_interleave(inputs_each, dim=1)


def _unpack_row_pairs(weight: Tensor, first: int, stop: int) -> Tensor:
    """Signed 4-bit codes; byte [h, k] holds row 2h low and row 2h + 1 high."""
    pairs = weight[first // 2 : -(-stop // 2)].int()
    codes = torch.stack((pairs & 15, pairs >> 4), dim=1).flatten(0, 1)
    # 8 to 15 are the negative codes
    return ((codes ^ 8) - 8)[first % 2 : first % 2 + stop - first]
