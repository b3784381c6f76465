"""Linear layers on a CPU: one native call for a single row and a small matrix, torch for everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.linear import float32_linear, linear, product
from ascend_v4.operators.contracts.quantize import (
    ACTIVATION_GROUP,
    ActivationFormat,
    StoredWeight,
    fake_quantize_fp8,
)
from ascend_v4.operators.native import NEEDS, cpu_kernels, cpu_unusable

SMALL_ELEMENTS = 1 << 19
"""Up to this many matrix elements one thread is done sooner than torch's threads have met."""


def row_product(x_TK: Tensor, weight: StoredWeight) -> Tensor:
    """`product`, natively for one row of a small float32 matrix."""
    matrix = weight.codes
    suits = len(x_TK) == 1 and matrix.dtype is torch.float32 and matrix.numel() <= SMALL_ELEMENTS
    if not suits or not (matrix.is_contiguous() and x_TK.is_contiguous()):
        return product(x_TK, weight)
    outputs, inputs = matrix.shape
    out_TN = x_TK.new_empty(1, outputs)
    cpu_kernels().ascend_v4_matvec(x_TK.data_ptr(), matrix.data_ptr(), outputs, inputs, out_TN.data_ptr())
    return out_TN


def widened(x: Tensor) -> Tensor:
    """The tensor in float32; itself where it is, without the cost of asking torch."""
    return x if x.dtype is torch.float32 else x.float()


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`; itself where it is."""
    return x if x.dtype is dtype else x.to(dtype)


@implements(linear, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def linear_native(x_TK: Tensor, weight: StoredWeight, *, activation: ActivationFormat) -> Tensor:
    """As the reference, with single rows through the native kernel."""
    if activation is ActivationFormat.FP8_GROUP:
        x_TK = fake_quantize_fp8.reference(x_TK, group=ACTIVATION_GROUP)
    return rounded(row_product(widened(x_TK), weight), x_TK.dtype)


@implements(float32_linear, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def float32_linear_native(x_TK: Tensor, weight: StoredWeight) -> Tensor:
    """As the reference, with single rows through the native kernel."""
    return row_product(widened(x_TK), weight)
