"""Indexer adapters against the contract's scores, on simulated chips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic, Target
from ascend_v4.errors import SimulatorError
from ascend_v4.operators import simulator
from ascend_v4.operators.contracts.batch import TokenBatch, rows_of
from ascend_v4.operators.contracts.indexer import index_scores, select_entries
from ascend_v4.operators.contracts.quantize import quantize_index
from ascend_v4.operators.npu.index_keys import key_storage
from ascend_v4.operators.npu.indexer import weights_for_float16
from tests.npu.expert_blocks import candidate
from tests.npu.paged_scenes import BATCHES, CPU, INDEX_FORMAT, batch_named, install, laid_out, planned_by

HEADS, WIDTH, RATIO, TOPK, PER_PAGE = 16, 128, 4, 12, 32
CANDIDATES = [
    (chip, provider)
    for chip in Chip
    for provider in ("vllm-ascend", "cann-recipes", "torch_npu")
    if (chip, provider) != (Chip.A2, "cann-recipes")
]
BAND = {Arithmetic.IDEAL: 2.0**-6, Arithmetic.CHIP: 2.0**-5}
"""Scores that may change places, as a share of a token's largest score."""


@pytest.fixture(params=CANDIDATES, ids=lambda pair: f"{pair[0].value}-{pair[1]}")
def chosen(request):
    chip, provider = request.param
    install(chip)
    yield chip, candidate(select_entries, provider, chip)
    simulator.uninstall()


class Scene:
    """Keys of every entry of a batch, and queries with the weights of their heads."""

    def __init__(self, batch: TokenBatch, chip: Chip, *, weight: float = 0.01) -> None:
        self.batch, self.format = batch, INDEX_FORMAT[chip]
        self.storage = key_storage(width=WIDTH, format=self.format, dtype=torch.bfloat16)
        rows = [torch.randn(end // RATIO, WIDTH) for end in batch.ends]
        self.keys = laid_out(rows, PER_PAGE)
        self.q_THD = torch.randn(batch.num_tokens, HEADS, WIDTH).bfloat16()
        self.weights_TH = (torch.randn(batch.num_tokens, HEADS) * weight).bfloat16()

    def planned(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "ratio": RATIO,
            "topk": TOPK,
            "key_table": self.keys.table,
            "keys_per_page": PER_PAGE,
            "num_heads": HEADS,
            "head_dim": WIDTH,
        }

    def arguments(self) -> dict[str, Any]:
        return {
            "q_THD": self.q_THD,
            "weights_TH": self.weights_TH,
            "key_cache_CSD": self.keys.stored(self.storage),
            "key_table_BP": self.keys.table,
            "batch": self.batch,
            "ratio": RATIO,
            "topk": TOPK,
            "format": self.format,
        }

    def computed(self, implementation) -> torch.Tensor:
        return implementation.call(**self.arguments(), plan=planned_by(implementation, self.planned()))

    def scores(self) -> list[torch.Tensor]:
        """Float32 scores of each token's visible entries, by the contract."""
        quantised = quantize_index.reference(self.q_THD.flatten(0, 1), format=self.format)
        q_THD = quantised.view_as(self.q_THD).float()
        flat = self.keys.read_back(self.storage).view(-1, WIDTH)
        found: list[torch.Tensor] = []
        for index, (first, count, start) in enumerate(self.batch.spans):
            entries = torch.arange((start + count) // RATIO)
            rows = rows_of(self.keys.table, torch.full_like(entries, index), entries, per_page=PER_PAGE)
            tokens = slice(first, first + count)
            scores_TN = index_scores(q_THD[tokens], self.weights_TH[tokens].float(), flat[rows])
            visible = [(start + token + 1) // RATIO for token in range(count)]
            found += [row[:number] for row, number in zip(scores_TN, visible, strict=True)]
        return found

    def require_best(self, selected: torch.Tensor, *, band: float) -> None:
        """Distinct visible entries, none worse by more than the band than one that was left out, then -1."""
        assert selected.dtype is torch.int32
        assert selected.shape == (self.batch.num_tokens, TOPK)
        for row, scores in zip(selected.tolist(), self.scores(), strict=True):
            kept = min(TOPK, len(scores))
            assert row[kept:] == [-1] * (TOPK - kept)
            assert len(set(row[:kept])) == kept
            assert all(0 <= entry < len(scores) for entry in row[:kept])
            left = sorted(set(range(len(scores))) - set(row[:kept]))
            if left and kept:
                slack = band * scores.abs().max()
                assert scores[left].max() <= scores[row[:kept]].min() + slack


@pytest.mark.parametrize("name", BATCHES)
def test_the_best_visible_entries_are_selected(chosen, name):
    chip, implementation = chosen
    scene = Scene(batch_named(name), chip)
    scene.require_best(scene.computed(implementation), band=BAND[Arithmetic.IDEAL])


def test_the_chips_own_roundings_change_near_ties_only(chosen):
    chip, implementation = chosen
    install(chip, Arithmetic.CHIP)
    scene = Scene(batch_named("long"), chip)
    scene.require_best(scene.computed(implementation), band=BAND[Arithmetic.CHIP])


@pytest.mark.parametrize("weight", [1e-6, 300.0])
def test_small_and_large_weights_survive_float16(chosen, weight):
    chip, implementation = chosen
    install(chip, Arithmetic.CHIP)
    scene = Scene(batch_named("long"), chip, weight=weight)
    scene.require_best(scene.computed(implementation), band=BAND[Arithmetic.CHIP])


def test_no_tokens_give_no_rows(chosen):
    chip, implementation = chosen
    scene = Scene(TokenBatch(starts=(), counts=(), device=CPU), chip)
    assert scene.computed(implementation).shape == (0, TOPK)


def test_a_query_of_zeros_still_gets_distinct_entries(chosen):
    chip, implementation = chosen
    scene = Scene(TokenBatch(starts=(200,), counts=(2,), device=CPU), chip)
    scene.q_THD[0] = 0.0
    got = scene.computed(implementation)
    assert len(set(got[0].tolist())) == TOPK
    assert 0 <= int(got[0].min()) <= int(got[0].max()) < 50


@pytest.mark.parametrize("provider", ["vllm-ascend", "cann-recipes"])
def test_metadata_of_another_step_is_refused(provider):
    install(Chip.A3)
    implementation = candidate(select_entries, provider, Chip.A3)
    scene = Scene(TokenBatch(starts=(40, 9), counts=(1, 1), device=CPU), Chip.A3)
    stale = Scene(TokenBatch(starts=(39, 8), counts=(1, 1), device=CPU), Chip.A3)
    plan, old = (planned_by(implementation, each.planned()) for each in (scene, stale))
    mixed = type(plan)(**{**vars(plan), "metadata": old.metadata})
    with pytest.raises(SimulatorError):
        implementation.call(**scene.arguments(), plan=mixed)
    simulator.uninstall()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4])
def test_weights_keep_their_ratios_and_fill_the_range_of_float16(size):
    weights_TH = torch.tensor([[1.0, -0.5, 0.25], [3.0, 0.0, 2.0**-8]]) * size
    scale_TH = torch.tensor([[0.5, 0.5, 0.5], [40.0, 3.0, 0.01]])
    got = weights_for_float16(weights_TH, scale_TH).float()
    product = (got * scale_TH).abs().amax(-1)
    assert bool((torch.maximum(got.abs().amax(-1), product) < 2.0**15).all())
    assert bool((torch.maximum(got.abs().amax(-1), product) >= 2.0**14).all())
    torch.testing.assert_close(got / got[:, :1], weights_TH / weights_TH[:, :1], rtol=2**-10, atol=0.0)


def test_weights_of_zero_stay_zero():
    got = weights_for_float16(torch.zeros(2, 3), torch.ones(2, 3))
    assert bool((got == 0).all())


FLASH = {"index_heads": 64, "index_head_dim": 128, "topk": 512, "csa_block": 32}
OUTSIDE = [("index_heads", 32), ("index_head_dim", 64), ("topk", 2049), ("csa_block", 8)]


@pytest.mark.parametrize(("size", "value"), OUTSIDE)
def test_sizes_just_outside_the_kernel_are_refused(size, value):
    target = Target(device="sim", chip=Chip.A3, packages=simulator.packages(Chip.A3))
    implementation = candidate(select_entries, "vllm-ascend", Chip.A3)
    assert implementation.refusal(target, FLASH) is None
    assert size in (implementation.refusal(target, {**FLASH, size: value}) or "")
