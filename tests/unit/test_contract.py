"""Operators declared once: what is refused at import, what a call may look like, what a tolerance allows."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import pytest
import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.errors import ContractError
from ascend_v4.operators import contract
from ascend_v4.operators.contract import (
    BITWISE,
    FLOAT32,
    FLOATS,
    INDICES,
    Needs,
    Spec,
    Tolerance,
    implements,
    operator,
)
from ascend_v4.operators.contracts.norm import rms_norm
from ascend_v4.operators.select import load_backend


@pytest.fixture
def catalog(monkeypatch):
    """An empty catalogue for the length of a test."""
    empty: dict[str, contract.Operator] = {}
    monkeypatch.setattr(contract, "CATALOG", empty)
    return empty


def declare_scaled(**settings: Any) -> contract.Operator[..., Any]:
    """An operator of two tensors that share the axis D."""

    @operator(source="a test", tolerance=settings.pop("tolerance", BITWISE), **settings)
    def scaled(
        x_TD: Annotated[Tensor, Spec("T D", FLOATS)],
        rows_T: Annotated[Tensor | None, Spec("T", INDICES)],
        weight_3D: Annotated[Tensor, Spec("3 D", FLOAT32)],
        *,
        factor: float = 1.0,
    ) -> Annotated[Tensor, Spec("T D", FLOATS)]:
        """The sum of everything."""
        return x_TD * factor + weight_3D.sum(0)

    return scaled


def test_a_declared_operator_runs_its_reference(catalog):
    declared = declare_scaled(mutates=("x_TD",))
    assert catalog == {"scaled": declared}
    assert declared.mutates == ("x_TD",)
    assert set(declared.specs) == {"x_TD", "rows_T", "weight_3D"}
    got = declared(torch.ones(2, 4), None, torch.ones(3, 4), factor=2.0)
    assert torch.equal(got, torch.full((2, 4), 5.0))


@pytest.mark.usefixtures("catalog")
def test_declaring_a_name_twice_is_refused():
    declare_scaled()
    with pytest.raises(ContractError, match="operator scaled is declared twice"):
        declare_scaled()


@pytest.mark.usefixtures("catalog")
def test_mutating_an_argument_it_does_not_take_is_refused():
    with pytest.raises(ContractError, match=r"scaled mutates \['cache'\], which it does not take"):
        declare_scaled(mutates=("x_TD", "cache"))


def renamed(x_TD, rows, weight_3D, *, factor=1.0):
    raise NotImplementedError


def reordered(rows_T, x_TD, weight_3D, *, factor=1.0):
    raise NotImplementedError


def positional(x_TD, rows_T, weight_3D, factor=1.0):
    raise NotImplementedError


def shorter(x_TD, rows_T, weight_3D):
    raise NotImplementedError


def longer(x_TD, rows_T, weight_3D, *, factor=1.0, more=None):
    raise NotImplementedError


def fitting(x_TD, rows_T, weight_3D, *, factor=1.0):
    raise NotImplementedError


@pytest.mark.parametrize("call", [renamed, reordered, positional, shorter, longer])
@pytest.mark.usefixtures("catalog")
def test_an_implementation_with_other_parameters_is_refused_at_import(call):
    declared = declare_scaled()
    with pytest.raises(ContractError, match=r"scaled on npu/vendor: parameters .* the contract has"):
        implements(declared, backend="npu", provider="vendor")(call)
    assert declared.implementations == []


@pytest.mark.parametrize("because", [None, ""])
@pytest.mark.usefixtures("catalog")
def test_a_tolerance_of_its_own_needs_a_reason(because):
    declared = declare_scaled()
    looser = Tolerance(9, "coarser")
    register: Callable[..., Any] = implements(
        declared, backend="npu", provider="vendor", tolerance=looser, because=because
    )
    with pytest.raises(ContractError, match="a tolerance of its own needs `because`"):
        register(fitting)
    assert declared.implementations == []


@pytest.mark.usefixtures("catalog")
def test_an_implementation_inherits_what_it_does_not_bring():
    def plan(**_):
        raise NotImplementedError

    def own_plan(**_):
        raise NotImplementedError

    declared = declare_scaled(plan=plan, prepare=plan)
    implements(declared, backend="npu", provider="first", plan=own_plan)(fitting)
    looser = Tolerance(9, "coarser")
    implements(declared, backend="npu", provider="second", tolerance=looser, because="fp32 statistic")(
        fitting
    )
    first, second = declared.implementations
    assert (first.plan, first.prepare, first.tolerance, first.unusable()) == (own_plan, plan, BITWISE, None)
    assert (second.plan, second.tolerance, second.because) == (plan, looser, "fp32 statistic")


CHECKS = {
    "x_TD has dtype torch.float64": {"x_TD": torch.zeros(2, 4, dtype=torch.float64)},
    r"x_TD has shape \(2, 4, 1\), expected \[T D\]": {"x_TD": torch.zeros(2, 4, 1)},
    r"weight_3D axis 3 is 2, expected 3 \(shape \(2, 4\), expected \[3 D\]\)": {
        "weight_3D": torch.zeros(2, 4)
    },
    "weight_3D axis D is 5, expected 4": {"weight_3D": torch.zeros(3, 5)},
    "rows_T axis T is 3, expected 2": {"rows_T": torch.zeros(3, dtype=torch.int32)},
    "rows_T has dtype torch.float32": {"rows_T": torch.zeros(2)},
}


@pytest.mark.parametrize("message", CHECKS)
@pytest.mark.usefixtures("catalog")
def test_a_tensor_that_does_not_fit_is_named(message):
    declared = declare_scaled()
    fitting_tensors = {"x_TD": torch.zeros(2, 4), "rows_T": None, "weight_3D": torch.zeros(3, 4)}
    assert declared.check(**fitting_tensors) == {"T": 2, "D": 4}
    with pytest.raises(ContractError, match=f"scaled: {message}"):
        declared.check(**{**fitting_tensors, **CHECKS[message]})


def test_every_tensor_parameter_of_every_operator_has_a_spec():
    load_backend("cpu")
    without = {
        f"{name}.{parameter}"
        for name, declared in contract.CATALOG.items()
        for parameter, hint in inspect.get_annotations(declared.reference, eval_str=True).items()
        if "Tensor" in str(hint) and parameter != "return" and parameter not in declared.specs
    }
    # scales are uint8 or float8_e8m0fnu, as the file has them
    assert without == {"dequantize_fp8_block.scale", "dequantize_fp4_group.scale"}


def test_every_operator_says_where_it_comes_from_and_what_it_means():
    load_backend("cpu")
    for declared in contract.CATALOG.values():
        assert declared.source
        assert declared.tolerance.why
        assert inspect.getdoc(declared.reference)


def test_a_tolerance_counts_steps_of_the_outputs_dtype():
    want = torch.tensor([4.0, -1.0])
    off_by_three_steps = want + 3 * 4.0 * 2.0**-23
    Tolerance(3, "sums").require(off_by_three_steps, want)
    with pytest.raises(AssertionError, match=r"output: off by .* allowed .* \(2 steps: sums\)"):
        Tolerance(2, "sums").require(off_by_three_steps, want)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        (torch.tensor([1.0, 2.0, 3.0]), "shape"),
        (torch.tensor([1.0, 2.0], dtype=torch.bfloat16), "dtype"),
        (torch.tensor([1.0, torch.nan]), "NaN"),
        (torch.tensor([torch.inf, 2.0]), "infinite"),
    ],
)
def test_shape_dtype_and_non_finite_values_must_match(got, message):
    with pytest.raises(AssertionError, match=f"here: {message}"):
        Tolerance(1000, "anything").require(got, torch.tensor([1.0, 2.0]), label="here")


def test_equal_non_finite_values_are_equal():
    values = torch.tensor([torch.nan, torch.inf, 1.0])
    Tolerance(1, "one step").require(values.clone(), values)
    Tolerance(1, "one step").require(values[:2].clone(), values[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_bitwise_allows_nothing(dtype):
    want = torch.tensor([1, 2], dtype=dtype)
    BITWISE.require(want.clone(), want)
    with pytest.raises(AssertionError, match="must be bitwise equal"):
        BITWISE.require(
            want + torch.finfo(torch.float32).eps * 4 if dtype.is_floating_point else want + 1, want
        )


def test_whole_numbers_are_compared_bitwise_under_any_tolerance():
    with pytest.raises(AssertionError, match="must be bitwise equal"):
        Tolerance(1000, "floats").require(torch.tensor([1, 2]), torch.tensor([1, 3]))


@pytest.mark.parametrize(
    ("needs", "phrase"),
    [
        (Needs(), "nothing"),
        (Needs(module="torch_npu"), "module torch_npu"),
        (
            Needs("m", ("npu::x",), ("aclnnX",), (Chip.A2, Chip.A3)),
            "module m, npu::x, aclnnX, chip a2/a3",
        ),
    ],
)
def test_needs_are_one_phrase(needs, phrase):
    assert needs.describe() == phrase


def test_a_spec_and_a_tolerance_cannot_be_edited():
    with pytest.raises(dataclasses.FrozenInstanceError):
        rms_norm.tolerance.steps = 100  # type: ignore[misc]
