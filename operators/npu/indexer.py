"""The lightning indexer by the vendors' quantised kernels: int8 on A2 and A3, E4M3 on 950.

Legend: T tokens, H indexer heads, D indexer head size, K entries kept, B sequences, P logical pages, C pages,
S rows per page, W bytes of a stored key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.operators.contract import Limit, Needs, Tolerance, implements
from ascend_v4.operators.contracts.batch import Plan, TokenBatch
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.quantize import IndexFormat
from ascend_v4.operators.npu.constants import (
    A2_A3,
    CANN_RECIPES,
    ONLY_950,
    RECIPES_MODULE,
    TORCH_NPU,
    TORCH_NPU_MODULE,
    VLLM_ASCEND,
    VLLM_MODULE,
)
from ascend_v4.operators.npu.index_keys import (
    fp8_pages,
    int8_pages,
    quantize_fp8,
    quantize_int8,
    rotate_index,
)
from ascend_v4.operators.npu.pages import KEY_BLOCKS, table32

PER_TOKEN_AND_HEAD = 0
"""query_quant_mode and key_quant_mode."""
CAUSAL, UNMASKED = 3, 0
"""sparse_mode."""
EVERYTHING = (1 << 63) - 1
"""pre_tokens and next_tokens take nothing else."""
PAGED_KEYS = "PA_BSND"

WEIGHT_EXPONENT = 14
"""The largest of a token's weights, scaled or not by its query's scale, is brought up to 2^14 .. 2^15."""
SMALLEST_WEIGHT = 2.0**-100
EXPONENT_BITS = 0x7F800000

TOKENS_AT_A_TIME = 1024
"""Of the fallback, which repeats a row of the page table for each."""

DOC = "constraints of the quantised lightning indexer"
LIMITS = (
    Limit(size="index_heads", choices=(64,), source=DOC),
    Limit(size="index_head_dim", choices=(128,), source=DOC),
    Limit(size="topk", low=1, high=2048, source=f"{DOC}: sparse_count"),
    *KEY_BLOCKS,
)
LIMITS_WITH_PLAN_950 = (*LIMITS, Limit(size="topk", choices=(512, 1024), source=f"{DOC}: 950"))
"""Of the kernels that take metadata."""

NEAR_TIES = (
    "a code of a query may be the next one, and heads are weighted in float16 on A2 and A3: entries with "
    "nearly equal scores change places"
)
INT8_TOLERANCE = Tolerance(2, NEAR_TIES)
FP8_TOLERANCE = Tolerance(4, NEAR_TIES)
"""E4M3 codes are eight times as far apart as int8 ones at the top of a row."""


@dataclass(frozen=True)
class IndexerPlan(Plan):
    """What a step's calls share."""

    kernel: Callable[..., tuple[Tensor, Tensor]]
    query_ends: Tensor
    """New tokens up to and including each sequence's, without a leading 0, int32 [B]."""
    lengths: Tensor
    """Tokens of each sequence, not compressed, int32 [B]."""
    key_table: Tensor
    metadata: Tensor | None
    """int32 [1024]; None where there are no tokens."""


@dataclass(frozen=True)
class RowPerTokenPlan(Plan):
    """What the fallback's calls share: every token is a sequence of its own."""

    visible_T: Tensor
    """Entries each token sees, int32 [T]."""
    sequence_T: Tensor
    key_table: Tensor


def plan_indexer(
    batch: TokenBatch,
    *,
    ratio: int,
    topk: int,
    key_table: Tensor,
    keys_per_page: int,
    num_heads: int,
    head_dim: int,
    namespace: str,
    name: str,
) -> IndexerPlan:
    """Tables, lengths and metadata for the kernel `name` of `namespace`."""
    operators = getattr(torch.ops, namespace)
    # a copy: some builds read the ends from an address that a slice is not aligned to
    query_ends = batch.query_starts[1:].clone()
    metadata = None
    if batch.num_tokens:
        metadata = getattr(operators, f"{name}_metadata")(
            num_heads_q=num_heads,
            num_heads_k=1,
            head_dim=head_dim,
            actual_seq_lengths_query=query_ends,
            actual_seq_lengths_key=batch.lengths,
            batch_size=len(batch.counts),
            max_seqlen_q=max(batch.counts),
            max_seqlen_k=max(batch.ends),
            device=str(batch.device),
            **_modes(ratio=ratio, topk=topk),
        )
    return IndexerPlan(
        kernel=getattr(operators, name),
        query_ends=query_ends,
        lengths=batch.lengths,
        key_table=table32(key_table),
        metadata=metadata,
    )


def plan_row_per_token(
    batch: TokenBatch,
    *,
    ratio: int,
    topk: int,
    key_table: Tensor,
    keys_per_page: int,
    num_heads: int,
    head_dim: int,
) -> RowPerTokenPlan:
    """Visible counts stand in for a causal mask over compressed keys, which torch_npu's kernel lacks."""
    visible_T = torch.div(batch.positions_T + 1, ratio, rounding_mode="floor")
    return RowPerTokenPlan(visible_T.to(torch.int32), batch.sequence_T, table32(key_table))


def _modes(*, ratio: int, topk: int) -> dict[str, Any]:
    """What the metadata and the kernel must be told alike."""
    return {
        "query_quant_mode": PER_TOKEN_AND_HEAD,
        "key_quant_mode": PER_TOKEN_AND_HEAD,
        "layout_query": "TND",
        "layout_key": PAGED_KEYS,
        "sparse_count": topk,
        "sparse_mode": CAUSAL,
        "pre_tokens": EVERYTHING,
        "next_tokens": EVERYTHING,
        "cmp_ratio": ratio,
    }


@dataclass(frozen=True, slots=True)
class Quantized:
    """Operands of the kernels. Query [T, H, D], its scale [T, H], key [C, S, 1, D], its scale [C, S, 1]."""

    query: Tensor
    query_scale: Tensor
    key: Tensor
    key_scale: Tensor
    weights: Tensor


def quantize(q_THD: Tensor, weights_TH: Tensor, cache_CSW: Tensor, *, format: IndexFormat) -> Quantized:
    """Rotates and quantises the queries, and views the cache as keys and scales."""
    rotated_THD = rotate_index(q_THD)
    if format is IndexFormat.INT8:
        codes, scale = quantize_int8(rotated_THD)
        keys, key_scale = int8_pages(cache_CSW)
        weights = weights_for_float16(weights_TH, scale)
    else:
        assert format is IndexFormat.FP8, f"no Ascend indexer reads queries as {format}"
        codes, scale = quantize_fp8(rotated_THD)
        keys, key_scale = fp8_pages(cache_CSW)
        weights = weights_TH.float()
    return Quantized(codes, scale, keys.unsqueeze(2), key_scale.unsqueeze(-1), weights.contiguous())


def weights_for_float16(weights_TH: Tensor, scale_TH: Tensor) -> Tensor:
    """Float16 weights [T, H], each token's scaled by a power of two of its own.

    The A2 and A3 kernel rounds weight * query scale to float16, where the products of a trained model are
    mostly subnormal. One factor per token does not change the order of that token's entries.
    """
    wide_TH = weights_TH.float()
    peak_T1 = (wide_TH.abs() * scale_TH.float().clamp_min(1.0)).amax(-1, keepdim=True)
    peak_T1 = peak_T1.clamp_min(SMALLEST_WEIGHT)
    power_T1 = (peak_T1.view(torch.int32) & EXPONENT_BITS).view(torch.float32)
    return (wide_TH * (2.0**WEIGHT_EXPONENT / power_T1)).to(torch.float16)


def select(
    q_THD: Tensor,
    weights_TH: Tensor,
    *,
    key_cache_CSD: Tensor,
    key_table_BP: Tensor,
    batch: TokenBatch,
    plan: Plan,
    ratio: int,
    topk: int,
    format: IndexFormat,
) -> Tensor:
    """Indices [T, K], int32, valid ones first, also where every entry is kept."""
    assert isinstance(plan, IndexerPlan), type(plan)
    if q_THD.shape[0] == 0:
        return torch.empty(0, topk, dtype=torch.int32, device=q_THD.device)
    operands = quantize(q_THD, weights_TH, key_cache_CSD, format=format)
    indices, _ = plan.kernel(
        query=operands.query,
        key=operands.key,
        weights=operands.weights,
        query_dequant_scale=operands.query_scale,
        key_dequant_scale=operands.key_scale,
        actual_seq_lengths_query=plan.query_ends,
        actual_seq_lengths_key=plan.lengths,
        block_table=plan.key_table,
        metadata=plan.metadata,
        return_value=False,
        **_modes(ratio=ratio, topk=topk),
    )
    return indices.view(-1, topk)


def select_by_token(
    q_THD: Tensor,
    weights_TH: Tensor,
    *,
    key_cache_CSD: Tensor,
    key_table_BP: Tensor,
    batch: TokenBatch,
    plan: Plan,
    ratio: int,
    topk: int,
    format: IndexFormat,
) -> Tensor:
    """The same by torch_npu's kernel, which knows no compression: its keys are the visible entries."""
    assert isinstance(plan, RowPerTokenPlan), type(plan)
    selected = torch.empty(q_THD.shape[0], topk, dtype=torch.int32, device=q_THD.device)
    for low in range(0, q_THD.shape[0], TOKENS_AT_A_TIME):
        tokens = slice(low, low + TOKENS_AT_A_TIME)
        operands = quantize(q_THD[tokens], weights_TH[tokens], key_cache_CSD, format=format)
        weights_SH = operands.weights
        if format is IndexFormat.FP8:
            # beside float32 scales this kernel takes bfloat16 weights only
            weights_SH = weights_SH.to(torch.bfloat16)
        indices = torch.ops.npu.npu_quant_lightning_indexer(
            operands.query.unsqueeze(1),
            operands.key,
            weights_SH.unsqueeze(1),
            operands.query_scale.unsqueeze(1),
            operands.key_scale,
            PER_TOKEN_AND_HEAD,
            PER_TOKEN_AND_HEAD,
            actual_seq_lengths_query=torch.ones_like(plan.visible_T[tokens]),
            actual_seq_lengths_key=plan.visible_T[tokens].contiguous(),
            block_table=plan.key_table[plan.sequence_T[tokens]],
            layout_query="BSND",
            layout_key=PAGED_KEYS,
            sparse_count=topk,
            sparse_mode=UNMASKED,
            pre_tokens=EVERYTHING,
            next_tokens=EVERYTHING,
        )
        selected[tokens] = indices.view(-1, topk)
    return selected


def _register(
    provider: str,
    call: Callable[..., Tensor],
    plan: Callable[..., Plan],
    needs: Needs,
    chips: tuple[Chip, ...] = tuple(Chip),
) -> None:
    """One registration per key format, which the chip decides."""
    for kind, tolerance in ((A2_A3, INT8_TOLERANCE), (ONLY_950, FP8_TOLERANCE)):
        implements(
            select_entries,
            backend="npu",
            provider=provider,
            needs=replace(needs, chips=tuple(chip for chip in kind if chip in chips)),
            limits=LIMITS_WITH_PLAN_950 if kind is ONLY_950 and provider != TORCH_NPU else LIMITS,
            plan=plan,
            tolerance=tolerance,
            because=tolerance.why,
            capturable=True,
        )(call)


_register(
    VLLM_ASCEND,
    select,
    partial(plan_indexer, namespace="_C_ascend", name="npu_vllm_quant_lightning_indexer"),
    Needs(
        module=VLLM_MODULE,
        torch_operators=(
            "_C_ascend::npu_vllm_quant_lightning_indexer",
            "_C_ascend::npu_vllm_quant_lightning_indexer_metadata",
            "npu::npu_dynamic_quant",
        ),
    ),
)
# the recipes only bind this kernel, CANN's ops-transformer brings it
_register(
    CANN_RECIPES,
    select,
    partial(plan_indexer, namespace="custom", name="npu_quant_lightning_indexer"),
    Needs(
        module=RECIPES_MODULE,
        torch_operators=(
            "custom::npu_quant_lightning_indexer",
            "custom::npu_quant_lightning_indexer_metadata",
            "npu::npu_dynamic_quant",
        ),
        symbols=("aclnnQuantLightningIndexer", "aclnnQuantLightningIndexerMetadata"),
    ),
    chips=(Chip.A3, Chip.A950),
)
_register(
    TORCH_NPU,
    select_by_token,
    plan_row_per_token,
    Needs(
        module=TORCH_NPU_MODULE,
        torch_operators=("npu::npu_quant_lightning_indexer", "npu::npu_dynamic_quant"),
    ),
)
