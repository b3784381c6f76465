"""Operator x Ascend implementation x inputs: every adapter agrees with the reference, on simulated chips.

Sizes that kernels fix are waived, arithmetic is ideal: what is compared is layout and meaning. What the chips
round otherwise is compared in `test_chip_arithmetic_stays_within_each_tolerance`.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic, Target
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import CATALOG, WAIVABLE, Where
from ascend_v4.operators.testing.cases import Case, all_cases

KNOWN_REASONS = (
    r"^\w+ is \d+, it takes \w+ (in|a multiple of|at most|\d+ to) ",
    r"^\w+ stores [A-Z0-9_]+, not [A-Z0-9_]+$",
    r"^\w+ does not multiply [A-Z0-9_]+ by [A-Z0-9_]+$",
    r"^\d+ channels are not whole groups of 64$",
    r"^kernels start their running maximum at the sink",
    r"^\w+ rounds probabilities against a peak that the sink takes part in$",
    r"^a cache of this size is not packed for a test$",
    r"^\w+ rounds norms once, not at each step$",
)


def target_of(chip: Chip) -> Target:
    return Target(
        device="sim",
        chip=chip,
        waived=frozenset(WAIVABLE),
        arithmetic=Arithmetic.IDEAL,
        packages=simulator.packages(chip),
    )


@cache
def cases_of(chip: Chip) -> tuple[Case, ...]:
    return tuple(all_cases(target_of(chip)))


@cache
def left_out(chip: Chip) -> dict[str, str]:
    reasons = ((str(case), case.left_out) for case in cases_of(chip) if not case.slow)
    return {name: reason for name, reason in reasons if reason is not None}


@cache
def asked(*, slow: bool) -> list[Case]:
    return [
        case
        for chip in Chip
        for case in cases_of(chip)
        if case.slow is slow and str(case) not in left_out(chip)
    ]


@pytest.fixture
def run_on_chip():
    """Runs a case on its chip; the process is as it was afterwards."""

    def run(case: Case, arithmetic: Arithmetic) -> None:
        assert case.target.chip is not None
        simulator.install(case.target.chip, waived=case.target.waived, arithmetic=arithmetic)
        try:
            case.require_correct()
        finally:
            simulator.uninstall()

    return run


@pytest.mark.parametrize("case", asked(slow=False), ids=str)
def test_adapter_agrees_with_reference(case, run_on_chip):
    run_on_chip(case, Arithmetic.IDEAL)


@pytest.mark.slow
@pytest.mark.parametrize("case", asked(slow=True), ids=str)
def test_adapter_agrees_with_reference_at_the_largest_sizes(case, run_on_chip):
    if case.left_out is not None:
        pytest.skip(case.left_out)
    run_on_chip(case, Arithmetic.IDEAL)


def rounded_as_on_the_chip() -> list[Case]:
    """A2 rounds as A3 does."""
    return [
        case
        for case in asked(slow=False)
        if case.recipe.name.startswith("vendor-") and case.target.chip is not Chip.A2
    ]


@pytest.mark.parametrize("case", rounded_as_on_the_chip(), ids=str)
def test_chip_arithmetic_stays_within_each_tolerance(case, run_on_chip):
    run_on_chip(case, Arithmetic.CHIP)


@pytest.mark.parametrize("chip", Chip, ids=lambda chip: chip.value)
def test_every_operator_of_the_model_has_adapters_that_are_asked(chip):
    asked_now = {case.operator.name for case in cases_of(chip) if str(case) not in left_out(chip)}
    on_device = {name for name, each in CATALOG.items() if each.where is Where.DEVICE}
    assert asked_now == on_device


@pytest.mark.parametrize("chip", Chip, ids=lambda chip: chip.value)
def test_every_adapter_is_asked_about_no_tokens_one_and_several(chip):
    kinds: dict[str, set[str]] = {}
    for case in cases_of(chip):
        assert case.implementation is not None
        names = kinds.setdefault(f"{case.operator.name} by {case.implementation.provider}", set())
        if str(case) not in left_out(chip):
            names |= {kind for kind in ("zero", "one", "odd") if kind in case.recipe.name.split("-")}
    assert {name: kinds_of for name, kinds_of in kinds.items() if len(kinds_of) < 3} == {}


@pytest.mark.parametrize("chip", Chip, ids=lambda chip: chip.value)
def test_cases_are_left_out_for_known_reasons_only(chip, record_property):
    counts = Counter(reason.split(" (")[0] for reason in left_out(chip).values())
    for reason, count in counts.most_common():
        record_property(reason, count)
    known = {reason for reason in counts if any(re.search(each, reason) for each in KNOWN_REASONS)}
    assert known == counts.keys()
    assert sum(counts.values()) < 0.5 * sum(not case.slow for case in cases_of(chip)), counts
