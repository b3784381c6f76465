"""Hyper-connections on a CPU: native calls for the few tokens of a decoding step, batched products for
many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.hyper_connections import (
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_pre,
    mixing_logits,
)
from ascend_v4.operators.native import MAX_STREAMS, NEEDS, cpu_kernels, cpu_unusable

FEW_TOKENS = 8
"""Up to here one thread in one native call beats torch's kernels and their launches."""


@implements(hyper_connection_pre, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def hyper_connection_pre_native(
    streams_THD: Tensor,
    fn_MF: Tensor,
    scale_3: Tensor,
    base_M: Tensor,
    *,
    sinkhorn_iterations: int,
    norm_eps: float,
    mix_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Everything between the mixing product and the collapse in one native call; with few tokens these as
    well.
    """
    tokens, streams, hidden = streams_THD.shape
    assert streams <= MAX_STREAMS, streams
    kernels = cpu_kernels()
    wide = streams_THD.float().contiguous()
    # the kernels take pointers; the copies, if any, must outlive the calls
    fn_MF, scale_3, base_M = fn_MF.contiguous(), scale_3.contiguous(), base_M.contiguous()
    few = tokens <= FEW_TOKENS
    if few:
        logits = wide.new_empty(tokens, fn_MF.shape[0])
        kernels.ascend_v4_mixing_logits(
            *(wide.data_ptr(), fn_MF.data_ptr(), tokens, fn_MF.shape[0], streams * hidden),
            *(norm_eps, logits.data_ptr()),
        )
    else:
        logits = mixing_logits(wide, fn_MF, norm_eps=norm_eps)
    pre_TH, post_TH = wide.new_empty(tokens, streams), wide.new_empty(tokens, streams)
    mix_THH = wide.new_empty(tokens, streams, streams)
    kernels.ascend_v4_mixing_weights(
        *(logits.data_ptr(), scale_3.data_ptr(), base_M.data_ptr(), tokens, streams),
        *(sinkhorn_iterations, mix_eps, pre_TH.data_ptr(), post_TH.data_ptr(), mix_THH.data_ptr()),
    )
    if not few:
        return _collapse(pre_TH, wide).to(streams_THD.dtype), post_TH, mix_THH
    x_TD = wide.new_empty(tokens, hidden)
    kernels.ascend_v4_collapse_streams(
        wide.data_ptr(), pre_TH.data_ptr(), tokens, streams, hidden, x_TD.data_ptr()
    )
    return x_TD.to(streams_THD.dtype), post_TH, mix_THH


@implements(hyper_connection_post, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def hyper_connection_post_native(
    output_TD: Tensor, streams_THD: Tensor, post_TH: Tensor, mix_THH: Tensor
) -> Tensor:
    """One native call for few tokens, the batched product for many."""
    tokens, streams, hidden = streams_THD.shape
    if tokens > FEW_TOKENS:
        return hyper_connection_post_batched(output_TD, streams_THD, post_TH, mix_THH)
    output, wide = output_TD.float().contiguous(), streams_THD.float().contiguous()
    post_TH, mix_THH = post_TH.contiguous(), mix_THH.contiguous()
    out_THD = torch.empty_like(wide)
    cpu_kernels().ascend_v4_spread_output(
        *(output.data_ptr(), wide.data_ptr(), post_TH.data_ptr(), mix_THH.data_ptr()),
        *(tokens, streams, hidden, out_THD.data_ptr()),
    )
    return out_THD.to(streams_THD.dtype)


@implements(hyper_connection_post, backend="cpu", provider="torch")
def hyper_connection_post_batched(
    output_TD: Tensor, streams_THD: Tensor, post_TH: Tensor, mix_THH: Tensor
) -> Tensor:
    """One batched product added to the outer product of post and output."""
    out_THD = post_TH.unsqueeze(2) * output_TD.unsqueeze(1)
    return out_THD.baddbmm_(mix_THH.transpose(1, 2), streams_THD.float()).to(streams_THD.dtype)


@implements(hyper_connection_head, backend="cpu", provider="torch")
def hyper_connection_head_batched(
    streams_THD: Tensor, fn_HF: Tensor, scale_1: Tensor, base_H: Tensor, *, norm_eps: float, mix_eps: float
) -> Tensor:
    """The collapse as a batched product."""
    logits = mixing_logits(streams_THD, fn_HF, norm_eps=norm_eps)
    pre_TH = torch.sigmoid(logits * scale_1 + base_H) + mix_eps
    return _collapse(pre_TH, streams_THD.float()).to(streams_THD.dtype)


def _collapse(pre_TH: Tensor, wide_THD: Tensor) -> Tensor:
    return torch.bmm(pre_TH.unsqueeze(1), wide_THD).squeeze(1)
