"""RMS norms by npu_rms_norm. Legend: T tokens, D channels, H heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import Needs, implements
from ascend_v4.operators.contracts.norm import head_rms_norm, rms_norm
from ascend_v4.operators.npu.constants import TORCH_NPU, TORCH_NPU_MODULE

RMS_NORM = Needs(module=TORCH_NPU_MODULE, torch_operators=("npu::npu_rms_norm",))


def prepare_norm(weight_D: Tensor, *, copy: bool) -> Tensor:
    """The weight as the file has it where that is bfloat16, else float32: both go with bfloat16 inputs."""
    return weight_D if weight_D.dtype is torch.bfloat16 else weight_D.float()


@implements(
    rms_norm, backend="npu", provider=TORCH_NPU, needs=RMS_NORM, prepare=prepare_norm, capturable=True
)
def weighted_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """Statistics and weight in float32, one rounding."""
    if x_TD.shape[0] == 0:
        return torch.empty_like(x_TD)
    # the kernel has no float32 input with a bfloat16 weight
    gamma_D = weight_D if x_TD.dtype is torch.bfloat16 else weight_D.float()
    normed_TD: Tensor = torch.ops.npu.npu_rms_norm(x_TD, gamma_D, epsilon=eps)[0]
    return normed_TD


@implements(head_rms_norm, backend="npu", provider=TORCH_NPU, needs=RMS_NORM, capturable=True)
def unweighted_norm(q_THD: Tensor, *, eps: float, rounded_once: bool) -> Tensor:
    """The kernel has no form without a weight: it gets ones. It rounds once, never at each step."""
    assert rounded_once, "npu_rms_norm rounds once"
    if q_THD.shape[0] == 0:
        return torch.empty_like(q_THD)
    ones_D = torch.ones(q_THD.shape[-1], dtype=q_THD.dtype, device=q_THD.device)
    normed_THD: Tensor = torch.ops.npu.npu_rms_norm(q_THD, ones_D, epsilon=eps)[0]
    return normed_THD
