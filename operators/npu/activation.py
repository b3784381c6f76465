"""The clamped SwiGLU of shared experts. Legend: T rows, J intermediate channels, gate first; I = J / 2."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ascend_v4.operators.contract import Needs, implements
from ascend_v4.operators.contracts.activation import clamped_swiglu
from ascend_v4.operators.npu.constants import A2_A3, ONLY_950, TORCH_NPU, TORCH_NPU_MODULE


@implements(
    clamped_swiglu,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(module=TORCH_NPU_MODULE, torch_operators=("npu::npu_clipped_swiglu",), chips=A2_A3),
    capturable=True,
)
def swiglu_clipped(gate_up_TJ: Tensor, row_weight_T: Tensor | None = None, *, limit: float) -> Tensor:
    """One kernel. Its defaults are another model's: interleaved halves, slope 1.702, bias 1."""
    if gate_up_TJ.shape[0] == 0:
        return _nothing(gate_up_TJ)
    hidden_TI: Tensor = torch.ops.npu.npu_clipped_swiglu(
        gate_up_TJ.contiguous(), dim=-1, alpha=1.0, limit=limit, bias=0.0, interleaved=False
    )
    return _weighted(hidden_TI, row_weight_T)


@implements(
    clamped_swiglu,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(module=TORCH_NPU_MODULE, torch_operators=("npu::npu_swiglu",), chips=ONLY_950),
    capturable=True,
)
def swiglu_after_clamps(gate_up_TJ: Tensor, row_weight_T: Tensor | None = None, *, limit: float) -> Tensor:
    """Clamps, then npu_swiglu: 950 has no kernel that clamps without quantising.

    A limit that the inputs' dtype does not hold would move every clamped number: then all is float32.
    """
    if gate_up_TJ.shape[0] == 0:
        return _nothing(gate_up_TJ)
    is_held = gate_up_TJ.dtype is torch.float32 or _fits_bfloat16(limit)
    gate_TI, up_TI = (gate_up_TJ if is_held else gate_up_TJ.float()).chunk(2, dim=-1)
    clamped_TJ = torch.cat((gate_TI.clamp(max=limit), up_TI.clamp(min=-limit, max=limit)), dim=-1)
    hidden_TI: Tensor = torch.ops.npu.npu_swiglu(clamped_TJ, dim=-1)
    return _weighted(hidden_TI.to(gate_up_TJ.dtype), row_weight_T)


def _fits_bfloat16(value: float) -> bool:
    """Whether bfloat16's 8 significant bits hold a number of ordinary size."""
    return math.frexp(value)[0] * 2**8 % 1 == 0


def _nothing(gate_up_TJ: Tensor) -> Tensor:
    return gate_up_TJ.new_empty(0, gate_up_TJ.shape[1] // 2)


def _weighted(hidden_TI: Tensor, row_weight_T: Tensor | None) -> Tensor:
    if row_weight_T is None:
        return hidden_TI
    return (hidden_TI.float() * row_weight_T.unsqueeze(-1)).to(hidden_TI.dtype)
