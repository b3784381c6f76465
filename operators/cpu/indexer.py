"""The lightning indexer on a CPU: no scores where every visible entry is kept anyway."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.batch import Plan, TokenBatch
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.quantize import IndexFormat


@dataclass(frozen=True)
class CpuIndexPlan(Plan):
    """Whether any token of the step sees more entries than it may keep."""

    must_choose: bool


def plan_cpu_index(
    batch: TokenBatch, *, ratio: int, topk: int, key_table: Tensor, keys_per_page: int
) -> CpuIndexPlan:
    """Compares the longest sequence's entries with topk."""
    pairs = zip(batch.starts, batch.counts, strict=True)
    return CpuIndexPlan(max(start + count for start, count in pairs) // ratio > topk)


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
    """None while nothing has to be left out, the reference's choice otherwise."""
    assert isinstance(plan, CpuIndexPlan), type(plan)
    if not plan.must_choose:
        return None
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
