"""The compressor against pooling token by token, and against itself in any chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_v4.cache.layout import CSA_STATE, ENTRIES, HCA_STATE, PageGroup
from ascend_v4.cache.pages import SequencePages
from ascend_v4.operators.contracts.compressor import (
    CompressionPlan,
    CompressorWeights,
    compress,
    plan_compression,
    prepare_compressor,
)
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat
from ascend_v4.operators.contracts.rope import rope_frequencies
from tests.operators.number_formats import numpy_of
from tests.operators.paging import GROUPS, StepTables, advance, pools_for, take_step

HIDDEN, WIDTH, ROPE, EPS = 20, 24, 8, 1e-3
FREQUENCIES = rope_frequencies(
    ROPE, theta=1000.0, factor=4.0, original_positions=64, beta_fast=8.0, beta_slow=1.0
)


@dataclass(frozen=True)
class Kind:
    ratio: int
    overlap: bool
    group: PageGroup

    @property
    def channels(self) -> int:
        return 2 * WIDTH if self.overlap else WIDTH

    @property
    def entries_per_page(self) -> int:
        return ENTRIES.page_tokens // self.ratio


CSA = Kind(4, overlap=True, group=CSA_STATE)
HCA = Kind(128, overlap=False, group=HCA_STATE)
KINDS = pytest.mark.parametrize("kind", [CSA, HCA], ids=["csa", "hca"])


def make_weights(kind: Kind) -> CompressorWeights:
    def plain(rows: int) -> StoredWeight:
        return StoredWeight(torch.randn(rows, HIDDEN) * HIDDEN**-0.5, None, WeightFormat.PLAIN)

    return CompressorWeights(
        (plain(kind.channels), plain(kind.channels)),
        torch.randn(kind.ratio, kind.channels),
        torch.randn(WIDTH),
    )


def pooled(values: list[float], scores: list[float]) -> float:
    """One channel of one entry: a softmax over tokens."""
    peak = max(scores)
    weights = [math.exp(score - peak) for score in scores]
    return sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)


def token_by_token(x: torch.Tensor, weights: CompressorWeights, kind: Kind) -> np.ndarray:
    """Entries of one sequence: each appears when its last token is in; pooled, normed, rotated."""
    value_weight, score_weight = (numpy_of(part.codes) for part in weights.projections)
    ape, norm, frequencies = (numpy_of(part) for part in (weights.ape, weights.norm, FREQUENCIES.frequencies))
    values: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    entries: list[np.ndarray] = []
    for position, row in enumerate(numpy_of(x)):
        values.append(value_weight @ row)
        scores.append(score_weight @ row + ape[position % kind.ratio])
        if (position + 1) % kind.ratio:
            continue
        first = position + 1 - kind.ratio
        own = [(token, WIDTH if kind.overlap else 0) for token in range(first, position + 1)]
        before = [(token, 0) for token in range(max(0, first - kind.ratio), first)] if kind.overlap else []
        members = before + own
        entry = np.array(
            [
                pooled(
                    [values[token][half + channel] for token, half in members],
                    [scores[token][half + channel] for token, half in members],
                )
                for channel in range(WIDTH)
            ]
        )
        entry = entry / math.sqrt((entry**2).mean() + EPS) * norm
        for index, frequency in enumerate(frequencies):
            angle, at = first * frequency, WIDTH - ROPE + 2 * index
            even, odd = entry[at], entry[at + 1]
            entry[at] = even * math.cos(angle) - odd * math.sin(angle)
            entry[at + 1] = even * math.sin(angle) + odd * math.cos(angle)
        entries.append(entry)
    return np.array(entries).reshape(-1, WIDTH)


def plan_for(step: StepTables, kind: Kind) -> CompressionPlan:
    return plan_compression(
        step.batch,
        ratio=kind.ratio,
        overlap=kind.overlap,
        state_table=step.tables[kind.group],
        state_page_tokens=kind.group.page_tokens,
        entry_table=step.tables[ENTRIES],
        entries_per_page=kind.entries_per_page,
        frequencies=FREQUENCIES,
    )


class Driver:
    """Several sequences through steps of the compressor, their entries collected in a paged cache."""

    def __init__(self, kind: Kind, weights: CompressorWeights, *, tokens: int, sequences: int) -> None:
        pools = pools_for(tokens=tokens, sequences=sequences, step_tokens=tokens)
        self.kind, self.weights = kind, weights
        self.sequences = [SequencePages(pools) for _ in range(sequences)]
        self.state = torch.full(
            (pools[kind.group].num_pages, kind.group.page_tokens, 2 * kind.channels), torch.nan
        )
        self.cache = torch.full((pools[ENTRIES].num_pages, kind.entries_per_page, WIDTH), torch.nan)

    def step(self, chunks: dict[int, torch.Tensor]) -> CompressionPlan:
        """New tokens of some sequences, by their number."""
        chosen, counts = [self.sequences[index] for index in chunks], [len(part) for part in chunks.values()]
        step = take_step(chosen, counts)
        plan = plan_for(step, self.kind)
        x = torch.cat(list(chunks.values()))
        entries = compress(
            x,
            self.weights,
            self.state,
            plan,
            overlap=self.kind.overlap,
            eps=EPS,
            rounded_once=False,
        )
        self.cache.view(-1, WIDTH)[plan.entry_slots] = entries.float()
        advance(chosen, counts)
        return plan

    def entries(self, index: int) -> torch.Tensor:
        """Complete entries of a sequence, in order."""
        pages = self.sequences[index]
        numbers = range(pages.num_tokens // self.kind.ratio)
        per_page = self.kind.entries_per_page
        table = pages.tables[ENTRIES]
        rows = [table[number // per_page] * per_page + number % per_page for number in numbers]
        return self.cache.view(-1, WIDTH)[rows]


@KINDS
@pytest.mark.parametrize("tokens", [3, 4, 7, 8, 127, 128, 129, 300])
def test_entries_equal_pooling_token_by_token(kind, tokens):
    weights, x = make_weights(kind), torch.randn(tokens, HIDDEN)
    driver = Driver(kind, weights, tokens=tokens, sequences=1)
    driver.step({0: x})
    want = token_by_token(x, weights, kind)
    assert len(want) == tokens // kind.ratio
    np.testing.assert_allclose(numpy_of(driver.entries(0)), want, atol=2e-5)


@KINDS
def test_one_token_at_a_time_gives_the_same_entries(kind):
    weights, x = make_weights(kind), torch.randn(260, HIDDEN)
    driver = Driver(kind, weights, tokens=260, sequences=1)
    for row in x.split(1):
        driver.step({0: row})
    np.testing.assert_allclose(numpy_of(driver.entries(0)), token_by_token(x, weights, kind), atol=2e-5)


@KINDS
def test_the_joined_projection_gives_the_same_entries(kind):
    weights, x = make_weights(kind), torch.randn(130, HIDDEN)
    driver = Driver(kind, prepare_compressor(weights, copy=True), tokens=130, sequences=1)
    driver.step({0: x})
    np.testing.assert_allclose(numpy_of(driver.entries(0)), token_by_token(x, weights, kind), atol=2e-5)


def test_the_first_overlapping_entry_pools_four_tokens_and_the_second_eight():
    weights = make_weights(CSA)
    driver = Driver(CSA, weights, tokens=8, sequences=1)
    plan = driver.step({0: torch.randn(8, HIDDEN)})
    empty = 8 + len(plan.old_slots_M)
    assert plan.member_NG.tolist() == [[empty] * 4 + [0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_the_bias_belongs_to_the_position_within_the_run():
    weights, x = make_weights(CSA), torch.randn(6, HIDDEN)
    driver = Driver(CSA, weights, tokens=6, sequences=1)
    driver.step({0: x[:3]})
    assert driver.step({0: x[3:]}).ape_rows_T.tolist() == [3, 0, 1]


CHUNKINGS = st.lists(st.integers(1, 150), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) <= 400)


@KINDS
@given(sizes=CHUNKINGS)
@settings(max_examples=30)
def test_any_chunking_equals_one_pass(kind, sizes):
    torch.manual_seed(sum(sizes))
    weights, x = make_weights(kind), torch.randn(sum(sizes), HIDDEN)
    whole = Driver(kind, weights, tokens=len(x), sequences=1)
    whole.step({0: x})
    chunked = Driver(kind, weights, tokens=len(x), sequences=1)
    for part in x.split(sizes):
        chunked.step({0: part})
    # the projections of one row and of many may sum in another order
    compress.tolerance.require(chunked.entries(0), whole.entries(0))


@KINDS
@given(data=st.data())
@settings(max_examples=15)
def test_sequences_in_one_batch_equal_each_alone(kind, data):
    plans = data.draw(st.lists(CHUNKINGS, min_size=2, max_size=3))
    torch.manual_seed(sum(map(sum, plans)))
    weights = make_weights(kind)
    inputs = [torch.randn(sum(sizes), HIDDEN) for sizes in plans]
    together = Driver(kind, weights, tokens=sum(map(sum, plans)), sequences=len(plans))
    for turn in range(max(map(len, plans))):
        parts = {i: inputs[i].split(sizes)[turn] for i, sizes in enumerate(plans) if turn < len(sizes)}
        together.step(parts)
    for index, x in enumerate(inputs):
        alone = Driver(kind, weights, tokens=len(x), sequences=1)
        alone.step({0: x})
        compress.tolerance.require(together.entries(index), alone.entries(0))


@KINDS
@given(sizes=CHUNKINGS)
@settings(max_examples=30)
def test_state_written_and_state_read_never_share_a_row(kind, sizes):
    pools = pools_for(tokens=2 * sum(sizes), sequences=2, step_tokens=2 * max(sizes))
    sequences = [SequencePages(pools), SequencePages(pools)]
    for size in sizes:
        counts = (size, max(1, size // 3))
        plan = plan_for(take_step(sequences, counts), kind)
        written, old = plan.written_slots.tolist(), plan.old_slots_M.tolist()
        assert len(set(written)) == len(written)
        assert not set(written) & set(old)
        assert min(written + old, default=kind.group.page_tokens) >= kind.group.page_tokens
        assert len(set(plan.entry_slots.tolist())) == len(plan.entry_slots)
        advance(sequences, counts)


@KINDS
def test_state_that_no_later_step_reads_is_not_written(kind):
    driver = Driver(kind, make_weights(kind), tokens=1000, sequences=1)
    driver.step({0: torch.randn(1000, HIDDEN)})
    assert torch.isnan(driver.state[0]).all()
    kept = int((~torch.isnan(driver.state[..., 0])).sum())
    assert kind.group.retain_tokens <= kept <= kind.group.live_pages * kind.group.page_tokens


def test_all_groups_of_the_layout_are_driven():
    assert {CSA.group, HCA.group} < set(GROUPS)
