"""An operator declared once: its signature is the schema, its body the reference, its tolerance part of the
contract.

A backend registers a function with the same parameter list; a mismatch fails when the backend's file is
imported. Which implementation runs is decided in `select`, once, before a model is built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ascend_v4.errors import ContractError

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.float32, torch.bfloat16)
FLOAT32 = (torch.float32,)
INDICES = (torch.int32, torch.int64)
INT64 = (torch.int64,)


@dataclass(frozen=True, slots=True)
class Spec:
    """Axes and allowed dtypes of one tensor.

    Axis names bind on first use within a call; digits are fixed sizes.
    """

    axes: str
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest difference from the reference, in rounding steps of the output's dtype.

    A step is the dtype's epsilon (2^-7 for bfloat16, 2^-23 for float32) times the largest magnitude of the
    reference output. `steps` 0 means bitwise equal, with equal dtype, shape and stride order.
    """

    steps: float
    why: str

    def require(self, got: Tensor, want: Tensor, *, label: str = "output") -> None:
        """Raises AssertionError with the measured and the allowed difference."""
        assert got.shape == want.shape, f"{label}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
        assert got.dtype == want.dtype, f"{label}: dtype {got.dtype}, want {want.dtype}"
        if self.steps == 0 or not want.dtype.is_floating_point:
            assert torch.equal(got, want), f"{label}: differs, must be bitwise equal ({self.why})"
            return
        got64, want64 = got.double(), want.double()
        for name, test in (("NaN", torch.isnan), ("infinite", torch.isinf)):
            assert torch.equal(test(got64), test(want64)), f"{label}: {name} values stand elsewhere"
        finite = torch.isfinite(want64)
        if not bool(finite.any()):
            return
        worst = (got64 - want64)[finite].abs().max().item()
        bound = self.steps * torch.finfo(want.dtype).eps * want64[finite].abs().max().item()
        assert worst <= bound, (
            f"{label}: off by {worst:.3g}, allowed {bound:.3g} ({self.steps:g} steps: {self.why})"
        )


BITWISE = Tolerance(0, "codes, indices and copies have one right answer")


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be present before an implementation can run, checked in this order."""

    module: str | None = None
    torch_operator: str | None = None
    chips: tuple[str, ...] = ()

    def describe(self) -> str:
        """One phrase for the operator table."""
        parts = [
            self.module and f"module {self.module}",
            self.torch_operator,
            self.chips and "/".join(self.chips),
        ]
        return ", ".join(part for part in parts if part) or "nothing"


@dataclass(frozen=True, slots=True)
class Implementation(Generic[P, R]):
    """One backend's way to compute an operator."""

    backend: str
    provider: str
    call: Callable[P, R]
    unusable: Callable[[], str | None]
    """The reason why it cannot run on this machine, or None."""
    needs: Needs
    tolerance: Tolerance
    because: str | None
    plan: Callable[..., Any] | None
    prepare: Callable[..., Any] | None


@dataclass(slots=True)
class Operator(Generic[P, R]):
    """A declared operator. Calling it runs the reference."""

    name: str
    family: str
    reference: Callable[P, R]
    source: str
    tolerance: Tolerance
    specs: dict[str, Spec]
    mutates: tuple[str, ...]
    plan: Callable[..., Any] | None
    """What the operator needs once per step for all layers of a kind; an implementation may bring its own."""
    prepare: Callable[..., Any] | None
    """How its weights are laid out at load time; an implementation may bring its own."""
    implementations: list[Implementation[P, R]] = field(default_factory=list)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The reference."""
        return self.reference(*args, **kwargs)

    def check(self, *args: P.args, **kwargs: P.kwargs) -> dict[str, int]:
        """Sizes of the named axes. Raises ContractError on the first tensor that does not fit its Spec."""
        bound = inspect.signature(self.reference).bind(*args, **kwargs)
        sizes: dict[str, int] = {}
        for name, spec in self.specs.items():
            value = bound.arguments.get(name)
            if value is None:
                continue
            axes = spec.axes.split()
            if value.dtype not in spec.dtypes:
                raise ContractError(
                    f"{self.name}: {name} has dtype {value.dtype}, expected one of {spec.dtypes}"
                )
            if value.dim() != len(axes):
                raise ContractError(
                    f"{self.name}: {name} has shape {tuple(value.shape)}, expected [{spec.axes}]"
                )
            for axis, extent in zip(axes, value.shape, strict=True):
                want = int(axis) if axis.isdigit() else sizes.setdefault(axis, extent)
                if extent != want:
                    raise ContractError(
                        f"{self.name}: {name} axis {axis} is {extent}, expected {want} "
                        f"(shape {tuple(value.shape)}, expected [{spec.axes}])"
                    )
        return sizes


CATALOG: dict[str, Operator[Any, Any]] = {}
"""Every declared operator by name. Filled while contracts are imported, read-only afterwards."""


def operator(
    *,
    source: str,
    tolerance: Tolerance,
    mutates: tuple[str, ...] = (),
    plan: Callable[..., Any] | None = None,
    prepare: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Operator[P, R]]:
    """Declares the decorated reference as an operator. Raises ContractError when the name is taken."""

    def declare(reference: Callable[P, R]) -> Operator[P, R]:
        name = reference.__name__
        if name in CATALOG:
            raise ContractError(f"operator {name} is declared twice")
        parameters = inspect.signature(reference).parameters
        unknown = [argument for argument in mutates if argument not in parameters]
        if unknown:
            raise ContractError(f"operator {name} mutates {unknown}, which it does not take")
        declared = Operator(
            name=name,
            family=reference.__module__.rsplit(".", 1)[-1],
            reference=reference,
            source=source,
            tolerance=tolerance,
            specs=_specs_of(reference),
            mutates=mutates,
            plan=plan,
            prepare=prepare,
        )
        CATALOG[name] = declared
        return declared

    return declare


def _specs_of(reference: Callable[..., Any]) -> dict[str, Spec]:
    specs: dict[str, Spec] = {}
    for argument, hint in get_type_hints(reference, include_extras=True).items():
        for part in (hint, *get_args(hint)):
            marks = part.__metadata__ if get_origin(part) is Annotated else ()
            for mark in marks:
                if isinstance(mark, Spec):
                    specs[argument] = mark
    specs.pop("return", None)
    return specs


def always_usable() -> str | None:
    """For implementations that need nothing beyond torch."""
    return None


def implements(
    declared: Operator[P, R],
    *,
    backend: str,
    provider: str,
    unusable: Callable[[], str | None] = always_usable,
    needs: Needs = Needs(),
    tolerance: Tolerance | None = None,
    because: str | None = None,
    plan: Callable[..., Any] | None = None,
    prepare: Callable[..., Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Registers the decorated function, best candidate of a backend first.

    Raises ContractError when its parameters differ from the contract's, or when a tolerance of its own has no
    reason.
    """

    def register(call: Callable[P, R]) -> Callable[P, R]:
        want, got = inspect.signature(declared.reference).parameters, inspect.signature(call).parameters
        if [(p.name, p.kind) for p in want.values()] != [(p.name, p.kind) for p in got.values()]:
            raise ContractError(
                f"{declared.name} on {backend}/{provider}: parameters {list(got)}, the contract has "
                f"{list(want)}"
            )
        if tolerance is not None and not because:
            raise ContractError(
                f"{declared.name} on {backend}/{provider}: a tolerance of its own needs `because`"
            )
        declared.implementations.append(
            Implementation(
                backend=backend,
                provider=provider,
                call=call,
                unusable=unusable,
                needs=needs,
                tolerance=tolerance or declared.tolerance,
                because=because,
                plan=plan or declared.plan,
                prepare=prepare or declared.prepare,
            )
        )
        return call

    return register
