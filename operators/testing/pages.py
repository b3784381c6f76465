"""Pages dealt to the sequences of a case: shuffled, some unowned, some far from the first.

Legend: B sequences, P logical pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.contracts.batch import rows_of
from ascend_v4.operators.testing.draw import Draw

FAR_PAGE = 30_000
"""A page id that an int16 row of a table, or a product of it in int32, does not hold."""
FAR_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class Pages:
    """Page tables of a batch in one page group."""

    table_BP: Tensor
    num_pages: int
    per_page: int

    def rows(self, wanted: Iterable[range]) -> Tensor:
        """Physical rows of each sequence's logical ones, int64, on the CPU."""
        table = self.table_BP.cpu()
        parts = [torch.empty(0, dtype=torch.int64)]
        for index, span in enumerate(wanted):
            positions = torch.tensor(span, dtype=torch.int64)
            sequence = torch.full_like(positions, index)
            parts.append(rows_of(table, sequence, positions, per_page=self.per_page))
        return torch.cat(parts)


def deal_pages(draw: Draw, held: Sequence[Iterable[int]], *, per_page: int, first: int = 1) -> Pages:
    """Shuffled page ids from `first` for the page numbers a sequence holds, 0 for the others.

    Two pages stay unowned.
    """
    numbers = [sorted(set(sequence)) for sequence in held]
    count = sum(len(sequence) for sequence in numbers)
    ids = [first + page_id for page_id in draw.permutation(count + 2)]
    longest = max((sequence[-1] + 1 for sequence in numbers if sequence), default=1)
    table = torch.zeros(len(numbers), longest, dtype=torch.int64)
    for row, sequence in zip(table, numbers, strict=True):
        for number in sequence:
            row[number] = ids.pop()
    return Pages(draw.lay_out(table), first + count + 2, per_page)


def first_page(per_page: int, row_bytes: int, *, far: bool) -> int:
    """Page 1, or the first one whose id and whose byte offset are both large."""
    return max(FAR_PAGE, FAR_BYTES // (per_page * row_bytes) + 1) if far else 1


def pages_of(rows: range, per_page: int) -> range:
    """Page numbers that cover a run of rows."""
    return range(rows.start // per_page, -(-rows.stop // per_page))
