"""Sparse attention against a loop over queries and heads: window edges, sinks, selections, roundings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ascend_v4.errors import ContractError
from ascend_v4.operators.contract import Tolerance
from ascend_v4.operators.contracts.attention import plan_attention, sparse_attention
from ascend_v4.operators.contracts.batch import TokenBatch, rows_of
from ascend_v4.operators.cpu.attention import DENSE_FACTOR, GATHERED_TOKENS, TILE_TOKENS
from ascend_v4.operators.select import select
from tests.operators.number_formats import ROUNDINGS, numpy_of, to_bf16

CPU = torch.device("cpu")
WINDOW, PAGE, HEADS, WIDTH = 128, 128, 2, 16
SCALE = 0.4
WHICH = pytest.mark.parametrize("which", ["reference", "selected"])


class Scene:
    """Sequences with key-values for every position and entry, laid out over shuffled pages among NaN."""

    def __init__(
        self,
        starts: tuple[int, ...],
        counts: tuple[int, ...],
        *,
        ratio: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.batch, self.ratio = TokenBatch(starts=starts, counts=counts, device=CPU), ratio
        self.q = torch.randn(self.batch.num_tokens, HEADS, WIDTH).to(dtype)
        self.sinks = torch.randn(HEADS)
        self.kv = [torch.randn(end, WIDTH).to(dtype) for end in self.batch.ends]
        self.window, self.window_table = self.paged(self.kv, PAGE)
        self.entries: list[torch.Tensor] = []
        self.compressed = self.compressed_table = None
        if ratio:
            self.entries = [torch.randn(end // ratio, WIDTH).to(dtype) for end in self.batch.ends]
            self.compressed, self.compressed_table = self.paged(self.entries, PAGE // ratio)

    def paged(self, rows: list[torch.Tensor], per_page: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = [-(-max(len(part), 1) // per_page) for part in rows]
        ids = (torch.randperm(sum(pages)) + 1).tolist()
        table = torch.zeros(len(rows), max(pages), dtype=torch.int64)
        cache = torch.full((sum(pages) + 1, per_page, WIDTH), torch.nan, dtype=rows[0].dtype)
        for index, part in enumerate(rows):
            table[index, : pages[index]] = torch.tensor([ids.pop() for _ in range(pages[index])])
            numbers = torch.arange(len(part))
            where = rows_of(table, torch.full_like(numbers, index), numbers, per_page=per_page)
            cache.view(-1, WIDTH)[where] = part
        return cache, table

    def ours(
        self, which: str, selected: torch.Tensor | None = None, *, sink_in_peak: bool = False
    ) -> torch.Tensor:
        table = select("cpu")
        planned, call = (
            (plan_attention, sparse_attention.reference)
            if which == "reference"
            else (table.plan(sparse_attention), table[sparse_attention])
        )
        plan = planned(
            self.batch,
            ratio=self.ratio,
            window_tokens=WINDOW,
            window_table=self.window_table,
            window_page_tokens=PAGE,
            compressed_table=self.compressed_table,
            entries_per_page=PAGE // self.ratio if self.ratio else 0,
            num_heads=self.q.shape[1],
            head_dim=WIDTH,
            topk=0 if selected is None else selected.shape[1],
        )
        return call(
            self.q,
            self.window,
            window_table_BP=self.window_table,
            compressed_cache_CSD=self.compressed,
            compressed_table_BP=self.compressed_table,
            selected_TK=selected,
            sinks_H=self.sinks,
            batch=self.batch,
            plan=plan,
            ratio=self.ratio,
            window_tokens=WINDOW,
            scale=SCALE,
            sink_in_peak=sink_in_peak,
        )

    def wanted(
        self, selected: torch.Tensor | None = None, *, rounded: bool = True, sink_in_peak: bool = False
    ) -> np.ndarray:
        rounding = ROUNDINGS[self.q.dtype]
        out = np.zeros(self.q.shape)
        for index, (first, count, start) in enumerate(self.batch.spans):
            for offset in range(count):
                token, position = first + offset, start + offset
                rows = [numpy_of(self.kv[index][p]) for p in range(max(0, position - 127), position + 1)]
                rows += [numpy_of(self.entries[index][e]) for e in self._seen(token, position, selected)]
                for head in range(HEADS):
                    query, sink = numpy_of(self.q[token, head]), self.sinks[head].item()
                    floor = sink if sink_in_peak else -math.inf
                    out[token, head] = attended(query, np.array(rows), sink, rounding=rounding, floor=floor)
        return rounding(out) if rounded else out

    def _seen(self, token: int, position: int, selected: torch.Tensor | None) -> list[int]:
        if not self.ratio:
            return []
        visible = (position + 1) // self.ratio
        if selected is None:
            return list(range(visible))
        chosen: list[int] = selected[token].tolist()
        return chosen[: min(len(chosen), visible)]

    def selection(self, topk: int) -> torch.Tensor:
        """Distinct visible entries in random order; what lies behind must not be looked at."""
        rows = []
        for _, count, start in self.batch.spans:
            for position in range(start, start + count):
                chosen = torch.randperm((position + 1) // self.ratio)[:topk].tolist()
                rows.append(chosen + [-1] * (topk - len(chosen)))
        return torch.tensor(rows, dtype=torch.int32)


def attended(q: np.ndarray, rows: np.ndarray, sink: float, *, rounding, floor: float) -> np.ndarray:
    """One query of one head: probabilities rounded before the values, not in the denominator. `floor` is the
    least that they are relative to.
    """
    scores = rows @ q * SCALE
    peak = max(scores.max(), floor)
    weights = np.exp(scores - peak)
    with np.errstate(over="ignore"):
        total = weights.sum() + np.exp(sink - peak)
    return rounding(weights) @ rows / total


def require_close(got: torch.Tensor, want: np.ndarray) -> None:
    steps = 16 if got.dtype is torch.float32 else 1
    bound = Tolerance(steps, "float32 sums, or one rounding to bfloat16")
    bound.require(got, torch.from_numpy(want).to(got.dtype))


@WHICH
@pytest.mark.parametrize("position", [0, 1, 125, 126, 127, 128, 129, 130, 254, 255, 256, 257])
def test_a_token_sees_itself_and_the_127_before_it(position, which):
    scene = Scene((position,), (1,))
    require_close(scene.ours(which), scene.wanted())


@WHICH
@pytest.mark.parametrize("tokens", [126, 127, 128, 129, 130, 2 * TILE_TOKENS + 1])
def test_a_prefill_equals_its_tokens_one_by_one(tokens, which):
    scene = Scene((0,), (tokens,))
    require_close(scene.ours(which), scene.wanted())


@WHICH
@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("position", [2, 3, 4, 126, 127, 128, 255, 256])
def test_an_entry_is_visible_to_the_very_token_that_completes_it(position, ratio, which):
    scene = Scene((position,), (1,), ratio=ratio)
    require_close(scene.ours(which), scene.wanted())


BATCHES = {
    "decode": ((126, 127, 128, 129, 300), (1, 1, 1, 1, 1)),
    "some-see-nothing": ((400, 1, 2), (1, 1, 1)),
    "several": ((120, 250, 0), (GATHERED_TOKENS, 5, 1)),
    "prefill": ((0,), (200,)),
    "chunk": ((100,), (TILE_TOKENS + 1,)),
    "ragged": ((0, 130, 2), (1, 70, 9)),
}


@WHICH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [0, 4, 128])
@pytest.mark.parametrize("batch", BATCHES)
def test_batches_of_any_lengths_equal_the_loop(batch, ratio, dtype, which):
    scene = Scene(*BATCHES[batch], ratio=ratio, dtype=dtype)
    require_close(scene.ours(which), scene.wanted())


@WHICH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("topk", [1, 3, 40])
@pytest.mark.parametrize("batch", BATCHES)
def test_only_selected_entries_are_seen(batch, topk, dtype, which):
    scene = Scene(*BATCHES[batch], ratio=4, dtype=dtype)
    selected = scene.selection(topk)
    require_close(scene.ours(which, selected), scene.wanted(selected))


def test_the_selection_cases_take_both_ways_of_the_cpu():
    entries = 200 // 4
    assert entries > DENSE_FACTOR * 3
    assert entries <= DENSE_FACTOR * 40


@WHICH
@pytest.mark.parametrize("selected", [-1, 32, 2**31 - 1, -(2**31)])
def test_places_behind_the_visible_entries_are_not_read(selected, which):
    scene = Scene((130, 6), (1, 1), ratio=4)
    chosen = scene.selection(3)
    want = scene.ours(which, chosen)
    chosen[1, 1:] = selected
    assert torch.equal(scene.ours(which, chosen), want)


@pytest.mark.parametrize("wrong", [-1, 32, 2**31 - 1])
def test_the_reference_refuses_an_entry_that_is_not_visible(wrong):
    scene = Scene((127, 130), (1, 1), ratio=4)
    selected = scene.selection(3)
    selected[1, 2] = wrong
    with pytest.raises(ContractError, match=f"selected entry {wrong} of token 1, column 2: 32 entries"):
        scene.ours("reference", selected)


@WHICH
@pytest.mark.parametrize("sink", [-math.inf, -1e4, -5.0, 0.0, 5.0, 1e4, 3e38, math.inf])
def test_a_sink_takes_its_share_of_the_denominator_alone(sink, which):
    scene = Scene((0, 200), (5, 1), ratio=4)
    scene.sinks = torch.tensor([sink, 0.5])
    got, want = scene.ours(which), scene.wanted()
    assert torch.isfinite(got).all()
    require_close(got, want)
    assert (got[:, 0] == 0).all() == (sink > 100)


@WHICH
@pytest.mark.parametrize("sink", [-math.inf, -1.0, 8.3, 1e4])
def test_a_sink_in_the_peak_moves_only_the_rounding(sink, which):
    scene = Scene((127,) * 20, (1,) * 20, ratio=4, dtype=torch.bfloat16)
    scene.sinks.fill_(sink)
    got, other = scene.ours(which, sink_in_peak=True), scene.ours(which)
    want = numpy_of(torch.from_numpy(scene.wanted(sink_in_peak=True)).bfloat16())
    assert (numpy_of(got) == want).mean() > 0.99
    require_close(other, scene.wanted(sink_in_peak=True))
    # a sink below the scores changes nothing, and far above them nothing is left
    assert torch.equal(got, other) == (sink != 8.3)


@WHICH
def test_huge_scores_do_not_overflow(which):
    scene = Scene((0,), (40,), ratio=4)
    scene.q *= 1e4
    require_close(scene.ours(which), scene.wanted())


@WHICH
def test_the_denominator_holds_unrounded_probabilities(which):
    scene = Scene((127,) * 20, (1,) * 20, dtype=torch.bfloat16)
    scene.sinks.fill_(-math.inf)
    scene.q.zero_()
    # one score stands out; the other 127 probabilities are equal and all round the same way
    scene.q[..., 0] = 1.0
    for rows in scene.kv:
        rows[:, 0] = 0.0
        rows[5, 0] = 1.0
    scene.window, scene.window_table = scene.paged(scene.kv, PAGE)
    others = np.exp(-SCALE)
    with_rounded = (1 + 127 * others) / (1 + 127 * to_bf16(others))
    want, got = scene.wanted(rounded=False)[..., 1:], numpy_of(scene.ours(which))[..., 1:]
    assert (got == to_bf16(want)).mean() > 0.97
    assert (got == to_bf16(want * with_rounded)).mean() < 0.9
