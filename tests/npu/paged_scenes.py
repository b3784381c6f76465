"""Sequences over shuffled pages in the caches of a simulated chip, at small sizes that the kernels waive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import WAIVABLE, Implementation, Operator
from ascend_v4.operators.contracts.batch import TokenBatch, rows_of
from ascend_v4.operators.contracts.cache import CacheStorage
from ascend_v4.operators.contracts.quantize import IndexFormat, KvFormat

CPU = torch.device("cpu")
HEADS, WIDTH, NOPE = 4, 128, 64
WINDOW, WINDOW_PAGE = 128, 128
ENTRIES_PER_PAGE = {4: 32, 128: 16}
STATE_PAGE = {4: 8, 128: 32}
KV_FORMAT = {Chip.A2: KvFormat.PLAIN, Chip.A3: KvFormat.PLAIN, Chip.A950: KvFormat.FP8_GROUP}
INDEX_FORMAT = {Chip.A2: IndexFormat.INT8, Chip.A3: IndexFormat.INT8, Chip.A950: IndexFormat.FP8}
BATCHES = {
    "one": ((0,), (1,)),
    "edge": ((126, 127, 128, 3), (1, 1, 1, 1)),
    "ragged": ((0, 130, 100, 255), (7, 5, 34, 1)),
    "long": ((513, 0), (3, 60)),
}


def install(chip: Chip, arithmetic: Arithmetic = Arithmetic.IDEAL) -> None:
    """A simulated chip that takes any model size."""
    simulator.install(chip, waived=frozenset(WAIVABLE), arithmetic=arithmetic)


def planned_by(declared: Operator[..., Any] | Implementation[..., Any], arguments: Mapping[str, Any]) -> Any:
    assert declared.plan is not None
    return declared.plan(**arguments)


def prepared_by(implementation: Implementation[..., Any], weights: object) -> Any:
    assert implementation.prepare is not None
    return implementation.prepare(weights, copy=False)


def batch_named(name: str) -> TokenBatch:
    starts, counts = BATCHES[name]
    return TokenBatch(starts=starts, counts=counts, device=CPU)


@dataclass(frozen=True)
class Paged:
    """Logical rows of each sequence, and where they lie."""

    pages: Tensor
    """The numbers; rows that belong to nobody are `filler`."""
    table: Tensor

    def stored(self, storage: CacheStorage) -> Tensor:
        return storage.pack(self.pages)

    def read_back(self, storage: CacheStorage) -> Tensor:
        """What the reference is given: the numbers as the cache holds them."""
        return storage.unpack(storage.pack(self.pages))


def laid_out(rows: list[Tensor], per_page: int, *, filler: float = 1e4, drop: tuple[int, ...] = ()) -> Paged:
    """Rows over shuffled pages. `drop` says how many leading pages of a sequence were freed."""
    pages = [-(-max(len(part), 1) // per_page) for part in rows]
    ids = (torch.randperm(sum(pages)) + 1).tolist()
    table = torch.zeros(len(rows), max(pages, default=1), dtype=torch.int64)
    width = rows[0].shape[1] if rows else WIDTH
    cache = torch.full((sum(pages) + 1, per_page, width), filler)
    for index, part in enumerate(rows):
        table[index, : pages[index]] = torch.tensor([ids.pop() for _ in range(pages[index])])
        numbers = torch.arange(len(part))
        where = rows_of(table, torch.full_like(numbers, index), numbers, per_page=per_page)
        cache.view(-1, width)[where] = part.float()
    for index, freed in enumerate(drop):
        for page in table[index, :freed].tolist():
            cache[page] = filler
        table[index, :freed] = 0
    return Paged(cache, table)


def attention_plan_arguments(
    batch: TokenBatch, window: Paged, entries: Paged | None, *, ratio: int, topk: int
) -> dict[str, Any]:
    return {
        "batch": batch,
        "ratio": ratio,
        "window_tokens": WINDOW,
        "window_table": window.table,
        "window_page_tokens": WINDOW_PAGE,
        "compressed_table": None if entries is None else entries.table,
        "entries_per_page": ENTRIES_PER_PAGE.get(ratio, 0),
        "num_heads": HEADS,
        "head_dim": WIDTH,
        "topk": topk,
    }


def selection(batch: TokenBatch, *, ratio: int, topk: int) -> Tensor:
    """Distinct visible entries of each token in random order, then -1."""
    visible = ((batch.positions_T + 1) // ratio).tolist()
    selected = torch.full((len(visible), topk), -1, dtype=torch.int32)
    for row, count in zip(selected, visible, strict=True):
        kept = min(topk, count)
        row[:kept] = torch.randperm(count)[:kept].to(torch.int32)
    return selected
