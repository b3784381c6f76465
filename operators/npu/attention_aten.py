"""Sparse attention in plain torch on the device: gathers each token's rows and multiplies them.

Legend: T tokens, H heads, D head size, C pages, S rows per page, W elements of a stored row, N rows of a
token, B sequences, P logical pages, K selected entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.attention import attend, sparse_attention
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of
from ascend_v4.operators.npu.constants import ATEN
from ascend_v4.operators.npu.rows import ROPE_CHANNELS, unpack_rows

GATHERED_NUMBERS = 1 << 26
"""Most key-value numbers gathered at a time, 256 MB in float32."""


@dataclass(frozen=True)
class GatherPlan(Plan):
    """Whose each token is and where it stands, int64 [T]."""

    positions_T: Tensor
    sequence_T: Tensor


def plan_gather(
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
) -> GatherPlan:
    """Row numbers are left to the call: for long sequences they are more than the rows of a slice."""
    return GatherPlan(batch.positions_T, batch.sequence_T)


@implements(
    sparse_attention,
    backend="npu",
    provider=ATEN,
    plan=plan_gather,
    too_slow="every token copies its own rows before it multiplies them, and no row is shared between tokens",
    capturable=True,
)
def attend_gathered(
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
    """Any cache: plain rows, or 950's packed ones. Never asks the device for a value."""
    assert isinstance(plan, GatherPlan), type(plan)
    out_THD = torch.empty_like(q_THD)
    num_tokens, _, width = q_THD.shape
    num_rows = window_tokens + _num_entries(compressed_cache_CSD, compressed_table_BP, selected_TK)
    step = max(1, GATHERED_NUMBERS // (num_rows * width))
    for low in range(0, num_tokens, step):
        tokens = slice(low, min(low + step, num_tokens))
        positions_T1, sequence_T1 = plan.positions_T[tokens, None], plan.sequence_T[tokens, None]
        seen_TN = positions_T1 - torch.arange(window_tokens - 1, -1, -1, device=q_THD.device)
        kv = _gather(window_cache_CSD, window_table_BP, sequence_T1, seen_TN.clamp_min(0), width)
        valid_TN = seen_TN >= 0
        if compressed_cache_CSD is not None and compressed_table_BP is not None:
            visible_T1 = torch.div(positions_T1 + 1, ratio, rounding_mode="floor")
            if selected_TK is None:
                count = compressed_table_BP.shape[1] * compressed_cache_CSD.shape[1]
                entries_TK = torch.arange(count, device=q_THD.device).expand(len(positions_T1), -1)
                counts_TK = entries_TK < visible_T1
            else:
                columns = torch.arange(selected_TK.shape[1], device=q_THD.device)
                counts_TK = columns < visible_T1
                entries_TK = torch.where(counts_TK, selected_TK[tokens].long(), 0)
            entries = _gather(compressed_cache_CSD, compressed_table_BP, sequence_T1, entries_TK, width)
            kv, valid_TN = torch.cat((kv, entries), dim=1), torch.cat((valid_TN, counts_TK), dim=1)
        out_THD[tokens] = attend(q_THD[tokens], kv, valid_TN, sinks_H, scale=scale, sink_in_peak=sink_in_peak)
    return out_THD


def _num_entries(cache_CSD: Tensor | None, table_BP: Tensor | None, selected_TK: Tensor | None) -> int:
    if cache_CSD is None or table_BP is None:
        return 0
    return table_BP.shape[1] * cache_CSD.shape[1] if selected_TK is None else selected_TK.shape[1]


def _gather(
    cache_CSW: Tensor, table_BP: Tensor, sequence_T1: Tensor, position_TN: Tensor, width: int
) -> Tensor:
    """Numbers [T, N, D] of the rows at logical positions."""
    rows_TN = rows_of(table_BP, sequence_T1, position_TN, per_page=cache_CSW.shape[1])
    flat_NW = cache_CSW.view(-1, cache_CSW.shape[-1])
    if cache_CSW.dtype is not torch.float8_e4m3fn:
        return flat_NW[rows_TN]
    return unpack_rows(
        flat_NW.view(torch.uint8)[rows_TN], nope_dim=width - ROPE_CHANNELS, rope_dim=ROPE_CHANNELS
    )
