"""Routed experts on a CPU: without sorting where a decoding step has only a handful of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.activation import clamped_swiglu
from ascend_v4.operators.contracts.moe import ExpertWeights, quantized_rows, routed_experts
from ascend_v4.operators.contracts.quantize import ActivationFormat
from ascend_v4.operators.cpu.linear import rounded, row_product, widened
from ascend_v4.operators.native import NEEDS, cpu_unusable

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
    """Row by row for few tokens, the reference's grouped products otherwise."""
    if len(x_TD) > FEW_TOKENS:
        return routed_experts.reference(
            x_TD, weights_TK, expert_ids_TK, experts, swiglu_limit=swiglu_limit, activation=activation
        )
    tokens, per_token = expert_ids_TK.shape
    ids = expert_ids_TK.flatten().tolist()
    rows = torch.split(widened(quantized_rows(x_TD, activation)), 1)
    gate_up = [
        row_product(rows[index // per_token], part)
        for index, expert_id in enumerate(ids)
        for part in experts.gate_up[expert_id]
    ]
    joined = rounded(torch.cat(gate_up, dim=1).view(len(ids), -1), x_TD.dtype)
    hidden = clamped_swiglu.reference(joined, weights_TK.flatten(), limit=swiglu_limit)
    rows = torch.split(widened(quantized_rows(hidden, activation)), 1)
    down = [row_product(rows[index], experts.down[expert_id]) for index, expert_id in enumerate(ids)]
    each = widened(rounded(torch.cat(down), x_TD.dtype))
    return each.view(tokens, per_token, -1).sum(1)
