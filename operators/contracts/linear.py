"""Linear layers over stored weights: plain, FP8 and FP4; and the grouped output projection.

Legend: T tokens, K inputs, N outputs, G groups.
Operands are exact in float32 (codes times powers of two), products accumulate in float32, and the result is
rounded once to the input's dtype. Weights are either kept as float32 copies or read from the file's bytes
while they multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
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
)

SLICE_BYTES = 64 << 20
"""Float32 weights made at a time from a file's bytes; larger ones are taken in slices of rows."""

SUM_STEPS = Tolerance(16, "float32 sums in any order, then one rounding")


def prepare_linear(weight: StoredWeight, *, copy: bool) -> StoredWeight:
    """The weight as products want it: a float32 copy, or the file's own bytes, widened at every use."""
    return StoredWeight(weight.to_float32(), None, WeightFormat.PLAIN) if copy else weight


def widened(x: Tensor) -> Tensor:
    """The tensor in float32: itself where it is, without the cost of asking torch."""
    return x if x.dtype is torch.float32 else x.float()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`: itself where it is."""
    return x if x.dtype is dtype else x.to(dtype)


def product(x_TK: Tensor, weight: StoredWeight) -> Tensor:
    """x times weight transposed, both in float32: [T, N] float32."""
    if weight.codes.dtype is torch.float32:
        return functional.linear(x_TK, weight.codes)
    parts = [functional.linear(x_TK, matrix) for matrix in _widened(weight)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def product_into(out_TN: Tensor, x_TK: Tensor, weight: StoredWeight) -> None:
    """`product`, rounded once to the dtype of a given [T, N] tensor."""
    if weight.codes.dtype is torch.float32 and out_TN.dtype is torch.float32:
        torch.mm(x_TK, weight.codes.t(), out=out_TN)
    else:
        out_TN.copy_(product(x_TK, weight))


def _widened(weight: StoredWeight) -> Iterator[Tensor]:
    """The weight in float32, a slice of rows at a time; slices start at whole scale blocks."""
    blocks = max(1, SLICE_BYTES // (4 * weight.num_inputs * WEIGHT_BLOCK))
    for low in range(0, weight.num_outputs, blocks * WEIGHT_BLOCK):
        yield weight.rows(low, low + blocks * WEIGHT_BLOCK).to_float32()


@operator(
    source="reference/model.md 2.1; kernel.py fp8_gemm, fp4_gemm",
    tolerance=SUM_STEPS,
    prepare=prepare_linear,
)
def linear(
    x_TK: Annotated[Tensor, Spec("T K", FLOATS)], weight: StoredWeight, *, activation: ActivationFormat
) -> Annotated[Tensor, Spec("T N", FLOATS)]:
    """x times weight transposed, in x's dtype.

    With FP8_GROUP the input is quantised first. Power-of-two scales make quantised operands exact in float32,
    so one float32 product of them equals the release's scaled FP8 product up to the order of its sums.
    """
    if activation is ActivationFormat.FP8_GROUP:
        x_TK = fake_quantize_fp8.reference(x_TK, group=ACTIVATION_GROUP)
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
    prepare=prepare_linear,
)
def grouped_linear(
    x_TGK: Annotated[Tensor, Spec("T G K", FLOATS)], weight: StoredWeight
) -> Annotated[Tensor, Spec("T G N", FLOATS)]:
    """Each group of heads through its own run of N rows of the weight [G * N, K]; no activation
    quantisation.
    """
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
