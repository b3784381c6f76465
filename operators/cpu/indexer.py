"""The lightning indexer on a CPU: no scores where every visible entry is kept anyway."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of
from ascend_v4.operators.contracts.indexer import best_entries, index_scores, select_entries
from ascend_v4.operators.contracts.quantize import IndexFormat, quantize_index


@dataclass(frozen=True)
class CpuIndexPlan(Plan):
    """Rows of each sequence's visible keys where some token must choose; None where none has to."""

    key_rows: tuple[Tensor, ...] | None


def plan_cpu_index(
    batch: TokenBatch,
    *,
    ratio: int,
    topk: int,
    key_table: Tensor,
    keys_per_page: int,
    num_heads: int,
    head_dim: int,
) -> CpuIndexPlan:
    """Compares the longest sequence's entries with topk."""
    if max(batch.ends, default=0) // ratio <= topk:
        return CpuIndexPlan(None)
    rows = []
    for index, end in enumerate(batch.ends):
        entries = torch.arange(end // ratio)
        rows.append(rows_of(key_table, torch.full_like(entries, index), entries, per_page=keys_per_page))
    return CpuIndexPlan(tuple(rows))


@implements(select_entries, backend="cpu", provider="torch", plan=plan_cpu_index)
def select_entries_when_needed(
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
) -> Tensor | None:
    """None while nothing has to be left out; planned rows for single tokens; otherwise the reference."""
    assert isinstance(plan, CpuIndexPlan), type(plan)
    if plan.key_rows is None:
        return None
    if max(batch.counts) > 1 or min(batch.ends) // ratio < topk:
        return select_entries.reference(
            q_THD,
            weights_TH,
            key_cache_CSD=key_cache_CSD,
            key_table_BP=key_table_BP,
            batch=batch,
            plan=plan,
            ratio=ratio,
            topk=topk,
            format=format,
        )
    q_THD = quantize_index.reference(q_THD.flatten(0, 1), format=format).view_as(q_THD)
    flat = key_cache_CSD.view(-1, key_cache_CSD.shape[-1])
    best = []
    for token, rows in enumerate(plan.key_rows):
        pair = (q_THD[token : token + 1], weights_TH[token : token + 1])
        best.append(best_entries(index_scores(*pair, flat.index_select(0, rows)), topk=topk))
    return torch.cat(best).to(torch.int32)
