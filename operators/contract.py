"""An operator declared once: its signature is the schema, its body the reference, its tolerance part of the
contract.

A backend registers a function with the same parameter list; a mismatch fails when the backend's file is
imported. Which implementation runs is decided in `select`, once, before a model is built.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Generic, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.errors import ContractError

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.float32, torch.bfloat16)
FLOAT32 = (torch.float32,)
INDICES = (torch.int32, torch.int64)
INT64 = (torch.int64,)
CACHES = (*FLOATS, torch.int8, torch.uint8, torch.float8_e4m3fn)
"""Caches as implementations store them."""


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


class Where(Enum):
    """Who calls an operator."""

    DEVICE = "the model, on its device"
    HOST = "repacking and loading, on the CPU"
    PART = "other operators; a contract of its own so that its arithmetic is tested alone"


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be present before an implementation can run, checked in this order."""

    module: str | None = None
    torch_operators: tuple[str, ...] = ()
    """`namespace::name` of every torch operator it calls."""
    symbols: tuple[str, ...] = ()
    """aclnn functions behind them that another package than the binding's may have to bring."""
    chips: tuple[Chip, ...] = ()
    """Chips it is built for; none named: all."""

    def describe(self) -> str:
        """One phrase for the operator table."""
        parts = [
            self.module and f"module {self.module}",
            ", ".join(self.torch_operators),
            ", ".join(self.symbols),
            self.chips and "chip " + "/".join(chip.value for chip in self.chips),
        ]
        return ", ".join(part for part in parts if part) or "nothing"

    def unmet(self, target: Target) -> str | None:
        """The first thing a target lacks, or None. The CPU's own modules are asked of by `unusable`."""
        if self.chips and target.chip not in self.chips:
            names = "/".join(chip.value for chip in self.chips)
            return f"for chip {names}, this is {'none' if target.chip is None else target.chip.value}"
        if target.backend == "cpu":
            return None
        if self.module is not None and self.module in target.masked:
            return f"module {self.module} is masked out"
        packages = target.packages
        modules = () if self.module is None else (self.module,)
        reasons = itertools.chain(
            map(packages.missing_module, modules),
            map(packages.missing_operator, self.torch_operators),
            map(packages.missing_symbol, self.symbols),
        )
        return next((reason for reason in reasons if reason is not None), None)


WAIVABLE = ("hidden", "head_dim", "heads", "index_heads", "topk", "row_width")
"""Model sizes that the simulator may relax. Everything else is a rule of layout and never waived."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What an implementation takes of one size of the model; see `ascend_v4.model.sizes` for the names."""

    size: str
    source: str
    """Where the vendor says so."""
    choices: tuple[int, ...] = ()
    """The only values, where there are only these."""
    low: int | None = None
    high: int | None = None
    multiple: int = 1
    chips: tuple[Chip, ...] = ()
    """Where it holds; none named: everywhere."""

    def describe(self) -> str:
        """`heads in {64, 128}`, `window_block a multiple of 16, 16 to 1024`."""
        if self.choices:
            return f"{self.size} in {{{', '.join(map(str, self.choices))}}}"
        parts = [f"a multiple of {self.multiple}"] if self.multiple > 1 else []
        if self.low is not None or self.high is not None:
            parts.append(
                f"{self.low} to {self.high}"
                if self.low is not None and self.high is not None
                else (f"at least {self.low}" if self.low is not None else f"at most {self.high}")
            )
        return f"{self.size} {', '.join(parts)}"

    def allows(self, value: int) -> bool:
        """Whether a value is within the limit."""
        if self.choices:
            return value in self.choices
        above = self.low is None or value >= self.low
        return above and (self.high is None or value <= self.high) and value % self.multiple == 0

    def applies(self, target: Target, sizes: Mapping[str, int]) -> bool:
        """Whether it speaks of this target, and the model has the size at all."""
        return self.size in sizes and (not self.chips or target.chip in self.chips)


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
    storage: Callable[..., Any] | None
    limits: tuple[Limit, ...]
    too_slow: str | None
    """Why it is too slow to serve with, or None."""
    capturable: bool
    """Whether its call can be recorded into a device graph: no size or branch of it depends on values."""

    def refusal(self, target: Target, sizes: Mapping[str, int]) -> str | None:
        """The first reason why it cannot run there with a model of these sizes, or None."""
        reason = self.unusable() or self.needs.unmet(target)
        if reason is not None:
            return reason
        for limit in self.limits:
            waived = limit.size in target.waived and limit.size in WAIVABLE
            if limit.applies(target, sizes) and not limit.allows(sizes[limit.size]) and not waived:
                return f"{limit.size} is {sizes[limit.size]}, it takes {limit.describe()} ({limit.source})"
        return None

    def waives(self, target: Target, sizes: Mapping[str, int]) -> tuple[str, ...]:
        """Names of sizes outside its limits that the target waives."""
        return tuple(
            limit.size
            for limit in self.limits
            if limit.size in target.waived
            and limit.applies(target, sizes)
            and not limit.allows(sizes[limit.size])
        )


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
    storage: Callable[..., Any] | None = None
    """How the rows it caches are stored; an implementation may bring its own."""
    where: Where = Where.DEVICE
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


LAST_PROVIDER = "aten"
"""Plain torch on a device: a candidate of its own that comes after all others."""

CATALOG: dict[str, Operator[Any, Any]] = {}
"""Every declared operator by name. Filled while contracts are imported, read-only afterwards."""


def operator(
    *,
    source: str,
    tolerance: Tolerance,
    mutates: tuple[str, ...] = (),
    plan: Callable[..., Any] | None = None,
    prepare: Callable[..., Any] | None = None,
    storage: Callable[..., Any] | None = None,
    where: Where = Where.DEVICE,
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
            storage=storage,
            where=where,
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
    storage: Callable[..., Any] | None = None,
    limits: tuple[Limit, ...] = (),
    too_slow: str | None = None,
    capturable: bool = False,
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
        made = Implementation(
            backend=backend,
            provider=provider,
            call=call,
            unusable=unusable,
            needs=needs,
            tolerance=tolerance or declared.tolerance,
            because=because,
            plan=plan or declared.plan,
            prepare=prepare or declared.prepare,
            storage=storage or declared.storage,
            limits=limits,
            too_slow=too_slow,
            capturable=capturable,
        )
        later = [one for one in declared.implementations if one.provider == LAST_PROVIDER]
        if later and provider != LAST_PROVIDER:
            # whatever file was imported first
            declared.implementations.insert(declared.implementations.index(later[0]), made)
        else:
            declared.implementations.append(made)
        return call

    return register
