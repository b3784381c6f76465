"""Sparse attention over shared key-values: one vendor kernel for bfloat16 caches, one for packed FP8 rows.

Both divide their work ahead of time in a metadata operator, once per step and kind of layer, and trust what
it says: metadata made for other lengths skips or repeats work without an error.
Legend: T tokens, H heads, D head size, C pages, S rows per page, W elements of a stored row, B sequences, P
logical pages, K selected entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.operators.contract import Limit, Needs, implements
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import Plan, TokenBatch
from ascend_v4.operators.contracts.quantize import KV_GROUP
from ascend_v4.operators.npu.constants import (
    A2_A3,
    CANN_RECIPES,
    ONLY_950,
    RECIPES_MODULE,
    VLLM_ASCEND,
    VLLM_MODULE,
)
from ascend_v4.operators.npu.pages import BLOCKS, table32
from ascend_v4.operators.npu.rows import ROPE_CHANNELS, ROW_LIMITS, row_bytes

BAND = 4
"""ori_mask_mode: from ori_win_left rows before a query to ori_win_right rows after it."""
CAUSAL = 3
"""cmp_mask_mode: entries that are complete at the query's position."""
KV_SCALED_BY_TILE = 1
"""kv_quant_mode of the FP8 kernel: one scale per `tile_size` channels, in the row itself."""
FP8_ROWS = {"kv_quant_mode": KV_SCALED_BY_TILE, "tile_size": KV_GROUP, "rope_head_dim": ROPE_CHANNELS}

PLAIN_KERNEL = "npu_sparse_attn_sharedkv"
FP8_KERNEL = "npu_kv_quant_sparse_attn_sharedkv"

TILING = "tiling of sparse_attn_sharedkv"
FP8_TILING = "tiling of kv_quant_sparse_attn_sharedkv"
PLAIN_LIMITS = (
    Limit(size="heads", multiple=4, low=4, source=TILING),
    Limit(size="head_dim", choices=(512,), source=TILING),
    Limit(size="topk", choices=(512, 1024), source="sparse_attn_sharedkv_metadata: cmp_topk"),
    *BLOCKS,
)
FP8_LIMITS = (
    Limit(size="heads", choices=(64, 128), source=FP8_TILING),
    Limit(size="head_dim", choices=(512,), source=FP8_TILING),
    Limit(size="topk", choices=(512, 1024), source=FP8_TILING),
    *ROW_LIMITS,
    *BLOCKS,
)


@dataclass(frozen=True)
class SharedKvPlan(Plan):
    """What a step's kernel calls of one kind of layer share."""

    kernel: Callable[..., tuple[Tensor, Tensor]]
    query_starts: Tensor
    """New tokens before each sequence's, with a leading 0, int32 [B + 1]."""
    lengths: Tensor
    """Tokens of each sequence, compressed or not, int32 [B]."""
    window_table: Tensor
    compressed_table: Tensor | None
    metadata: Tensor | None
    """int32 [1024]; None where there is nothing to attend for."""
    selects: bool
    """Whether each token attends to selected entries only."""
    row_format: Mapping[str, int]
    """Arguments that only the FP8 kernel takes."""


def plan_shared_kv(
    batch: TokenBatch,
    *,
    ratio: int,
    window_tokens: int,
    window_table: Tensor,
    window_page_tokens: int,
    compressed_table: Tensor | None,
    entries_per_page: int,
    num_heads: int,
    head_dim: int,
    topk: int,
    namespace: str,
    name: str,
    metadata_width: Callable[[int], int] = int,
) -> SharedKvPlan:
    """Tables, lengths and metadata for the kernel `name` of `namespace`.

    metadata_width says how wide the metadata operator is told that a head is.
    """
    operators = getattr(torch.ops, namespace)
    row_format = {} if name == PLAIN_KERNEL else FP8_ROWS
    metadata = None
    if batch.num_tokens:
        metadata = getattr(operators, f"{name}_metadata")(
            num_heads_q=num_heads,
            num_heads_kv=1,
            head_dim=metadata_width(head_dim),
            cu_seqlens_q=batch.query_starts,
            seqused_kv=batch.lengths,
            batch_size=len(batch.counts),
            max_seqlen_q=max(batch.counts),
            max_seqlen_kv=max(batch.ends),
            ori_topk=0,
            cmp_topk=topk,
            has_ori_kv=True,
            has_cmp_kv=compressed_table is not None,
            device=str(batch.device),
            **_masks(ratio, window_tokens),
            **row_format,
        )
    return SharedKvPlan(
        kernel=getattr(operators, name),
        query_starts=batch.query_starts,
        lengths=batch.lengths,
        window_table=table32(window_table),
        compressed_table=None if compressed_table is None else table32(compressed_table),
        metadata=metadata,
        selects=topk > 0,
        row_format=row_format,
    )


def _masks(ratio: int, window_tokens: int) -> dict[str, Any]:
    """What the metadata and the kernel must be told alike.

    The two packages disagree on the default of ori_win_left. A window of 128 includes the query itself.
    """
    return {
        "cmp_ratio": max(ratio, 1),
        "ori_mask_mode": BAND,
        "cmp_mask_mode": CAUSAL,
        "ori_win_left": window_tokens - 1,
        "ori_win_right": 0,
        "layout_q": "TND",
        "layout_kv": "PA_ND",
    }


def _row_width(head_dim: int) -> int:
    return row_bytes(head_dim, head_dim - ROPE_CHANNELS)


def attend(
    q_THD: Tensor,
    window_cache_CSD: Tensor,
    *,
    window_table_BP: Tensor,
    compressed_cache_CSD: Tensor | None,
    compressed_table_BP: Tensor | None,
    selected_TK: Tensor | None,
    sinks_H: Tensor,
    batch: TokenBatch,
    plan: Plan,
    ratio: int,
    window_tokens: int,
    scale: float,
    sink_in_peak: bool,
) -> Tensor:
    """Window alone, window with all entries, or window with selected ones, by what is given.

    q has its rope channels last for both kernels, whatever the rows of the caches have.
    """
    assert sink_in_peak, "the kernels' running maximum starts at the sink"
    assert isinstance(plan, SharedKvPlan), type(plan)
    if q_THD.shape[0] == 0:
        return torch.empty_like(q_THD)
    assert (selected_TK is not None) == plan.selects, "the metadata was made for the other mode"
    return plan.kernel(
        q_THD.contiguous(),
        ori_kv=window_cache_CSD.unsqueeze(2),
        cmp_kv=None if compressed_cache_CSD is None else compressed_cache_CSD.unsqueeze(2),
        cmp_sparse_indices=None if selected_TK is None else selected_TK.unsqueeze(1).contiguous(),
        ori_block_table=plan.window_table,
        cmp_block_table=plan.compressed_table,
        cu_seqlens_q=plan.query_starts,
        seqused_kv=plan.lengths,
        sinks=sinks_H,
        metadata=plan.metadata,
        softmax_scale=scale,
        return_softmax_lse=False,
        **_masks(ratio, window_tokens),
        **plan.row_format,
    )[0]


def _needs(module: str, namespace: str, name: str, *, chips: tuple[Chip, ...], symbol: str = "") -> Needs:
    return Needs(
        module=module,
        torch_operators=(f"{namespace}::{name}", f"{namespace}::{name}_metadata"),
        symbols=(symbol, f"{symbol}Metadata") if symbol else (),
        chips=chips,
    )


def _register(provider: str, needs: Needs, limits: tuple[Limit, ...], plan: Callable[..., Plan]) -> None:
    implements(
        sparse_attention,
        backend="npu",
        provider=provider,
        needs=needs,
        limits=limits,
        plan=plan,
        capturable=True,
    )(attend)


_register(
    VLLM_ASCEND,
    _needs(VLLM_MODULE, "_C_ascend", PLAIN_KERNEL, chips=A2_A3),
    PLAIN_LIMITS,
    partial(plan_shared_kv, namespace="_C_ascend", name=PLAIN_KERNEL),
)
_register(
    VLLM_ASCEND,
    _needs(VLLM_MODULE, "_C_ascend", FP8_KERNEL, chips=ONLY_950),
    FP8_LIMITS,
    partial(plan_shared_kv, namespace="_C_ascend", name=FP8_KERNEL),
)
# the recipes only bind these kernels, CANN's ops-transformer brings them
_register(
    CANN_RECIPES,
    _needs(RECIPES_MODULE, "custom", PLAIN_KERNEL, chips=(Chip.A3,), symbol="aclnnSparseAttnSharedkv"),
    PLAIN_LIMITS,
    partial(plan_shared_kv, namespace="custom", name=PLAIN_KERNEL),
)
# the recipes tell the metadata operator the bytes of a row, vLLM-Ascend the width of a head
_register(
    CANN_RECIPES,
    _needs(RECIPES_MODULE, "custom", FP8_KERNEL, chips=ONLY_950, symbol="aclnnKvQuantSparseAttnSharedkv"),
    FP8_LIMITS,
    partial(plan_shared_kv, namespace="custom", name=FP8_KERNEL, metadata_width=_row_width),
)
