"""Kernels whose sizes are fixed are asked at those sizes, with no limit waived."""

from __future__ import annotations

import pytest

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import CATALOG, Where
from ascend_v4.operators.testing.cases import Case, all_cases
from ascend_v4.operators.testing.released import at_released_widths

KINDS = ("zero", "one", "odd", "edge", "poison")


def strict(chip: Chip) -> Target:
    return Target(device="sim", chip=chip, packages=simulator.packages(chip))


def released(chip: Chip) -> list[Case]:
    return [wide for case in all_cases(strict(chip)) for wide in at_released_widths(case)]


def quick(chip: Chip) -> list[Case]:
    return [
        case
        for case in released(chip)
        if {"one", "poison"} & set(case.recipe.name.split("-")) and case.left_out is None
    ]


@pytest.mark.parametrize("chip", Chip, ids=lambda chip: chip.value)
def test_every_adapter_is_asked_without_waiving_anything(chip):
    kinds: dict[str, set[str]] = {}
    for case in [*all_cases(strict(chip)), *released(chip)]:
        assert case.implementation is not None
        found = kinds.setdefault(f"{case.operator.name} by {case.implementation.provider}", set())
        words = set(case.recipe.name.split("-")) & set(KINDS[:3])
        if words - found and not case.slow and case.left_out is None:
            found |= words
    assert {name: found for name, found in kinds.items() if found != set(KINDS[:3])} == {}


@pytest.mark.parametrize("case", [case for chip in (Chip.A3, Chip.A950) for case in quick(chip)], ids=str)
def test_adapters_agree_with_references_at_released_widths(case):
    assert case.target.chip is not None
    simulator.install(case.target.chip)
    try:
        case.require_correct()
    finally:
        simulator.uninstall()


def test_released_widths_are_of_operators_that_the_model_calls():
    names = {case.operator.name for case in released(Chip.A950)}
    assert names <= {name for name, each in CATALOG.items() if each.where is Where.DEVICE}
    assert names >= {"sparse_attention", "compress", "select_entries", "write_kv"}
