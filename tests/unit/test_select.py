"""Choosing implementations once: order, wishes, refusals with reasons."""

from __future__ import annotations

from typing import Any

import pytest

from ascend_v4.errors import ConfigError, NoImplementationError
from ascend_v4.operators import contract
from ascend_v4.operators import select as select_module
from ascend_v4.operators.contract import BITWISE, CATALOG, Operator, implements
from ascend_v4.operators.contracts.linear import linear, prepare_linear
from ascend_v4.operators.contracts.norm import prepare_norm, rms_norm
from ascend_v4.operators.contracts.rope import plan_rope, rotate
from ascend_v4.operators.select import REFERENCE, OperatorTable, load_backend, select


def double(x):
    return x * 2


def add(x):
    return x + x


def double_slowly(x):
    return sum([x, x])


def declared(name: str) -> Operator[..., Any]:
    return Operator(
        name=name,
        family="tests",
        reference=double,
        source="a test",
        tolerance=BITWISE,
        specs={},
        mutates=(),
        plan=None,
        prepare=None,
    )


@pytest.fixture
def operators(monkeypatch):
    """Two operators alone in the catalogue: `first` with three CPU candidates, `second` with none."""
    first, second = declared("first"), declared("second")
    implements(first, backend="cpu", provider="broken", unusable=lambda: "it is broken")(double)
    implements(first, backend="npu", provider="elsewhere")(double)
    implements(first, backend="cpu", provider="fast")(add)
    implements(first, backend="cpu", provider="slow")(double_slowly)
    catalog = {"first": first, "second": second}
    monkeypatch.setattr(contract, "CATALOG", catalog)
    monkeypatch.setattr(select_module, "CATALOG", catalog)
    monkeypatch.setattr(select_module, "load_backend", lambda backend: None)
    return first, second


def test_the_first_usable_implementation_of_the_backend_is_chosen(operators):
    choice = select("cpu").choices["first"]
    assert (choice.backend, choice.provider) == ("cpu", "fast")
    assert choice.refused == ("broken: it is broken",)
    assert select("npu", allow_reference=True).choices["first"].provider == "elsewhere"


def test_the_reference_is_the_last_resort(operators):
    choice = select("cpu").choices["second"]
    assert (choice.backend, choice.provider, choice.call) == (REFERENCE, REFERENCE, double)


def test_a_named_provider_is_chosen_and_the_others_say_why_not(operators):
    choice = select("cpu", named={"first": "slow"}).choices["first"]
    assert choice.provider == "slow"
    assert choice.refused == ("broken: slow was named", "fast: slow was named")


def test_naming_the_reference_chooses_it_even_where_it_is_not_allowed(operators):
    table = select("cpu", named={"first": REFERENCE, "second": REFERENCE}, allow_reference=False)
    assert {choice.provider for choice in table.choices.values()} == {REFERENCE}
    assert table.choices["first"].refused == (
        "broken: reference was named",
        "fast: reference was named",
        "slow: reference was named",
    )


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"first": "broken"}, "first: broken was named; broken: it is broken; fast: broken was named"),
        ({"first": "missing"}, "first: missing was named; broken: missing was named"),
        ({"second": "fast"}, "second: fast was named; no cpu implementation is registered"),
    ],
)
def test_a_wish_that_cannot_be_met_is_an_error_with_reasons(operators, wishes, message):
    with pytest.raises(NoImplementationError, match=message):
        select("cpu", named=wishes)


def test_without_the_reference_everything_missing_is_listed_at_once(operators):
    first, _ = operators
    del first.implementations[2:]
    with pytest.raises(NoImplementationError) as caught:
        select("cpu", allow_reference=False)
    assert str(caught.value) == (
        "2 operator(s) have nothing usable on cpu:"
        "\n  - first: broken: it is broken"
        "\n  - second: no cpu implementation is registered"
    )


def test_a_wish_for_an_unknown_operator_names_those_there_are(operators):
    with pytest.raises(ConfigError, match=r"no operator is called atention, frist. Known: first, second\."):
        select("cpu", named={"frist": "fast", "atention": "fast"})


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="backend 'tpu' is not available; this version has cpu"):
        select("tpu")


def test_the_table_hands_out_calls_plans_and_preparations():
    table = select("cpu", named={"rotate": REFERENCE, "linear": REFERENCE, "rms_norm": REFERENCE})
    assert isinstance(table, OperatorTable)
    assert table[rms_norm] is rms_norm.reference
    assert table.plan(rotate) is plan_rope
    assert table.prepare(linear) is prepare_linear
    assert table.prepare(rms_norm) is prepare_norm
    with pytest.raises(AssertionError, match="rms_norm has no plan"):
        table.plan(rms_norm)
    with pytest.raises(AssertionError, match="rotate has no prepare"):
        table.prepare(rotate)


def test_rows_of_the_table_are_plain_data(operators):
    assert select("cpu").rows() == [
        {"operator": "first", "backend": "cpu", "provider": "fast", "refused": ["broken: it is broken"]},
        {"operator": "second", "backend": REFERENCE, "provider": REFERENCE, "refused": []},
    ]


def test_every_declared_operator_is_chosen_on_the_cpu():
    table = select("cpu")
    assert list(table.choices) == list(CATALOG)
    assert len(table.choices) > 15


def test_loading_a_backend_twice_registers_nothing_twice():
    load_backend("cpu")
    before = {name: len(each.implementations) for name, each in CATALOG.items()}
    load_backend("cpu")
    assert {name: len(each.implementations) for name, each in CATALOG.items()} == before


def _alike(file: str, family: str) -> bool:
    return file.startswith(family) or family.startswith(file)


@pytest.mark.parametrize("backend", ["cpu", "npu"])
def test_files_of_a_backend_are_named_like_files_of_contracts(backend):
    """compressor.py, or compressor_aten.py where one file would be too long."""
    load_backend(backend)
    wrong = {
        f"{each.name} in {one.call.__module__}"
        for each in CATALOG.values()
        for one in each.implementations
        if not _alike(one.call.__module__.rsplit(".", 1)[-1], each.family)
    }
    assert wrong == set()
