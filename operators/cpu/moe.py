"""Routing and routed experts on a CPU: no sorting where a decoding step has only a handful of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.linear import product, quantized, rounded, widened
from ascend_v4.operators.contracts.moe import (
    WEIGHED_AFTER,
    ExpertWeights,
    route_tokens,
    routed_experts,
)
from ascend_v4.operators.contracts.quantize import ActivationFormat
from ascend_v4.operators.cpu.activation import swiglu_rows
from ascend_v4.operators.native import NEEDS, cpu_kernels, cpu_unusable

FEW_TOKENS = 2


@implements(routed_experts, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def routed_experts_by_row(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    experts: ExpertWeights,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
) -> Tensor:
    """Row by row for few tokens in the release's formats, the reference's grouped products otherwise."""
    if not 0 < len(x_TD) <= FEW_TOKENS or activation in WEIGHED_AFTER:
        return routed_experts.reference(
            x_TD, weights_TK, expert_ids_TK, experts, swiglu_limit=swiglu_limit, activation=activation
        )
    tokens, per_token = expert_ids_TK.shape
    ids = expert_ids_TK.flatten().tolist()
    rows = torch.split(widened(quantized(x_TD, activation)), 1)
    gate_up = [
        product(rows[index // per_token], part)
        for index, expert_id in enumerate(ids)
        for part in experts.gate_up[expert_id]
    ]
    joined = rounded(torch.cat(gate_up, dim=1).view(len(ids), -1), x_TD.dtype)
    hidden = swiglu_rows(joined, weights_TK.flatten(), limit=swiglu_limit)
    rows = torch.split(widened(quantized(hidden, activation)), 1)
    down = [product(rows[index], experts.down[expert_id]) for index, expert_id in enumerate(ids)]
    each = widened(rounded(torch.cat(down), x_TD.dtype))
    return each.view(tokens, per_token, -1).sum(1)


@implements(route_tokens, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def route_tokens_native(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    token_ids_T: Tensor | None,
    expert_table_VK: Tensor | None,
    *,
    experts_per_token: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Learned routing of few tokens natively; hash routing and many tokens as the reference."""
    tokens, experts = logits_TE.shape
    if expert_table_VK is not None or tokens > FEW_TOKENS or not logits_TE.is_contiguous():
        return route_tokens.reference(
            logits_TE,
            bias_E,
            token_ids_T,
            expert_table_VK,
            experts_per_token=experts_per_token,
            scaling=scaling,
        )
    bias = None if bias_E is None else bias_E.contiguous()
    scratch = logits_TE.new_empty(2 * experts)
    weights_TK = logits_TE.new_empty(tokens, experts_per_token)
    ids_TK = torch.empty(tokens, experts_per_token, dtype=torch.int32)
    cpu_kernels().ascend_v4_route(
        *(logits_TE.data_ptr(), None if bias is None else bias.data_ptr()),
        *(tokens, experts, experts_per_token, scaling),
        *(scratch.data_ptr(), weights_TK.data_ptr(), ids_TK.data_ptr()),
    )
    return weights_TK, ids_TK
