"""Compressor adapters against the contract, step by step, on simulated chips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.operators import simulator
from ascend_v4.operators.contracts.batch import TokenBatch
from ascend_v4.operators.contracts.compressor import CompressorWeights, compress
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat
from ascend_v4.operators.contracts.rope import rope_frequencies
from tests.npu.expert_blocks import candidate
from tests.npu.paged_scenes import CPU, ENTRIES_PER_PAGE, STATE_PAGE, install, planned_by, prepared_by

HIDDEN, WIDTH, ROPE, EPS = 64, 128, 64, 1e-6
CANDIDATES = [
    (chip, provider)
    for chip in Chip
    for provider in ("vllm-ascend", "cann-recipes", "aten")
    if (chip, provider) != (Chip.A2, "cann-recipes")
]


@pytest.fixture(params=CANDIDATES, ids=lambda pair: f"{pair[0].value}-{pair[1]}")
def chosen(request):
    chip, provider = request.param
    install(chip)
    yield candidate(compress, provider, chip)
    simulator.uninstall()


@pytest.fixture(params=[4, 128], ids=["csa", "hca"])
def ratio(request):
    return request.param


def drawn_weights(ratio: int) -> CompressorWeights:
    half = WIDTH * (2 if ratio == 4 else 1)
    parts = [torch.randn(half, HIDDEN).mul(HIDDEN**-0.5).bfloat16() for _ in range(2)]
    return CompressorWeights(
        tuple(StoredWeight(part, None, WeightFormat.PLAIN) for part in parts),
        torch.randn(ratio, half),
        (1 + 0.1 * torch.randn(WIDTH)).bfloat16(),
    )


@dataclass
class States:
    """State pages of sequences; as in the engine, only those stay that a later step can read."""

    cache: Tensor
    table: Tensor
    ratio: int

    @staticmethod
    def for_positions(positions: int, sequences: int, ratio: int) -> States:
        pages = -(-positions // STATE_PAGE[ratio])
        table = torch.randperm(sequences * pages).view(sequences, pages) + 1
        width = WIDTH * (4 if ratio == 4 else 2)
        cache = torch.full((sequences * pages + 1, STATE_PAGE[ratio], width), torch.nan)
        return States(cache, table, ratio)

    def before(self, batch: TokenBatch) -> Tensor:
        """The table a step sees: 0 for pages that it neither reads nor leaves to the next one."""
        reach = self.ratio if self.ratio == 4 else 0
        table = self.table.clone()
        for row, start, end in zip(table, batch.starts, batch.ends, strict=True):
            oldest = max(0, start - start % self.ratio - reach) // STATE_PAGE[self.ratio]
            row[: min(oldest, len(row))] = 0
            row[-(-end // STATE_PAGE[self.ratio]) :] = 0
            kept_from = max(0, end - end % self.ratio - reach) // STATE_PAGE[self.ratio]
            held_until = -(-start // STATE_PAGE[self.ratio])
            row[held_until : max(held_until, kept_from)] = 0
        return table


def planned(batch: TokenBatch, ratio: int, state_table: Tensor, entry_table: Tensor) -> dict[str, Any]:
    return {
        "batch": batch,
        "ratio": ratio,
        "overlap": ratio == 4,
        "state_table": state_table,
        "state_page_tokens": STATE_PAGE[ratio],
        "entry_table": entry_table,
        "entries_per_page": ENTRIES_PER_PAGE[ratio],
        "frequencies": rope_frequencies(
            ROPE, theta=160000.0, factor=16.0, original_positions=256, beta_fast=32.0, beta_slow=1.0
        ),
    }


def entry_table(sequences: int) -> Tensor:
    return torch.randperm(sequences * 40).view(sequences, 40) + 1


Steps = list[tuple[tuple[int, ...], tuple[int, ...]]]
CHUNKINGS: dict[str, Steps] = {
    "whole": [((0, 0), (300, 9))],
    "chunks": [((0,), (7,)), ((7,), (130,)), ((137,), (1,)), ((138,), (120,))],
    "decode": [((126, 3), (1, 1)), ((127, 4), (1, 1)), ((128, 5), (1, 1))],
}


@pytest.mark.parametrize("name", CHUNKINGS)
def test_entries_and_states_agree_with_the_contract(chosen, ratio, name):
    steps = CHUNKINGS[name]
    sequences = len(steps[0][0])
    weights, entries = drawn_weights(ratio), entry_table(sequences)
    states = States.for_positions(320, sequences, ratio)
    if any(steps[0][0]):
        # what came before the first step
        states.cache[1:] = torch.randn_like(states.cache[1:])
    ours, theirs = states.cache, states.cache.clone()
    ours_weights = prepared_by(chosen, weights)
    for starts, counts in steps:
        batch = TokenBatch(starts=starts, counts=counts, device=CPU)
        x_TK = torch.randn(batch.num_tokens, HIDDEN).bfloat16()
        arguments = planned(batch, ratio, states.before(batch), entries)
        settings = {"overlap": ratio == 4, "eps": EPS, "rounded_once": True}
        plan = planned_by(compress, arguments)
        want = compress.reference(x_TK, weights, theirs, plan, **settings)
        our_plan = planned_by(chosen, arguments)
        got = chosen.call(x_TK, ours_weights, ours, our_plan, **settings)
        assert torch.equal(our_plan.entry_slots, plan.entry_slots)
        compress.tolerance.require(got, want)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_no_tokens_complete_nothing(chosen, ratio):
    batch = TokenBatch(starts=(), counts=(), device=CPU)
    states = States.for_positions(8, 1, ratio)
    none = torch.zeros(0, 1, dtype=torch.int64)
    plan = planned_by(chosen, planned(batch, ratio, none, none))
    weights = prepared_by(chosen, drawn_weights(ratio))
    x_TK = torch.empty(0, HIDDEN, dtype=torch.bfloat16)
    got = chosen.call(x_TK, weights, states.cache, plan, overlap=ratio == 4, eps=EPS, rounded_once=True)
    assert got.shape == (0, WIDTH)
    assert plan.entry_slots.shape == (0,)


def test_page_zero_keeps_its_bytes(chosen, ratio):
    batch = TokenBatch(starts=(0,), counts=(200,), device=CPU)
    states = States.for_positions(200, 1, ratio)
    weights = prepared_by(chosen, drawn_weights(ratio))
    table = torch.zeros_like(states.table)
    states.cache[0] = 7.0
    plan = planned_by(chosen, planned(batch, ratio, table, entry_table(1)))
    chosen.call(
        torch.randn(200, HIDDEN).bfloat16(),
        weights,
        states.cache,
        plan,
        overlap=ratio == 4,
        eps=EPS,
        rounded_once=True,
    )
    assert bool((states.cache[0] == 7.0).all())
    assert bool(states.cache[1:].isnan().all())


@pytest.mark.parametrize("provider", ["vllm-ascend", "cann-recipes"])
def test_a_captured_step_has_as_many_slots_as_sequences(provider):
    install(Chip.A3)
    implementation = candidate(compress, provider, Chip.A3)
    batch = TokenBatch(starts=(2, 7, 0), counts=(1, 1, 1), device=CPU)
    table = torch.tensor([[1], [2], [0]])
    entries = torch.tensor([[3], [4], [0]])
    plan = planned_by(implementation, {**planned(batch, 4, table, entries), "static_rows": 3})
    assert plan.entry_slots.tolist() == [4 * 32 + 1, -1, -1]
    weights = prepared_by(implementation, drawn_weights(4))
    got = implementation.call(
        torch.randn(3, HIDDEN).bfloat16(),
        weights,
        torch.zeros(3, 8, 512),
        plan,
        overlap=True,
        eps=EPS,
        rounded_once=True,
    )
    assert got.shape == (3, WIDTH)
    assert not bool(got[:1].isnan().any())
    simulator.uninstall()


NORM_DTYPES = [
    (Chip.A2, "vllm-ascend", torch.bfloat16),
    (Chip.A3, "vllm-ascend", torch.bfloat16),
    (Chip.A950, "vllm-ascend", torch.float32),
    (Chip.A3, "cann-recipes", torch.float32),
    (Chip.A950, "cann-recipes", torch.float32),
]


@pytest.mark.parametrize(("chip", "provider", "dtype"), NORM_DTYPES)
def test_the_norm_has_the_dtype_that_the_build_reads(chip, provider, dtype):
    prepared = prepared_by(candidate(compress, provider, chip), drawn_weights(4))
    assert prepared.norm.dtype is dtype
    assert prepared.value.shape == (2 * WIDTH, HIDDEN)
    assert prepared.value.dtype is prepared.gate.dtype is torch.bfloat16


def test_joined_projections_are_taken_apart():
    weights = drawn_weights(128)
    joined = torch.cat([part.codes for part in weights.projections])
    whole = CompressorWeights((StoredWeight(joined, None, WeightFormat.PLAIN),), weights.ape, weights.norm)
    implementation = candidate(compress, "vllm-ascend", Chip.A3)
    apart, split = prepared_by(implementation, weights), prepared_by(implementation, whole)
    assert torch.equal(apart.value, split.value)
    assert torch.equal(apart.gate, split.gate)


FLASH = {"hidden": 4096, "head_dim": 512, "index_head_dim": 128, "rope_dim": 64}
OUTSIDE = [("hidden", 512), ("hidden", 4100), ("hidden", 10752), ("head_dim", 256), ("index_head_dim", 64)]


@pytest.mark.parametrize(("size", "value"), [*OUTSIDE, ("rope_dim", 32)])
def test_sizes_just_outside_the_kernel_are_refused(size, value):
    target = Target(device="sim", chip=Chip.A3, packages=simulator.packages(Chip.A3))
    implementation = candidate(compress, "vllm-ascend", Chip.A3)
    assert implementation.refusal(target, FLASH) is None
    assert size in (implementation.refusal(target, {**FLASH, size: value}) or "")
