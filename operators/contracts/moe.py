"""Routing and the routed experts.

Legend: T tokens, E experts, K experts per token, D hidden, I intermediate, R = T * K rows sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contract import FLOAT32, FLOATS, INDICES, INT64, Spec, Tolerance, operator
from ascend_v4.operators.contracts.activation import clamped_swiglu
from ascend_v4.operators.contracts.linear import (
    Int8Rows,
    int8_product,
    int8_rows,
    prepare_linear,
    product_into,
    quantized,
)
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight, WeightFormat

WEIGHED_AFTER = (ActivationFormat.INT8_TOKEN, ActivationFormat.MXFP8)
"""Activation formats with which the routing weight multiplies the result of the down projection."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """gate_up: per expert one [2I, D] weight, or gate and up apart. down: per expert [D, I]."""

    gate_up: tuple[tuple[StoredWeight, ...], ...]
    down: tuple[StoredWeight, ...]


def prepare_experts(weights: ExpertWeights, *, copy: bool) -> ExpertWeights:
    """Float32 copies with gate and up in one matrix, or the file's own bytes."""
    if not copy:
        return weights
    return ExpertWeights(
        tuple(_joined(parts) for parts in weights.gate_up),
        tuple(prepare_linear(weight, copy=True) for weight in weights.down),
    )


def _joined(parts: tuple[StoredWeight, ...]) -> tuple[StoredWeight, ...]:
    if any(part.is_integer for part in parts):
        copies = tuple(prepare_linear(part, copy=True) for part in parts)
        scales = [copy.scale for copy in copies if copy.scale is not None]
        if len(scales) < len(copies):
            # a plain weight beside an integer one: their inputs differ
            return copies
        codes = torch.cat([copy.codes for copy in copies])
        return (StoredWeight(codes, torch.cat(scales), WeightFormat.INT8_CHANNEL),)
    num_outputs = sum(part.num_outputs for part in parts)
    whole = torch.empty(num_outputs, parts[0].num_inputs, device=parts[0].codes.device)
    first = 0
    for part in parts:
        whole[first : first + part.num_outputs] = part.to_float32()
        first += part.num_outputs
    return (StoredWeight(whole, None, WeightFormat.PLAIN),)


@operator(
    source="reference/model.md 2.7; ascend-operators.md 11",
    tolerance=Tolerance(16, "float32 throughout; expert ids are compared bitwise, ties lowest id first"),
)
def route_tokens(
    logits_TE: Annotated[Tensor, Spec("T E", FLOAT32)],
    bias_E: Annotated[Tensor | None, Spec("E", FLOAT32)],
    token_ids_T: Annotated[Tensor | None, Spec("T", INT64)],
    expert_table_VK: Annotated[Tensor | None, Spec("V K", INDICES)],
    *,
    experts_per_token: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Routing weights [T, K] float32 and expert ids [T, K] int32.

    Scores are sqrt(softplus(logits)). With an expert table (hash routing) the token id picks the experts;
    otherwise the best of score + bias, equal ones lowest id first. Weights are the chosen scores without
    bias, divided by their sum, times `scaling`.
    """
    scores_TE = functional.softplus(logits_TE).sqrt()
    if expert_table_VK is not None:
        assert token_ids_T is not None, "hash routing needs the token ids"
        ids_TK = expert_table_VK[token_ids_T].long()
    else:
        ranked = scores_TE if bias_E is None else scores_TE + bias_E
        ids_TK = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :experts_per_token]
    weights_TK = scores_TE.gather(1, ids_TK)
    return weights_TK / weights_TK.sum(-1, keepdim=True) * scaling, ids_TK.to(torch.int32)


@operator(
    source="reference/model.md 2.7; ascend-operators.md 12 and 13",
    tolerance=Tolerance(64, "two products, an activation and a sum over experts, each rounded once"),
    prepare=prepare_experts,
)
def routed_experts(
    x_TD: Annotated[Tensor, Spec("T D", FLOATS)],
    weights_TK: Annotated[Tensor, Spec("T K", FLOAT32)],
    expert_ids_TK: Annotated[Tensor, Spec("T K", (torch.int32,))],
    experts: ExpertWeights,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
) -> Annotated[Tensor, Spec("T D", FLOAT32)]:
    """Sum over each token's experts, in float32.

    Rows are sorted by expert and go through grouped products; each product is rounded to x's dtype. The
    routing weight stands before the down projection as in the release; with INT8_TOKEN and MXFP8 it stands
    after, in float32, as on the chips that have these formats. With INT8_TOKEN a plain weight gets its input
    as it is, and between integer products nothing is rounded before it is quantised again: the chips' kernels
    take the sums of the first through the activation in float32.
    """
    tokens, per_token = expert_ids_TK.shape
    order_R = expert_ids_TK.flatten().sort(stable=True).indices
    counts = torch.bincount(expert_ids_TK.flatten(), minlength=len(experts.down)).tolist()
    token_R = torch.div(order_R, per_token, rounding_mode="floor")
    rows = quantized_rows(x_TD, activation)
    rows = rows.at(token_R) if isinstance(rows, Int8Rows) else rows.index_select(0, token_R)
    stays_wide = isinstance(rows, Int8Rows) and all(part.is_integer for part in experts.down)
    gate_up = _grouped_product(
        rows, counts, experts.gate_up, dtype=torch.float32 if stays_wide else x_TD.dtype
    )
    weights_R = weights_TK.flatten()[order_R]
    is_weighed_after = activation in WEIGHED_AFTER
    hidden = clamped_swiglu.reference(gate_up, None if is_weighed_after else weights_R, limit=swiglu_limit)
    down = _grouped_product(
        quantized_rows(hidden, activation),
        counts,
        tuple((part,) for part in experts.down),
        dtype=x_TD.dtype,
    ).float()
    if is_weighed_after:
        down *= weights_R.unsqueeze(-1)
    out_RD = torch.empty_like(down, dtype=torch.float32)
    out_RD.index_copy_(0, order_R, down)
    return out_RD.view(tokens, per_token, out_RD.shape[1]).sum(1)


def quantized_rows(rows: Tensor, activation: ActivationFormat) -> Tensor | Int8Rows:
    """Rows as the products of a layer with this activation format see them."""
    return int8_rows(rows) if activation is ActivationFormat.INT8_TOKEN else quantized(rows, activation)


def _grouped_product(
    rows_RK: Tensor | Int8Rows,
    counts: list[int],
    weights: tuple[tuple[StoredWeight, ...], ...],
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Each run of rows times its own expert's weights, side by side where an expert has several."""
    width = sum(part.num_outputs for part in weights[0])
    values_RK = rows_RK.values_TK if isinstance(rows_RK, Int8Rows) else rows_RK
    out = values_RK.new_empty(values_RK.shape[0], width, dtype=dtype)
    first = 0
    for expert_index, count in enumerate(counts):
        if count == 0:
            continue
        column = 0
        for part in weights[expert_index]:
            target = out[first : first + count, column : column + part.num_outputs]
            if isinstance(rows_RK, Int8Rows) and part.is_integer:
                target.copy_(int8_product(rows_RK.between(first, first + count), part))
            else:
                product_into(target, values_RK[first : first + count].float(), part)
            column += part.num_outputs
        first += count
    return out
