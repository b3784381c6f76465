"""Sequences over real page pools, step by step, as the model drives them; and small shuffled page tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.cache.layout import CSA_STATE, ENTRIES, HCA_ENTRIES, HCA_STATE, WINDOW, PageGroup, plan_pools
from ascend_v4.cache.pages import PagePool, SequencePages, make_pools
from ascend_v4.operators.contracts.batch import TokenBatch, rows_of

CPU = torch.device("cpu")
GROUPS = (WINDOW, ENTRIES, HCA_ENTRIES, CSA_STATE, HCA_STATE)


def pools_for(*, tokens: int, sequences: int, step_tokens: int) -> dict[PageGroup, PagePool]:
    plan = plan_pools(set(GROUPS), cache_tokens=tokens, max_sequences=sequences, max_step_tokens=step_tokens)
    return make_pools(plan)


def table_of(sequences: Sequence[SequencePages], group: PageGroup) -> Tensor:
    tables = [pages.tables[group] for pages in sequences]
    longest = max(len(table) for table in tables)
    return torch.tensor([table + [0] * (longest - len(table)) for table in tables], dtype=torch.int64)


@dataclass(frozen=True)
class StepTables:
    """What one step over some sequences sees."""

    batch: TokenBatch
    tables: dict[PageGroup, Tensor]

    def slots(self, group: PageGroup) -> Tensor:
        """Physical rows of the new tokens."""
        return rows_of(
            self.tables[group], self.batch.sequence_T, self.batch.positions_T, per_page=group.page_tokens
        )


def take_step(sequences: Sequence[SequencePages], counts: Sequence[int]) -> StepTables:
    """Extends the sequences and describes the step; the caller advances them afterwards."""
    for pages, count in zip(sequences, counts, strict=True):
        pages.extend(count)
    batch = TokenBatch(
        starts=tuple(pages.num_tokens for pages in sequences), counts=tuple(counts), device=CPU
    )
    return StepTables(batch, {group: table_of(sequences, group) for group in sequences[0].tables})


def advance(sequences: Sequence[SequencePages], counts: Sequence[int]) -> None:
    for pages, count in zip(sequences, counts, strict=True):
        pages.advance(count)
