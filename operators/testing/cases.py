"""Cases: operator x implementation x inputs. Any backend on any device passes the same ones.

    from ascend_v4.operators.testing.cases import all_cases
    for case in all_cases("cpu"):
        case.require_correct()

needs no test framework.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.contract import CATALOG, Implementation, Operator, Tolerance
from ascend_v4.operators.select import REFERENCE, load_backend
from ascend_v4.operators.testing import dense, paged
from ascend_v4.operators.testing.close import Snapshot, require_close, require_finite
from ascend_v4.operators.testing.draw import Draw, Layout
from ascend_v4.operators.testing.poison import poisoned_memory
from ascend_v4.operators.testing.recipe import Inputs, Recipe

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Run:
    """One call: what came out, its inputs, and their memory as it was before."""

    outputs: object
    inputs: Inputs
    arguments: Mapping[str, Any]
    before: Snapshot

    def require_inputs_untouched(self) -> None:
        """Raises AssertionError where memory changed that the contract does not let the call write."""
        self.before.require_untouched(written_rows=self.inputs.written_rows)


@dataclass(frozen=True, slots=True)
class Case:
    """One implementation of an operator with one kind of input. Its name seeds the inputs."""

    operator: Operator[..., Any]
    implementation: Implementation[..., Any] | None
    """None: the reference itself, on `device`."""
    recipe: Recipe
    dtype: torch.dtype
    device: torch.device
    copy: bool
    """How weights are prepared, where the operator has any."""

    def __str__(self) -> str:
        chosen = self.implementation
        who = REFERENCE if chosen is None else f"{chosen.backend}.{chosen.provider}"
        return f"{self.operator.name}-{who}-{self._inputs_name}"

    @property
    def _inputs_name(self) -> str:
        layout = "" if self.copy else "-mapped"
        return f"{self.recipe.name}-{str(self.dtype).removeprefix('torch.')}{layout}"

    @property
    def slow(self) -> bool:
        """Whether it takes seconds or gigabytes."""
        return self.recipe.slow

    @property
    def unusable(self) -> str | None:
        """Why the implementation cannot run here, or None."""
        return None if self.implementation is None else self.implementation.unusable()

    @property
    def tolerance(self) -> Tolerance:
        """The implementation's own, or the contract's."""
        return self.operator.tolerance if self.implementation is None else self.implementation.tolerance

    def require_correct(self) -> None:
        """Runs the implementation first, then the reference, and compares. Raises AssertionError."""
        got = self.run_implementation()
        self.require_agreement(got, self.run_reference_on_cpu())
        got.require_inputs_untouched()

    def run_implementation(self) -> Run:
        """The implementation over poison, in the recipe's layout. To be run first: memory that the reference
        freed holds the answer.
        """
        draw = self._draw(self.device, self.recipe.layout, poisoned=True)
        chosen = self.implementation
        if chosen is None:
            return _run(self.recipe.build(draw), self.operator, self.operator, copy=self.copy)
        return _run(self.recipe.build(draw), self.operator, chosen, copy=self.copy)

    def run_reference_on_cpu(self) -> Run:
        """The reference over the same values, packed, with zeros wherever the implementation had poison."""
        draw = self._draw(CPU, Layout.PACKED, poisoned=False)
        return _run(self.recipe.build(draw), self.operator, self.operator, copy=None)

    def require_agreement(self, got: Run, want: Run) -> None:
        """Outputs and rows written in place, within tolerance."""
        if got.outputs is None and isinstance(want.outputs, Tensor):
            _require_all_selected(want.arguments)
        elif want.outputs is not None:
            pairs = zip(_several(got.outputs), _several(want.outputs), strict=True)
            for index, (mine, theirs) in enumerate(pairs):
                self._require_close(mine, theirs, label=f"output {index}")
        for name, rows in want.inputs.written_rows.items():
            mine, theirs = got.arguments[name], want.arguments[name]
            if rows is not None:
                mine = mine.view(-1, mine.shape[-1])[rows.to(mine.device)]
                theirs = theirs.view(-1, theirs.shape[-1])[rows]
            self._require_close(mine, theirs, label=name)

    def _require_close(self, got: Tensor, want: Tensor, *, label: str) -> None:
        require_finite(want, label=label)
        low = self.operator.name in ROUNDED_INSIDE and want.dtype is torch.float32
        if low and got.dtype is want.dtype:
            got, want = got.to(self.dtype), want.to(self.dtype)
        require_close(got, want, self.tolerance, contract=self.operator.tolerance, label=label)

    def _draw(self, device: torch.device, layout: Layout, *, poisoned: bool) -> Draw:
        name = f"{self.operator.name}-{self._inputs_name}"
        return Draw(name, dtype=self.dtype, device=device, layout=layout, poisoned=poisoned)


ROUNDED_INSIDE = frozenset({"routed_experts"})
"""Operators with a float32 output whose parts were rounded to the input's dtype: they are judged in that."""


def all_cases(
    backend: str, *, device: torch.device = CPU, operators: tuple[str, ...] | None = None
) -> list[Case]:
    """Every case of a backend's implementations and of the references on its device; `operators` names some.

    Operators that only `repack` calls have no recipes here. Raises ConfigError for an unknown backend.
    """
    load_backend(backend)
    recipes = all_recipes()
    return [
        Case(declared, implementation, recipe, dtype, device, copy)
        for name, declared in CATALOG.items()
        if operators is None or name in operators
        for implementation in _implementations(declared, backend)
        for recipe in recipes.get(name, ())
        for dtype in recipe.dtypes
        for copy in recipe.copies
    ]


def all_recipes() -> dict[str, list[Recipe]]:
    """Recipes of every operator, by name."""
    return {**dense.recipes(), **paged.recipes()}


def _implementations(declared: Operator[..., Any], backend: str) -> list[Implementation[..., Any] | None]:
    return [*(each for each in declared.implementations if each.backend == backend), None]


def _run(
    inputs: Inputs,
    declared: Operator[..., Any],
    chosen: Operator[..., Any] | Implementation[..., Any],
    *,
    copy: bool | None,
) -> Run:
    """Plans, prepares and calls. `copy` None leaves weights as the file has them."""
    arguments = dict(inputs.arguments)
    before = Snapshot.of(arguments)
    call: Callable[..., Any] = chosen.reference if isinstance(chosen, Operator) else chosen.call
    with poisoned_memory():
        if inputs.planned is not None:
            assert chosen.plan is not None, f"{declared.name} has no plan"
            arguments[inputs.planned.parameter] = chosen.plan(**inputs.planned.arguments)
        if inputs.prepared is not None and copy is not None:
            assert chosen.prepare is not None, f"{declared.name} has no prepare"
            arguments[inputs.prepared] = chosen.prepare(arguments[inputs.prepared], copy=copy)
        declared.check(**arguments)
        outputs = call(**arguments)
    return Run(outputs, inputs, arguments, before)


def _several(outputs: object) -> tuple[Tensor, ...]:
    assert isinstance(outputs, (Tensor, tuple)), f"an output is a {type(outputs).__name__}"
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def _require_all_selected(arguments: Mapping[str, Any]) -> None:
    """None stands for every visible entry: right only where no token sees more than it may keep."""
    most = (
        max((start + count for _, count, start in arguments["batch"].spans), default=0) // arguments["ratio"]
    )
    assert most <= arguments["topk"], (
        f"None was returned, but {most} entries are more than {arguments['topk']}"
    )
