"""Linear layers over stored weights: plain, FP8, FP4, INT8 and INT4; and the grouped output projection.

Legend: T tokens, K inputs, N outputs, G groups.
Operands are exact in float32 (codes times powers of two), products accumulate in float32, and the result is
rounded once to the input's dtype. INT8 products sum whole numbers without any rounding and are scaled
afterwards. Weights are either kept as float32 copies or read from the file's bytes while they multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contract import FLOAT32, FLOATS, Spec, Tolerance, operator
from ascend_v4.operators.contracts.quantize import (
    ACTIVATION_GROUP,
    WEIGHT_BLOCK,
    ActivationFormat,
    StoredWeight,
    WeightFormat,
    fake_quantize_fp8,
    fake_quantize_mxfp8,
    quantize_int8_token,
)

SLICE_BYTES = 64 << 20
"""Float32 weights made at a time from a file's bytes; larger ones are taken in slices of rows."""

EXACT_INPUTS = 1024
"""Inputs whose products of whole numbers float32 sums without rounding: 1024 * 127 * 128 is below 2^24."""

SUM_STEPS = Tolerance(16, "float32 sums in any order, then one rounding")


def prepare_linear(weight: StoredWeight, *, copy: bool) -> StoredWeight:
    """The weight as products want it: a float32 copy, or the file's own bytes, widened at every use.

    The copy of an integer weight holds its codes; its scales stay apart.
    """
    if not copy:
        return weight
    if weight.is_integer:
        return StoredWeight(weight.whole_numbers(), weight.scale, WeightFormat.INT8_CHANNEL)
    return StoredWeight(weight.to_float32(), None, WeightFormat.PLAIN)


def prepare_grouped(weight: StoredWeight, *, copy: bool) -> StoredWeight:
    """As prepare_linear, but a copy is always of the real numbers: nothing is quantised in front of it."""
    return StoredWeight(weight.to_float32(), None, WeightFormat.PLAIN) if copy else weight


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Rows quantised per token: values as they were, codes as whole numbers in float32, a scale per row."""

    values_TK: Tensor
    codes_TK: Tensor
    scale_T: Tensor

    def at(self, indices: Tensor) -> Int8Rows:
        """The rows of some indices."""
        return Int8Rows(
            self.values_TK.index_select(0, indices),
            self.codes_TK.index_select(0, indices),
            self.scale_T.index_select(0, indices),
        )

    def between(self, low: int, high: int) -> Int8Rows:
        """Rows low to high."""
        return Int8Rows(self.values_TK[low:high], self.codes_TK[low:high], self.scale_T[low:high])


def int8_rows(x_TK: Tensor) -> Int8Rows:
    """Rows as a product with integer weights takes them."""
    codes_TK, scale_T = quantize_int8_token.reference(x_TK)
    return Int8Rows(x_TK, codes_TK.float(), scale_T)


def int8_product(rows: Int8Rows, weight: StoredWeight) -> Tensor:
    """Rows times an integer weight transposed, [T, N] float32: the whole sum, times both scales."""
    assert weight.scale is not None, weight.format
    sums = [whole_product(rows.codes_TK, codes_NK) for codes_NK in _whole_numbers(weight)]
    sums_TN = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)
    return sums_TN * weight.scale * rows.scale_T.unsqueeze(-1)


def whole_product(codes_TK: Tensor, codes_NK: Tensor) -> Tensor:
    """The product of whole numbers within +-128 and +-127, summed exactly, then rounded to float32."""
    inputs = codes_TK.shape[1]
    if inputs <= EXACT_INPUTS:
        return functional.linear(codes_TK, codes_NK)
    sums_TN = codes_TK.new_zeros(codes_TK.shape[0], codes_NK.shape[0], dtype=torch.float64)
    for low in range(0, inputs, EXACT_INPUTS):
        high = low + EXACT_INPUTS
        sums_TN += functional.linear(codes_TK[:, low:high], codes_NK[:, low:high])
    return sums_TN.float()


def quantized(x_TK: Tensor, activation: ActivationFormat) -> Tensor:
    """Inputs as the products of a layer see them; for INT8 that is `int8_rows`."""
    if activation is ActivationFormat.FP8_GROUP:
        return fake_quantize_fp8.reference(x_TK, group=ACTIVATION_GROUP)
    if activation is ActivationFormat.MXFP8:
        return fake_quantize_mxfp8.reference(x_TK)
    assert activation is ActivationFormat.NONE, activation
    return x_TK


def widened(x: Tensor) -> Tensor:
    """The tensor in float32: itself where it is, without the cost of asking torch."""
    return x if x.dtype is torch.float32 else x.float()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`: itself where it is."""
    return x if x.dtype is dtype else x.to(dtype)


def product(x_TK: Tensor, weight: StoredWeight) -> Tensor:
    """x times weight transposed, both in float32: [T, N] float32."""
    if weight.codes.dtype is torch.float32:
        out_TN = functional.linear(x_TK, weight.codes)
        return out_TN if weight.scale is None else out_TN.mul_(weight.scale)
    parts = [functional.linear(x_TK, matrix) for matrix in _widened(weight)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def product_into(out_TN: Tensor, x_TK: Tensor, weight: StoredWeight) -> None:
    """`product`, rounded once to the dtype of a given [T, N] tensor."""
    is_copy = weight.codes.dtype is torch.float32 and weight.scale is None
    if is_copy and out_TN.dtype is torch.float32:
        torch.mm(x_TK, weight.codes.t(), out=out_TN)
    else:
        out_TN.copy_(product(x_TK, weight))


def _widened(weight: StoredWeight) -> Iterator[Tensor]:
    """The weight in float32, a slice of rows at a time."""
    for part in _slices(weight):
        yield part.to_float32()


def _whole_numbers(weight: StoredWeight) -> Iterator[Tensor]:
    """The codes of an integer weight in float32, a slice of rows at a time."""
    if weight.codes.dtype is torch.float32:
        yield weight.codes
        return
    for part in _slices(weight):
        yield part.whole_numbers()


def _slices(weight: StoredWeight) -> Iterator[StoredWeight]:
    """Runs of rows that start at whole scale blocks."""
    blocks = max(1, SLICE_BYTES // (4 * weight.num_inputs * WEIGHT_BLOCK))
    for low in range(0, weight.num_outputs, blocks * WEIGHT_BLOCK):
        yield weight.rows(low, low + blocks * WEIGHT_BLOCK)


@operator(
    source="reference/model.md 2.1; kernel.py fp8_gemm, fp4_gemm",
    tolerance=SUM_STEPS,
    prepare=prepare_linear,
)
def linear(
    x_TK: Annotated[Tensor, Spec("T K", FLOATS)], weight: StoredWeight, *, activation: ActivationFormat
) -> Annotated[Tensor, Spec("T N", FLOATS)]:
    """x times weight transposed, in x's dtype.

    With FP8_GROUP and MXFP8 the input is quantised first. Power-of-two scales make quantised operands exact
    in float32, so one float32 product of them equals the scaled FP8 product up to the order of its sums. With
    INT8_TOKEN, which is for integer weights, the sum of products of codes is exact; it is rounded to float32,
    times the output's scale, times the token's.
    """
    if activation is ActivationFormat.INT8_TOKEN:
        return rounded(int8_product(int8_rows(x_TK), weight), x_TK.dtype)
    x_TK = quantized(x_TK, activation)
    return rounded(product(widened(x_TK), weight), x_TK.dtype)


@operator(
    source="reference/model.md 2.2 (head), 2.7 (gate), 2.5 (compressor)",
    tolerance=SUM_STEPS,
    prepare=prepare_linear,
)
def float32_linear(
    x_TK: Annotated[Tensor, Spec("T K", FLOATS)], weight: StoredWeight
) -> Annotated[Tensor, Spec("T N", FLOAT32)]:
    """The product in float32 whatever the input's dtype: head, router and compressor."""
    return product(widened(x_TK), weight)


@operator(
    source="reference/model.md 2.4 step 5; convert.py dequantises this weight to bfloat16",
    tolerance=SUM_STEPS,
    prepare=prepare_grouped,
)
def grouped_linear(
    x_TGK: Annotated[Tensor, Spec("T G K", FLOATS)], weight: StoredWeight, *, activation: ActivationFormat
) -> Annotated[Tensor, Spec("T G N", FLOATS)]:
    """Each group of heads through its own run of N rows of the weight [G * N, K].

    activation is NONE as in the release, or MXFP8 as on Ascend 950, whose grouped product takes quantised
    inputs.
    """
    if activation is not ActivationFormat.NONE:
        x_TGK = quantized(x_TGK.flatten(0, 1), activation).view_as(x_TGK)
    groups = x_TGK.shape[1]
    per_group = weight.num_outputs // groups
    if weight.codes.dtype is torch.float32 or per_group % WEIGHT_BLOCK:
        matrix_GNK = weight.to_float32().view(groups, per_group, x_TGK.shape[2])
        out_GTN = torch.bmm(widened(x_TGK).transpose(0, 1), matrix_GNK.transpose(1, 2))
        return rounded(out_GTN.transpose(0, 1), x_TGK.dtype)
    parts = [
        product(widened(x_TGK[:, group]), weight.rows(group * per_group, (group + 1) * per_group))
        for group in range(groups)
    ]
    return rounded(torch.stack(parts, dim=1), x_TGK.dtype)
