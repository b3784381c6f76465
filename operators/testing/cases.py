"""Cases: operator x implementation x inputs. Any backend on any device passes the same ones.

    from ascend_v4.operators.testing.cases import all_cases
    for case in all_cases("cpu"):
        if case.left_out is None:
            case.require_correct()

needs no test framework. `left_out` says why an implementation is not asked some inputs: they are outside its
limits, or in a format of another chip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_v4.device.target import CPU as CPU_TARGET
from ascend_v4.device.target import Target
from ascend_v4.operators.contract import CATALOG, Implementation, Operator, Tolerance
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.select import REFERENCE, load_backend
from ascend_v4.operators.testing import blocks, dense, paged
from ascend_v4.operators.testing.close import Snapshot, require_close, require_finite
from ascend_v4.operators.testing.draw import Draw, Layout
from ascend_v4.operators.testing.fits import reason_left_out
from ascend_v4.operators.testing.poison import poisoned_memory
from ascend_v4.operators.testing.recipe import BOTH, Inputs, Recipe
from ascend_v4.operators.testing.selection import require_good_choice
from ascend_v4.operators.testing.stored import StoredCaches, read_back, store

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Run:
    """One call: what came out, its inputs, and their memory as it was before."""

    outputs: object
    inputs: Inputs
    arguments: Mapping[str, Any]
    before: Snapshot
    caches: StoredCaches
    numbers_before: Mapping[str, Tensor]
    """Of written caches whose rows do not lie one after the other."""
    reserved_rows: int
    """Rows of the reserved page, which the target may write to: nobody reads them."""

    def written(self, name: str, rows: Tensor | None) -> Tensor:
        """Some rows of an argument written in place, or all of it; stored caches as numbers."""
        value: Tensor = self.arguments[name]
        if name in self.caches.storages and not self.inputs.far:
            value = self.caches.numbers(name)
        return value if rows is None else value.view(-1, value.shape[-1])[rows.to(value.device)]

    def require_inputs_untouched(self) -> None:
        """Raises AssertionError where memory changed that the contract does not let the call write."""
        rows = {name: self._may_change(wanted) for name, wanted in self.inputs.written_rows.items()}
        self.before.require_untouched(
            written_rows={name: None if name in self.numbers_before else rows[name] for name in rows}
        )
        for name, before in self.numbers_before.items():
            now = self.caches.numbers(name)
            kept = torch.ones(now.shape[0] * now.shape[1], dtype=torch.bool, device=now.device)
            changed = rows[name]
            if changed is not None:
                kept[changed.to(now.device)] = False
            pair = (each.reshape(-1, now.shape[-1])[kept] for each in (now, before))
            same = torch.equal(*(each.nan_to_num(nan=NO_NUMBER) for each in pair))
            assert same, f"{name} changed outside of what the call may write"

    def _may_change(self, rows: Tensor | None) -> Tensor | None:
        if rows is None or not self.reserved_rows:
            return rows
        return torch.cat((torch.arange(self.reserved_rows), rows.cpu()))


NO_NUMBER = 3.0e38
"""Stands for NaN where memory is compared by its numbers."""


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
    target: Target = CPU_TARGET

    def __str__(self) -> str:
        chosen = self.implementation
        who = REFERENCE if chosen is None else f"{chosen.backend}.{chosen.provider}"
        where = "" if self.target.chip is None else f"-{self.target.chip.value}"
        return f"{self.operator.name}-{who}{where}-{self._inputs_name}"

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
    def left_out(self) -> str | None:
        """Why the implementation is not asked these inputs, or None; draws them to find out."""
        inputs = self.recipe.build(self._draw(CPU, Layout.PACKED, poisoned=False))
        return reason_left_out(inputs, self.implementation, self.target)

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
        inputs = self.recipe.build(self._draw(self.device, self.recipe.layout, poisoned=True))
        chosen = self.implementation or self.operator
        caches = store(inputs, self.target, chosen, dtype=self.dtype)
        is_npu = self.target.backend == "npu"
        return _run(inputs, self.operator, chosen, caches, copy=self.copy, may_write_reserved=is_npu)

    def run_reference_on_cpu(self) -> Run:
        """The reference over the same values, packed, with zeros wherever the implementation had poison."""
        inputs = self.recipe.build(self._draw(CPU, Layout.PACKED, poisoned=False))
        stored = store(inputs, self.target, self.implementation or self.operator, dtype=self.dtype)
        caches = read_back(inputs, stored, dtype=self.dtype)
        return _run(inputs, self.operator, self.operator, caches, copy=None, may_write_reserved=False)

    def require_agreement(self, got: Run, want: Run) -> None:
        """Outputs and rows written in place, within tolerance."""
        if got.outputs is None and isinstance(want.outputs, Tensor):
            _require_all_selected(want.arguments)
        elif self.operator.name == select_entries.name and self.tolerance is not self.operator.tolerance:
            assert isinstance(got.outputs, Tensor), f"an output is a {type(got.outputs).__name__}"
            require_good_choice(got.outputs, want.arguments, self.tolerance)
        elif want.outputs is not None:
            theirs = _several(want.outputs)
            is_mixed = len({each.dtype for each in theirs}) > 1
            for index, (mine, each) in enumerate(zip(_several(got.outputs), theirs, strict=True)):
                self._require_close(mine, each, label=f"output {index}", is_mixed=is_mixed)
        for name, rows in want.inputs.written_rows.items():
            self._require_close(got.written(name, rows), want.written(name, rows), label=name)

    def _require_close(self, got: Tensor, want: Tensor, *, label: str, is_mixed: bool = False) -> None:
        """Of outputs of several dtypes, an implementation's own tolerance speaks of the float32 ones."""
        require_finite(want, label=label)
        is_contracts = is_mixed and want.dtype is not torch.float32
        tolerance = self.operator.tolerance if is_contracts else self.tolerance
        low = self.operator.name in ROUNDED_INSIDE and want.dtype is torch.float32
        if low and got.dtype is want.dtype:
            got, want = got.to(self.dtype), want.to(self.dtype)
        require_close(got, want, tolerance, contract=self.operator.tolerance, label=label)

    def _draw(self, device: torch.device, layout: Layout, *, poisoned: bool) -> Draw:
        name = f"{self.operator.name}-{self._inputs_name}"
        return Draw(name, dtype=self.dtype, device=device, layout=layout, poisoned=poisoned)


ROUNDED_INSIDE = frozenset({"routed_experts"})
"""Operators with a float32 output whose parts were rounded to the input's dtype: they are judged in that."""


def all_cases(
    target: Target | str, *, device: torch.device | None = None, operators: tuple[str, ...] | None = None
) -> list[Case]:
    """Every case of the implementations that a target has the packages for; `operators` names some.

    target may be a device's name. On cpu and cuda the references are among them; npu and sim compute in
    bfloat16 only, and weights lie in one way there. Operators that only `repack` calls have no recipes here.
    Raises ConfigError for an unknown backend.
    """
    target = Target(device=target) if isinstance(target, str) else target
    where = torch.device(target.torch_device) if device is None else device
    load_backend(target.backend)
    recipes = all_recipes()
    return [
        Case(declared, implementation, recipe, dtype, where, copy, target)
        for name, declared in CATALOG.items()
        if operators is None or name in operators
        for implementation in _implementations(declared, target)
        for recipe in recipes.get(name, ())
        for dtype in _dtypes(recipe, target)
        for copy in (recipe.copies if target.chip is None else (True,))
    ]


def _dtypes(recipe: Recipe, target: Target) -> tuple[torch.dtype, ...]:
    return recipe.dtypes if target.chip is None or recipe.dtypes != BOTH else (torch.bfloat16,)


def all_recipes() -> dict[str, list[Recipe]]:
    """Recipes of every operator, by name."""
    return {**dense.recipes(), **blocks.recipes(), **paged.recipes()}


def _implementations(declared: Operator[..., Any], target: Target) -> list[Implementation[..., Any] | None]:
    own = [
        each
        for each in declared.implementations
        if each.backend == target.backend and each.needs.unmet(target) is None
    ]
    return [*own, None] if target.chip is None else [*own]


def _run(
    inputs: Inputs,
    declared: Operator[..., Any],
    chosen: Operator[..., Any] | Implementation[..., Any],
    caches: StoredCaches,
    *,
    copy: bool | None,
    may_write_reserved: bool,
) -> Run:
    """Plans, prepares and calls. `copy` None leaves weights as the file has them."""
    arguments = {**inputs.arguments, **caches.arguments}
    far = {*inputs.caches, *inputs.written_rows} if inputs.far else set()
    before = Snapshot.of({name: value for name, value in arguments.items() if name not in far})
    numbers_before = {
        name: caches.numbers(name)
        for name in inputs.written_rows
        if name in caches.storages and not caches.is_rows(name)
    }
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
    first_cache = next(iter(caches.arguments.values()), None)
    reserved = first_cache.shape[1] if may_write_reserved and first_cache is not None else 0
    return Run(outputs, inputs, arguments, before, caches, numbers_before, reserved)


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
