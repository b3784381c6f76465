"""Hyper-connections by the vendors' fused kernels, or by plain torch on the device.

Legend: T tokens, H streams, D hidden, M = (2 + H) * H mixing weights, F = H * D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import Limit, Needs, Tolerance, implements
from ascend_v4.operators.contracts.hyper_connections import (
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_pre,
)
from ascend_v4.operators.npu.constants import ATEN, CANN_RECIPES, RECIPES_MODULE, VLLM_ASCEND, VLLM_MODULE

FOUR_STREAMS = Limit(size="streams", choices=(4,), source="hc_pre and hc_post: hc_mult is 4")
PRE_LIMITS = (
    Limit(size="hidden", choices=(4096, 7168), source="hc_pre tiling: d is 4096 or 7168"),
    FOUR_STREAMS,
)
RECIPES_POST_LIMITS = (
    FOUR_STREAMS,
    Limit(size="hidden", choices=(4096, 7168), source="cann-recipes npu_hc_post: d is 4096 or 7168"),
)
RECIPES_PRE_LIMITS = (
    *PRE_LIMITS,
    Limit(size="sinkhorn", choices=(20,), source="cann-recipes npu_hc_pre: hc_sinkhorn_iters is 20"),
)
HF32_STEPS = Tolerance(2.0**16, "both operands of the mixing product cut to 10 mantissa bits (HF32)")
HF32_BECAUSE = (
    "the fused kernel multiplies in HF32, which moves mixing logits of a standard deviation of 2.4 by up to "
    "3.5e-3, and the mixing weights, whose largest is about 1, by as much at most"
)


@implements(
    hyper_connection_pre,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(module=VLLM_MODULE, torch_operators=("_C_ascend::npu_hc_pre_v2",)),
    limits=PRE_LIMITS,
    tolerance=HF32_STEPS,
    because=HF32_BECAUSE,
    capturable=True,
)
def pre_by_vllm(
    streams_THD: Tensor,
    fn_MF: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    *,
    sinkhorn_iterations: int,
    norm_eps: float,
    mix_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One kernel. The binding takes norm_eps before hc_eps; the aclnn function behind it the other way."""
    if streams_THD.shape[0] == 0:
        return _no_mixing(streams_THD)
    x_TD, post_TH, mix_THH = torch.ops._C_ascend.npu_hc_pre_v2(
        streams_THD.contiguous(),
        fn_MF,
        scale_3,
        base_M,
        hc_mult=streams_THD.shape[1],
        hc_sinkhorn_iters=sinkhorn_iterations,
        norm_eps=norm_eps,
        hc_eps=mix_eps,
    )
    return x_TD, post_TH, mix_THH


@implements(
    hyper_connection_pre,
    backend="npu",
    provider=CANN_RECIPES,
    needs=Needs(module=RECIPES_MODULE, torch_operators=("custom::npu_hc_pre",)),
    limits=RECIPES_PRE_LIMITS,
    tolerance=HF32_STEPS,
    because=HF32_BECAUSE,
    capturable=True,
)
def pre_by_recipes(
    streams_THD: Tensor,
    fn_MF: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    *,
    sinkhorn_iterations: int,
    norm_eps: float,
    mix_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One kernel up to 128 tokens in sixteens, two in a row inside it for others."""
    if streams_THD.shape[0] == 0:
        return _no_mixing(streams_THD)
    x_TD, post_TH, mix_THH = torch.ops.custom.npu_hc_pre(
        streams_THD.contiguous(),
        fn_MF,
        scale_3,
        base_M,
        hc_mult=streams_THD.shape[1],
        hc_sinkhorn_iters=sinkhorn_iterations,
        norm_eps=norm_eps,
        hc_eps=mix_eps,
    )
    # sglang found builds that return another dtype than the streams'
    return x_TD.to(streams_THD.dtype), post_TH, mix_THH


@implements(hyper_connection_pre, backend="npu", provider=ATEN, capturable=True)
def pre_plain(
    streams_THD: Tensor,
    fn_MF: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    *,
    sinkhorn_iterations: int,
    norm_eps: float,
    mix_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A float32 product and some 40 small operators for the Sinkhorn passes."""
    return hyper_connection_pre.reference(
        streams_THD,
        fn_MF,
        scale_3,
        base_M,
        sinkhorn_iterations=sinkhorn_iterations,
        norm_eps=norm_eps,
        mix_eps=mix_eps,
    )


def _no_mixing(streams_THD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What no tokens give: the kernels refuse them."""
    _, streams, hidden = streams_THD.shape
    return (
        streams_THD.new_empty(0, hidden),
        streams_THD.new_empty(0, streams, dtype=torch.float32),
        streams_THD.new_empty(0, streams, streams, dtype=torch.float32),
    )


@implements(
    hyper_connection_post,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(module=VLLM_MODULE, torch_operators=("_C_ascend::npu_hc_post",)),
    limits=(FOUR_STREAMS,),
    capturable=True,
)
def post_by_vllm(output_TD: Tensor, streams_THD: Tensor, post_TH: Tensor, mix_THH: Tensor) -> Tensor:
    """One kernel."""
    return _post(torch.ops._C_ascend.npu_hc_post, output_TD, streams_THD, post_TH, mix_THH)


@implements(
    hyper_connection_post,
    backend="npu",
    provider=CANN_RECIPES,
    needs=Needs(module=RECIPES_MODULE, torch_operators=("custom::npu_hc_post",)),
    limits=RECIPES_POST_LIMITS,
    capturable=True,
)
def post_by_recipes(output_TD: Tensor, streams_THD: Tensor, post_TH: Tensor, mix_THH: Tensor) -> Tensor:
    """One kernel."""
    return _post(torch.ops.custom.npu_hc_post, output_TD, streams_THD, post_TH, mix_THH)


@implements(hyper_connection_post, backend="npu", provider=ATEN, capturable=True)
def post_plain(output_TD: Tensor, streams_THD: Tensor, post_TH: Tensor, mix_THH: Tensor) -> Tensor:
    """A batched product over streams."""
    return hyper_connection_post.reference(output_TD, streams_THD, post_TH, mix_THH)


def _post(
    kernel: torch._ops.OpOverloadPacket,
    output_TD: Tensor,
    streams_THD: Tensor,
    post_TH: Tensor,
    mix_THH: Tensor,
) -> Tensor:
    """All builds take a batch axis in front; some take nothing else."""
    if streams_THD.shape[0] == 0:
        return torch.empty_like(streams_THD)
    mixed: Tensor = kernel(
        output_TD.contiguous().unsqueeze(0),
        streams_THD.contiguous().unsqueeze(0),
        post_TH.contiguous().unsqueeze(0),
        mix_THH.contiguous().unsqueeze(0),
    )
    return mixed.squeeze(0)


@implements(hyper_connection_head, backend="npu", provider=ATEN, capturable=True)
def head_plain(
    streams_THD: Tensor,
    fn_HF: Tensor,
    scale_1: Tensor,
    base_H: Tensor,
    *,
    norm_eps: float,
    mix_eps: float,
) -> Tensor:
    """No vendor has an operator for it."""
    return hyper_connection_head.reference(
        streams_THD, fn_HF, scale_1, base_H, norm_eps=norm_eps, mix_eps=mix_eps
    )
