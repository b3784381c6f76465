"""Layouts that writer and reader would get wrong alike, looked at byte by byte; and results without slack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic, Target
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import TokenBatch
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.moe import routed_experts
from ascend_v4.operators.contracts.quantize import WeightFormat
from ascend_v4.operators.npu.index_keys import int8_pages
from ascend_v4.operators.testing.cases import Case, all_cases
from tests.npu.expert_blocks import CPU, candidate, drawn_block
from tests.npu.paged_scenes import planned_by


@pytest.fixture
def on_chip():
    """Simulates a chip, ideal and waived, until the test ends."""

    def put(chip: Chip) -> None:
        simulator.install(chip, waived=frozenset(WAIVABLE), arithmetic=Arithmetic.IDEAL)

    yield put
    simulator.uninstall()


def test_codes_of_all_pages_lie_in_front_of_all_scales():
    cache = torch.randint(256, (3, 16, 130), dtype=torch.uint8)
    codes, scales = int8_pages(cache)
    assert torch.equal(codes.view(torch.uint8).flatten(), cache.flatten()[: 3 * 16 * 128])
    assert torch.equal(scales.view(torch.uint8).flatten(), cache.flatten()[3 * 16 * 128 :])


@pytest.mark.parametrize("format", [WeightFormat.MXFP8, WeightFormat.FP4_GROUP], ids=lambda each: each.name)
@pytest.mark.parametrize("provider", ["vllm-ascend", "torch_npu"])
def test_experts_of_950_round_where_the_contract_does(on_chip, provider, format):
    on_chip(Chip.A950)
    block = drawn_block("rounding", format, tokens=33)
    got, want = block.run(candidate(routed_experts, provider, Chip.A950)), block.reference()
    assert (got - want).square().mean().sqrt() <= 2.0**-9 * want.square().mean().sqrt()


def compressions() -> list[Case]:
    """Sequences that start and end within entries, for every compressor of A3."""
    target = Target(
        device="sim",
        chip=Chip.A3,
        waived=frozenset(WAIVABLE),
        arithmetic=Arithmetic.IDEAL,
        packages=simulator.packages(Chip.A3),
    )
    cases = all_cases(target, operators=("compress",))
    return [case for case in cases if case.recipe.name.startswith("vendor-ragged")]


@pytest.mark.parametrize("case", compressions(), ids=str)
def test_entries_are_off_by_a_rounding_on_average(on_chip, case):
    """Single entries may be off by more, after a norm of few channels; a wrong angle or bias shows in all."""
    on_chip(Chip.A3)
    case.require_correct()


class MetadataCalls(TorchDispatchMode):
    """Notes what metadata operators are told, by the names of their schemas."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[dict[str, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.endswith("_metadata"):
            names = [argument.name for argument in func._schema.arguments]
            self.told.append({**dict(zip(names, args, strict=False)), **kwargs})
        return func(*args, **kwargs)


TABLE = torch.ones(2, 1, dtype=torch.int64)
LAYOUT_OF_ATTENTION: dict[str, Any] = {
    "window_tokens": 128,
    "window_table": TABLE,
    "window_page_tokens": 128,
    "compressed_table": TABLE,
    "entries_per_page": 32,
}
LAYOUT_OF_INDEXER: dict[str, Any] = {"key_table": TABLE, "keys_per_page": 32}


@pytest.mark.parametrize("chip", [Chip.A3, Chip.A950], ids=lambda chip: chip.value)
@pytest.mark.parametrize("provider", ["vllm-ascend", "cann-recipes"])
@pytest.mark.parametrize(
    "asked",
    [
        (sparse_attention, LAYOUT_OF_ATTENTION, "max_seqlen_kv"),
        (select_entries, LAYOUT_OF_INDEXER, "max_seqlen_k"),
    ],
    ids=["attention", "indexer"],
)
def test_metadata_is_told_the_most_new_tokens_and_the_longest_sequence(on_chip, chip, provider, asked):
    """A work division for shorter sequences leaves the ends of longer ones out."""
    declared, layout, longest = asked
    on_chip(chip)
    batch = TokenBatch(starts=(90, 3), counts=(2, 5), device=CPU)
    sizes = {"ratio": 4, "topk": 12, "num_heads": 16, "head_dim": 128}
    with MetadataCalls() as calls:
        planned_by(candidate(declared, provider, chip), {"batch": batch, **sizes, **layout})
    (told,) = calls.told
    assert (told["max_seqlen_q"], told[longest]) == (5, 92)
