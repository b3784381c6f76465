"""RMS norms of float32 rows on a CPU: one native call where the rows are few."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.norm import head_rms_norm, rms_norm
from ascend_v4.operators.native import NEEDS, cpu_kernels, cpu_unusable

FEW_ELEMENTS = 1 << 20
"""Up to here one thread with one pass beats torch's passes on all threads."""


def _native(x: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
    out = torch.empty_like(x)
    width = x.shape[-1]
    weight = 0 if weight_D is None else weight_D.data_ptr()
    cpu_kernels().ascend_v4_rms_norm(
        x.data_ptr(), weight, out.data_ptr(), x.numel() // max(width, 1), width, eps
    )
    return out


def _suits(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.numel() <= FEW_ELEMENTS and x.is_contiguous()


@implements(rms_norm, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def rms_norm_native(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """Few float32 rows natively, everything else as the reference."""
    if _suits(x_TD) and weight_D.dtype is torch.float32 and weight_D.is_contiguous():
        return _native(x_TD, weight_D, eps)
    return rms_norm.reference(x_TD, weight_D, eps=eps)


@implements(head_rms_norm, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def head_rms_norm_native(q_THD: Tensor, *, eps: float, rounded_once: bool) -> Tensor:
    """Few float32 heads natively; bfloat16, which rounds at every step, as the reference."""
    if _suits(q_THD):
        return _native(q_THD, None, eps)
    return head_rms_norm.reference(q_THD, eps=eps, rounded_once=rounded_once)
