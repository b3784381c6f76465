"""Attention adapters against the contract, on simulated chips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic, Target
from ascend_v4.errors import SimulatorError
from ascend_v4.operators import simulator
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import TokenBatch
from ascend_v4.operators.npu.rows import kv_storage
from tests.npu.expert_blocks import candidate
from tests.npu.paged_scenes import (
    BATCHES,
    CPU,
    ENTRIES_PER_PAGE,
    HEADS,
    KV_FORMAT,
    NOPE,
    WIDTH,
    WINDOW,
    WINDOW_PAGE,
    Paged,
    attention_plan_arguments,
    batch_named,
    install,
    laid_out,
    planned_by,
    selection,
)

KINDS = {"swa": (0, 0), "csa": (4, 12), "hca": (128, 0)}
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
    yield chip, candidate(sparse_attention, provider, chip)
    simulator.uninstall()


class Scene:
    """Key-values of every position and entry of a batch, and queries."""

    def __init__(self, batch: TokenBatch, kind: str, chip: Chip) -> None:
        self.batch, (self.ratio, self.topk) = batch, KINDS[kind]
        self.storage = kv_storage(width=WIDTH, nope_dim=NOPE, format=KV_FORMAT[chip], dtype=torch.bfloat16)
        freed = tuple(max(0, start - WINDOW + 1) // WINDOW_PAGE for start in batch.starts)
        rows = [torch.randn(end, WIDTH).bfloat16() for end in batch.ends]
        self.window = laid_out(rows, WINDOW_PAGE, drop=freed)
        self.entries: Paged | None = None
        if self.ratio:
            rows = [torch.randn(end // self.ratio, WIDTH).bfloat16() for end in batch.ends]
            self.entries = laid_out(rows, ENTRIES_PER_PAGE[self.ratio])
        self.selected = selection(batch, ratio=self.ratio, topk=self.topk) if self.topk else None
        self.q_THD = torch.randn(batch.num_tokens, HEADS, WIDTH).bfloat16()
        self.sinks_H = torch.randn(HEADS)

    def planned(self) -> dict[str, Any]:
        return attention_plan_arguments(
            self.batch, self.window, self.entries, ratio=self.ratio, topk=self.topk
        )

    def arguments(self, *, read_back: bool) -> dict[str, Any]:
        def cache(pages: Paged | None) -> torch.Tensor | None:
            if pages is None:
                return None
            return pages.read_back(self.storage) if read_back else pages.stored(self.storage)

        return {
            "q_THD": self.q_THD,
            "window_cache_CSD": cache(self.window),
            "window_table_BP": self.window.table,
            "compressed_cache_CSD": cache(self.entries),
            "compressed_table_BP": None if self.entries is None else self.entries.table,
            "selected_TK": self.selected,
            "sinks_H": self.sinks_H,
            "batch": self.batch,
            "ratio": self.ratio,
            "window_tokens": WINDOW,
            "scale": WIDTH**-0.5,
            "sink_in_peak": True,
        }

    def wanted(self) -> torch.Tensor:
        plan = planned_by(sparse_attention, self.planned())
        return sparse_attention.reference(**self.arguments(read_back=True), plan=plan)

    def computed(self, implementation) -> torch.Tensor:
        plan = planned_by(implementation, self.planned())
        return implementation.call(**self.arguments(read_back=False), plan=plan)

    def require_agreement(self, implementation) -> None:
        sparse_attention.tolerance.require(self.computed(implementation), self.wanted())


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_agrees_with_the_contract(chosen, kind, name):
    chip, implementation = chosen
    Scene(batch_named(name), kind, chip).require_agreement(implementation)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_agrees_with_the_chips_own_roundings(chosen, kind):
    chip, implementation = chosen
    install(chip, Arithmetic.CHIP)
    Scene(batch_named("ragged"), kind, chip).require_agreement(implementation)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_no_rows(chosen, kind):
    chip, implementation = chosen
    scene = Scene(TokenBatch(starts=(), counts=(), device=CPU), kind, chip)
    assert scene.computed(implementation).shape == (0, HEADS, WIDTH)


def test_entries_after_the_visible_ones_are_not_read(chosen):
    chip, implementation = chosen
    scene = Scene(batch_named("ragged"), "csa", chip)
    assert scene.selected is not None
    want = scene.wanted()
    scene.selected[scene.selected < 0] = 1 << 30
    sparse_attention.tolerance.require(scene.computed(implementation), want)


def test_queries_may_have_gaps(chosen):
    chip, implementation = chosen
    scene = Scene(batch_named("ragged"), "hca", chip)
    wide = torch.randn(scene.batch.num_tokens, HEADS, 2 * WIDTH).bfloat16()
    wide[..., :WIDTH] = scene.q_THD
    scene.q_THD = wide[..., :WIDTH]
    scene.require_agreement(implementation)


def test_the_first_entry_is_seen_by_the_token_that_completes_it(chosen):
    chip, implementation = chosen
    batch = TokenBatch(starts=(2, 126), counts=(2, 2), device=CPU)
    for kind in ("csa", "hca"):
        Scene(batch, kind, chip).require_agreement(implementation)


def test_metadata_of_another_step_is_refused():
    install(Chip.A3)
    implementation = candidate(sparse_attention, "vllm-ascend", Chip.A3)
    scene = Scene(batch_named("ragged"), "csa", Chip.A3)
    stale = Scene(TokenBatch(starts=(0, 130, 3, 254), counts=(7, 5, 140, 1), device=CPU), "csa", Chip.A3)
    plan = planned_by(implementation, scene.planned())
    old = planned_by(implementation, stale.planned())
    mixed = type(plan)(**{**vars(plan), "metadata": old.metadata})
    with pytest.raises(SimulatorError):
        implementation.call(**scene.arguments(read_back=False), plan=mixed)
    simulator.uninstall()


FLASH = {"heads": 64, "head_dim": 512, "topk": 512, "window_block": 128, "csa_block": 32, "hca_block": 16}
FLASH |= {"rope_dim": 64, "nope_dim": 448}
OUTSIDE = [
    (Chip.A3, "heads", 66),
    (Chip.A3, "head_dim", 511),
    (Chip.A3, "topk", 513),
    (Chip.A3, "hca_block", 8),
    (Chip.A3, "csa_block", 40),
    (Chip.A3, "window_block", 1040),
    (Chip.A950, "heads", 32),
    (Chip.A950, "heads", 96),
    (Chip.A950, "topk", 256),
    (Chip.A950, "head_dim", 256),
    (Chip.A950, "rope_dim", 32),
    (Chip.A950, "nope_dim", 416),
]


@pytest.mark.parametrize(("chip", "size", "value"), OUTSIDE)
def test_sizes_just_outside_the_kernels_are_refused(chip, size, value):
    target = Target(device="sim", chip=chip, packages=simulator.packages(chip))
    implementation = candidate(sparse_attention, "vllm-ascend", chip)
    assert implementation.refusal(target, FLASH) is None
    assert size in (implementation.refusal(target, {**FLASH, size: value}) or "")


def test_only_gathering_is_called_too_slow():
    slow = {each.provider for each in sparse_attention.implementations if each.too_slow}
    assert slow & {"vllm-ascend", "cann-recipes", "aten"} == {"aten"}
