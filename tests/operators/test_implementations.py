"""Operator x implementation x inputs: everything the CPU backend can choose agrees with the reference."""

from __future__ import annotations

import pytest

from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.testing.cases import all_cases, all_recipes

CASES = all_cases("cpu")
EVERY_OPERATOR = {"zero", "one", "odd", "sliced", "strided", "largest"}
WITH_BATCHES = {"ragged", "poison"}
OFFLINE = {"transcode", "transcode_exact"}
"""Conversion of checkpoints, which no model calls: tests/repack compares its implementations."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case.slow else ()) for case in CASES], ids=str
)
def test_implementation_agrees_with_reference(case):
    if case.unusable is not None:
        pytest.skip(case.unusable)
    got = case.run_implementation()
    want = case.run_reference_on_cpu()
    case.require_agreement(got, want)
    got.require_inputs_untouched()


@pytest.mark.parametrize("name", [name for name, each in CATALOG.items() if each.family not in OFFLINE])
def test_every_operator_has_the_cases_that_all_must_have(name):
    recipes = {recipe.name for recipe in all_recipes()[name]}
    wanted = EVERY_OPERATOR | (WITH_BATCHES if "batch" in str(CATALOG[name].plan) else set())
    assert wanted <= recipes, wanted - recipes
    assert any(recipe.startswith("edge") for recipe in recipes)
