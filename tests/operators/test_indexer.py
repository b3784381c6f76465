"""The lightning indexer against a loop: bfloat16 steps, ties, what a token may see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ascend_v4.operators.contracts import indexer as indexer_module
from ascend_v4.operators.contracts.batch import TokenBatch, rows_of
from ascend_v4.operators.contracts.indexer import index_scores, plan_index, select_entries
from ascend_v4.operators.contracts.quantize import IndexFormat
from ascend_v4.operators.select import select
from tests.operators.number_formats import ROUNDINGS, fake_fp4, numpy_of, to_bf16

RATIO, PER_PAGE = 4, 4
CPU = torch.device("cpu")


def scores_by_loop(q: np.ndarray, weights: np.ndarray, keys: np.ndarray, *, rounding) -> np.ndarray:
    """Products, their relu times a head's weight, and their sum, each rounded."""
    scores = np.zeros((len(q), len(keys)))
    for token in range(len(q)):
        for entry, key in enumerate(keys):
            products = rounding(np.array([head @ key for head in q[token]]))
            weighted = rounding(np.maximum(products, 0.0) * weights[token])
            scores[token, entry] = rounding(np.array(weighted.sum()))
    return scores


def chosen_by_loop(scores: np.ndarray, positions: list[int], *, topk: int) -> list[list[int]]:
    """Best first, the lowest entry first among equals, only complete entries, then -1."""
    rows = []
    for row, position in zip(scores, positions, strict=True):
        visible = (position + 1) // RATIO
        best = sorted(range(visible), key=lambda entry: (-row[entry], entry))[:topk]
        rows.append(best + [-1] * (topk - len(best)))
    return rows


def whole(*shape: int, largest: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, shape).to(dtype)


class Scene:
    """A batch of sequences whose keys lie on shuffled pages."""

    def __init__(
        self, starts: tuple[int, ...], counts: tuple[int, ...], *, dtype: torch.dtype, heads: int = 4
    ) -> None:
        self.batch = TokenBatch(starts=starts, counts=counts, device=CPU)
        self.q = whole(self.batch.num_tokens, heads, 64, largest=2, dtype=dtype)
        self.weights = whole(self.batch.num_tokens, heads, largest=2, dtype=dtype)
        entries = [max(1, end // RATIO) for end in self.batch.ends]
        self.keys = [whole(count, 64, largest=2, dtype=dtype) for count in entries]
        pages = [-(-count // PER_PAGE) for count in entries]
        ids = (torch.randperm(sum(pages)) + 1).tolist()
        self.table = torch.zeros(len(starts), max(pages), dtype=torch.int64)
        self.cache = torch.full((sum(pages) + 1, PER_PAGE, 64), torch.nan, dtype=dtype)
        for index, count in enumerate(pages):
            self.table[index, :count] = torch.tensor([ids.pop() for _ in range(count)])
            numbers = torch.arange(entries[index])
            rows = rows_of(self.table, torch.full_like(numbers, index), numbers, per_page=PER_PAGE)
            self.cache.view(-1, 64)[rows] = self.keys[index]

    def ours(self, which: str, *, topk: int, format: IndexFormat) -> Any:
        """What the reference or the CPU's choice selects; None for all visible."""
        table = select("cpu")
        planned: Callable[..., Any]
        call: Callable[..., Any]
        planned, call = (
            (plan_index, select_entries.reference)
            if which == "reference"
            else (table.plan(select_entries), table[select_entries])
        )
        plan = planned(
            self.batch,
            ratio=RATIO,
            topk=topk,
            key_table=self.table,
            keys_per_page=PER_PAGE,
            num_heads=self.q.shape[1],
            head_dim=self.q.shape[2],
        )
        return call(
            self.q,
            self.weights,
            key_cache_CSD=self.cache,
            key_table_BP=self.table,
            batch=self.batch,
            plan=plan,
            ratio=RATIO,
            topk=topk,
            format=format,
        )

    def wanted(self, *, topk: int, dtype: torch.dtype, format: IndexFormat) -> list[list[int]]:
        rows = []
        for index, (first, count, start) in enumerate(self.batch.spans):
            q = numpy_of(self.q[first : first + count])
            if format is IndexFormat.FP4_GROUP:
                signs = np.array([[(-1) ** bin(a & b).count("1") for b in range(64)] for a in range(64)]) / 8
                rotated = ROUNDINGS[dtype](q.reshape(-1, 64) @ signs)
                q = fake_fp4(rotated, group=32).reshape(q.shape)
            weights = numpy_of(self.weights[first : first + count])
            scores = scores_by_loop(q, weights, numpy_of(self.keys[index]), rounding=ROUNDINGS[dtype])
            rows += chosen_by_loop(scores, list(range(start, start + count)), topk=topk)
        return rows


BATCHES = {
    "decode": ((40, 63, 21), (1, 1, 1)),
    "some-see-nothing": ((40, 1, 3), (1, 1, 1)),
    "prefill": ((0,), (67,)),
    "chunk": ((30,), (9,)),
    "ragged": ((0, 50, 2), (25, 2, 1)),
}


@pytest.mark.parametrize("which", ["reference", "selected"])
@pytest.mark.parametrize("format", [IndexFormat.PLAIN, IndexFormat.FP4_GROUP], ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_best_visible_entries_are_chosen_ties_lowest_first(batch, dtype, format, which):
    scene = Scene(*BATCHES[batch], dtype=dtype)
    got = scene.ours(which, topk=5, format=format)
    assert got is not None
    assert got.dtype is torch.int32
    assert got.tolist() == scene.wanted(topk=5, dtype=dtype, format=format)


@pytest.mark.parametrize("topk", [1, 9, 10, 11])
def test_a_token_that_sees_fewer_entries_than_topk_gets_all_of_them(topk):
    scene = Scene((36, 39, 40, 43), (1, 1, 1, 1), dtype=torch.float32)
    got = scene.ours("reference", topk=topk, format=IndexFormat.PLAIN)
    assert got.tolist() == scene.wanted(topk=topk, dtype=torch.float32, format=IndexFormat.PLAIN)


@pytest.mark.parametrize(("start", "chooses"), [(38, False), (42, False), (43, True)])
def test_the_cpu_skips_the_scores_while_every_entry_is_kept(start, chooses):
    scene = Scene((start, 5), (1, 1), dtype=torch.float32)
    assert (scene.ours("selected", topk=10, format=IndexFormat.PLAIN) is not None) == chooses


@pytest.mark.parametrize("entries", [15, 16, 17, 200, 5000])
def test_thousands_of_equal_scores_keep_their_order(entries):
    scene = Scene((4 * entries - 1,), (1,), dtype=torch.bfloat16)
    scene.q.zero_()
    for which in ("reference", "selected"):
        got = scene.ours(which, topk=12, format=IndexFormat.PLAIN)
        assert got.tolist() == [list(range(12))]


def test_scores_are_rounded_at_every_step():
    q, keys = torch.randn(3, 4, 32).to(torch.bfloat16), torch.randn(20, 32).to(torch.bfloat16)
    weights = torch.randn(3, 4).to(torch.bfloat16)
    want = scores_by_loop(numpy_of(q), numpy_of(weights), numpy_of(keys), rounding=to_bf16)
    got = numpy_of(index_scores(q, weights, keys))
    # a product that float32 and float64 sum to different sides of a rounding moves its score by one step
    assert (got == want).mean() > 0.9
    np.testing.assert_allclose(got, want, atol=2.0**-7 * np.abs(want).max())


def test_queries_scored_in_slices_choose_the_same(monkeypatch):
    scene = Scene((0, 50), (40, 30), dtype=torch.bfloat16)
    at_once = scene.ours("reference", topk=5, format=IndexFormat.PLAIN)
    monkeypatch.setattr(indexer_module, "SCORE_ELEMENTS", 1)
    assert torch.equal(scene.ours("reference", topk=5, format=IndexFormat.PLAIN), at_once)
