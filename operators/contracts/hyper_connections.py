"""Manifold-constrained hyper-connections: mixing the residual streams around a sublayer, and collapsing them.

Legend: T tokens, H streams, D hidden, M = (2 + H) * H mixing weights. Mixing arithmetic is float32.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contract import FLOAT32, FLOATS, Spec, Tolerance, operator

MIX_STEPS = Tolerance(64, "float32 mixing weights through 20 Sinkhorn passes, then one rounding")


def round_to_hf32(values: Tensor) -> Tensor:
    """Float32 numbers rounded to nearest, ties to even, to the 10 mantissa bits that HF32 products read.

    Those products cut what they are given toward zero, which would shrink every mixing weight; numbers
    rounded ahead lose nothing more. Finite numbers below 2^127 only.
    """
    bits = values.contiguous().view(torch.int32)
    odd = (bits >> 13) & 1
    return ((bits + 0xFFF + odd) & ~0x1FFF).view(torch.float32)


def mixing_logits(streams_THD: Tensor, fn_MF: Tensor, *, norm_eps: float) -> Tensor:
    """The flattened streams through fn, divided by their RMS, [T, M] float32."""
    flat = streams_THD.flatten(1).float()
    norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    inverse_rms = torch.rsqrt(norm.square() / flat.shape[-1] + norm_eps)
    return functional.linear(flat, fn_MF) * inverse_rms


def sinkhorn(logits_THH: Tensor, *, iterations: int, eps: float) -> Tensor:
    """Nearly doubly stochastic mixing: a row softmax plus eps, then column and row passes, columns last.

    iterations counts the column passes, the first one included.
    """
    mix = torch.softmax(logits_THH, dim=-1) + eps
    mix = mix / (mix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        mix = mix / (mix.sum(-1, keepdim=True) + eps)
        mix = mix / (mix.sum(-2, keepdim=True) + eps)
    return mix


@operator(source="reference/model.md 2.2; ascend-operators.md 2", tolerance=MIX_STEPS)
def hyper_connection_pre(
    streams_THD: Annotated[Tensor, Spec("T H D", FLOATS)],
    fn_MF: Annotated[Tensor, Spec("M F", FLOAT32)],
    scale_3: Annotated[Tensor, Spec("3", FLOAT32)],
    base_M: Annotated[Tensor, Spec("M", FLOAT32)],
    *,
    sinkhorn_iterations: int,
    norm_eps: float,
    mix_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sublayer's input [T, D] in the streams' dtype, and post [T, H] and residual mixing [T, H, H] in
    float32.
    """
    tokens, streams, _ = streams_THD.shape
    logits = mixing_logits(streams_THD, fn_MF, norm_eps=norm_eps)
    pre_logits, post_logits, mix_logits = torch.split(logits, [streams, streams, streams * streams], dim=-1)
    pre_base, post_base, mix_base = torch.split(base_M, [streams, streams, streams * streams])
    pre_TH = torch.sigmoid(pre_logits * scale_3[0] + pre_base) + mix_eps
    post_TH = 2 * torch.sigmoid(post_logits * scale_3[1] + post_base)
    mix = (mix_logits * scale_3[2] + mix_base).view(tokens, streams, streams)
    mix_THH = sinkhorn(mix, iterations=sinkhorn_iterations, eps=mix_eps)
    x_TD = (pre_TH.unsqueeze(-1) * streams_THD.float()).sum(1).to(streams_THD.dtype)
    return x_TD, post_TH, mix_THH


@operator(
    source="reference/model.md 2.2; ascend-operators.md 2",
    tolerance=Tolerance(4, "five float32 products, then one rounding"),
)
def hyper_connection_post(
    output_TD: Annotated[Tensor, Spec("T D", FLOATS)],
    streams_THD: Annotated[Tensor, Spec("T H D", FLOATS)],
    post_TH: Annotated[Tensor, Spec("T H", FLOAT32)],
    mix_THH: Annotated[Tensor, Spec("T H H", FLOAT32)],
) -> Annotated[Tensor, Spec("T H D", FLOATS)]:
    """New streams: stream k is post_k times the sublayer's output plus the sum over j of mix[j, k] times
    stream j.
    """
    kept = torch.bmm(mix_THH.transpose(1, 2), streams_THD.float())
    return (post_TH.unsqueeze(-1) * output_TD.float().unsqueeze(1) + kept).to(streams_THD.dtype)


@operator(
    source="reference/model.md 2.2 (head)",
    tolerance=Tolerance(8, "float32 mixing weights, then one rounding"),
)
def hyper_connection_head(
    streams_THD: Annotated[Tensor, Spec("T H D", FLOATS)],
    fn_HF: Annotated[Tensor, Spec("H F", FLOAT32)],
    scale_1: Annotated[Tensor, Spec("1", FLOAT32)],
    base_H: Annotated[Tensor, Spec("H", FLOAT32)],
    *,
    norm_eps: float,
    mix_eps: float,
) -> Annotated[Tensor, Spec("T D", FLOATS)]:
    """The streams collapsed into one before the final norm. No softmax, no Sinkhorn."""
    pre_TH = torch.sigmoid(mixing_logits(streams_THD, fn_HF, norm_eps=norm_eps) * scale_1 + base_H) + mix_eps
    return (pre_TH.unsqueeze(-1) * streams_THD.float()).sum(1).to(streams_THD.dtype)
