"""Routing of tokens to experts on Ascend, best candidate first.

Legend: T tokens, E experts, K experts per token, V vocabulary.
All kernels score by sqrt(softplus), choose by score plus bias, and normalise and scale what they chose. Which
of two equal scores comes first is theirs to say.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from ascend_v4.operators.contract import Limit, Needs, implements
from ascend_v4.operators.contracts.moe import route_tokens
from ascend_v4.operators.npu.constants import (
    ATEN,
    CANN_RECIPES,
    RECIPES_MODULE,
    TORCH_NPU,
    TORCH_NPU_MODULE,
    VLLM_ASCEND,
    VLLM_MODULE,
)

MOST_EXPERTS = Limit(size="experts", low=3, high=2048, source="aclnnMoeGatingTopK: group sizes 3 to 2048")
MOST_CHOICES = Limit(size="experts_per_token", high=64, source="custom.npu_moe_gating_top_k: k <= 64")


class Gating(TypedDict):
    """Settings that all three operators spell alike."""

    k_group: int
    group_count: int
    routed_scaling_factor: float
    eps: float
    group_select_mode: int
    renorm: int
    norm_type: int
    out_flag: bool


def _gating(scaling: float) -> Gating:
    """norm_type 2 is sqrt(softplus); renorm 0 is normalisation before the choice, the only one there is."""
    return Gating(
        k_group=1,
        group_count=1,
        routed_scaling_factor=scaling,
        eps=1e-20,
        group_select_mode=1,
        renorm=0,
        norm_type=2,
        out_flag=False,
    )


def _none_routed(logits_TE: Tensor, experts_per_token: int) -> tuple[Tensor, Tensor]:
    weights_TK = logits_TE.new_empty(0, experts_per_token)
    return weights_TK, weights_TK.to(torch.int32)


def _hash_arguments(
    token_ids_T: Tensor | None, expert_table_VK: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Token ids (int64) and their table (int32): both or neither, and the ids only where there is a table.

    A table in int64 is not converted as a whole: the rows of these tokens are, and token t then reads row t.
    """
    if expert_table_VK is None:
        return None, None
    assert token_ids_T is not None, "hash routing needs the token ids"
    if expert_table_VK.dtype is torch.int32:
        return token_ids_T, expert_table_VK
    rows_TK = expert_table_VK.index_select(0, token_ids_T).to(torch.int32)
    return torch.arange(len(token_ids_T), device=token_ids_T.device), rows_TK


def _lacks_hash_table() -> str | None:
    """Releases of torch_npu before 2.13 have the operator without hash routing."""
    found = getattr(torch.ops.npu, "npu_moe_gating_top_k", None)
    if found is None:
        return None  # whether the operator is there is asked apart
    names = {argument.name for argument in found.default._schema.arguments}
    return None if "tid2eid" in names else "npu_moe_gating_top_k of this torch_npu has no hash routing"


@implements(
    route_tokens,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(module=VLLM_MODULE, torch_operators=("_C_ascend::moe_gating_top_k_hash",)),
    limits=(MOST_EXPERTS, MOST_CHOICES),
    capturable=True,
)
def route_tokens_vllm(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    token_ids_T: Tensor | None,
    expert_table_VK: Tensor | None,
    *,
    experts_per_token: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Learned and hash routing in one kernel."""
    if logits_TE.shape[0] == 0:
        return _none_routed(logits_TE, experts_per_token)
    input_ids, table = _hash_arguments(token_ids_T, expert_table_VK)
    weights_TK, ids_TK, _ = torch.ops._C_ascend.moe_gating_top_k_hash(
        logits_TE.contiguous(),
        experts_per_token,
        bias=bias_E,
        input_ids=input_ids,
        tid2eid=table,
        **_gating(scaling),
    )
    return weights_TK, ids_TK


@implements(
    route_tokens,
    backend="npu",
    provider=CANN_RECIPES,
    needs=Needs(module=RECIPES_MODULE, torch_operators=("custom::npu_moe_gating_top_k",)),
    limits=(MOST_EXPERTS, MOST_CHOICES),
    capturable=True,
)
def route_tokens_recipes(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    token_ids_T: Tensor | None,
    expert_table_VK: Tensor | None,
    *,
    experts_per_token: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Learned and hash routing in one kernel."""
    if logits_TE.shape[0] == 0:
        return _none_routed(logits_TE, experts_per_token)
    input_ids, table = _hash_arguments(token_ids_T, expert_table_VK)
    weights_TK, ids_TK, _ = torch.ops.custom.npu_moe_gating_top_k(
        logits_TE.contiguous(),
        experts_per_token,
        bias=bias_E,
        input_ids=input_ids,
        tid2eid=table,
        **_gating(scaling),
    )
    return weights_TK, ids_TK


@implements(
    route_tokens,
    backend="npu",
    provider=TORCH_NPU,
    unusable=_lacks_hash_table,
    needs=Needs(module=TORCH_NPU_MODULE, torch_operators=("npu::npu_moe_gating_top_k",)),
    limits=(MOST_EXPERTS,),
    capturable=True,
)
def route_tokens_torch_npu(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    token_ids_T: Tensor | None,
    expert_table_VK: Tensor | None,
    *,
    experts_per_token: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The operator's page documents softmax and sigmoid only; its schema has the hash table, and norm_type 2
    is what the same kernel takes under the vendor packages' names. Where it refuses, `aten` is next.
    """
    if logits_TE.shape[0] == 0:
        return _none_routed(logits_TE, experts_per_token)
    input_ids, table = _hash_arguments(token_ids_T, expert_table_VK)
    weights_TK, ids_TK, _ = torch.ops.npu.npu_moe_gating_top_k(
        logits_TE.contiguous(),
        experts_per_token,
        bias=bias_E,
        input_ids=input_ids,
        tid2eid=table,
        **_gating(scaling),
    )
    return weights_TK, ids_TK


@implements(route_tokens, backend="npu", provider=ATEN, capturable=True)
def route_tokens_aten(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    token_ids_T: Tensor | None,
    expert_table_VK: Tensor | None,
    *,
    experts_per_token: int,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """The contract's own plain torch."""
    return route_tokens.reference(
        logits_TE,
        bias_E,
        token_ids_T,
        expert_table_VK,
        experts_per_token=experts_per_token,
        scaling=scaling,
    )
