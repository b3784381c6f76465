"""The clamped SwiGLU on a CPU: one native call for few float32 rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.activation import clamped_swiglu
from ascend_v4.operators.native import NEEDS, cpu_kernels, cpu_unusable

FEW_ELEMENTS = 1 << 12
"""Up to this many exponentials one thread is done before torch has launched its kernels."""


def swiglu_rows(gate_up_TJ: Tensor, row_weight_T: Tensor | None, *, limit: float) -> Tensor:
    """Few float32 rows natively, everything else as the reference. Only where the kernels were built."""
    rows, both = gate_up_TJ.shape
    suits = gate_up_TJ.dtype is torch.float32 and rows * both <= 2 * FEW_ELEMENTS
    if not suits or not gate_up_TJ.is_contiguous():
        return clamped_swiglu.reference(gate_up_TJ, row_weight_T, limit=limit)
    weight = None if row_weight_T is None else row_weight_T.contiguous()
    out_TI = gate_up_TJ.new_empty(rows, both // 2)
    cpu_kernels().ascend_v4_clamped_swiglu(
        *(gate_up_TJ.data_ptr(), None if weight is None else weight.data_ptr()),
        *(rows, both // 2, limit, out_TI.data_ptr()),
    )
    return out_TI


@implements(clamped_swiglu, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def clamped_swiglu_native(gate_up_TJ: Tensor, row_weight_T: Tensor | None = None, *, limit: float) -> Tensor:
    """One native call for few rows."""
    return swiglu_rows(gate_up_TJ, row_weight_T, limit=limit)
