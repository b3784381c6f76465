"""Picks one implementation per operator, once, before a model is built, and keeps every reason for
refusal.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar, cast

from ascend_v4.device.target import Target
from ascend_v4.errors import ConfigError, NoImplementationError
from ascend_v4.operators.contract import CATALOG, Implementation, Operator, Where

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("cpu", "cuda", "npu")
"""Backends with a package of implementations in this version."""

REFERENCE = "reference"
NO_SIZES: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one operator, and why the others were not."""

    operator: str
    backend: str
    provider: str
    call: Callable[..., Any]
    plan: Callable[..., Any] | None
    prepare: Callable[..., Any] | None
    storage: Callable[..., Any] | None
    refused: tuple[str, ...]
    waived: tuple[str, ...] = ()
    """Sizes outside the implementation's limits that the target waives."""
    too_slow: str | None = None
    capturable: bool = False


class OperatorTable:
    """The chosen callables. `table[operator]` is typed like the operator itself."""

    def __init__(self, choices: Mapping[str, Choice], target: Target) -> None:
        self.choices = dict(choices)
        self.target = target

    def __getitem__(self, declared: Operator[P, R]) -> Callable[P, R]:
        return cast("Callable[P, R]", self.choices[declared.name].call)

    def plan(self, declared: Operator[..., Any]) -> Callable[..., Any]:
        """The once-per-step half of a chosen operator."""
        call = self.choices[declared.name].plan
        assert call is not None, f"{declared.name} has no plan"
        return call

    def prepare(self, declared: Operator[..., Any]) -> Callable[..., Any]:
        """The weight layout half of a chosen operator."""
        call = self.choices[declared.name].prepare
        assert call is not None, f"{declared.name} has no prepare"
        return call

    def storage(self, declared: Operator[..., Any]) -> Callable[..., Any]:
        """How the rows that a chosen operator caches are stored."""
        call = self.choices[declared.name].storage
        assert call is not None, f"{declared.name} caches nothing"
        return call

    @property
    def too_slow(self) -> dict[str, str]:
        """Operators whose chosen implementation is too slow to serve with, and why."""
        return {name: choice.too_slow for name, choice in self.choices.items() if choice.too_slow is not None}

    def rows(self) -> list[dict[str, object]]:
        """One row per operator for logs and `--json`, in catalogue order."""
        return [
            {
                "operator": choice.operator,
                "backend": choice.backend,
                "provider": choice.provider,
                "refused": list(choice.refused),
            }
            for choice in self.choices.values()
        ]


def select(
    target: Target | str,
    *,
    allow_reference: bool | None = None,
    named: Mapping[str, str] | None = None,
    sizes: Mapping[str, int] = NO_SIZES,
) -> OperatorTable:
    """Chooses for every operator: what `named` says, else the backend's best usable, else the reference.

    target may be a device's name. named maps operator -> provider (or "reference"). sizes are those of the
    model, which limits are held against. allow_reference None allows it everywhere but on npu and sim, where
    only the operators that the model calls are chosen for.
    Raises ConfigError for an unknown backend, operator or provider; NoImplementationError, listing every
    operator without a usable implementation and why each candidate was refused.
    """
    target = Target(device=target) if isinstance(target, str) else target
    load_backend(target.backend)
    wishes = dict(named or {})
    unknown = sorted(wishes.keys() - CATALOG.keys())
    if unknown:
        raise ConfigError(f"no operator is called {', '.join(unknown)}. Known: {', '.join(CATALOG)}.")
    is_npu = target.backend == "npu"
    allowed = not is_npu if allow_reference is None else allow_reference
    choices: dict[str, Choice] = {}
    missing: list[str] = []
    for declared in CATALOG.values():
        if is_npu and declared.where is not Where.DEVICE and declared.name not in wishes:
            continue
        chosen = _choose(declared, target, wishes.get(declared.name), sizes, allow_reference=allowed)
        if isinstance(chosen, Choice):
            choices[declared.name] = chosen
        else:
            missing.append(f"{declared.name}: {chosen}")
    if missing:
        lines = "".join(f"\n  - {line}" for line in missing)
        raise NoImplementationError(
            f"{len(missing)} operator(s) have nothing usable on {target.describe()}:{lines}"
        )
    return OperatorTable(choices, target)


def load_backend(backend: str) -> None:
    """Imports the contracts and one backend's implementations. Raises ConfigError for an unknown backend."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is not available; this version has {', '.join(BACKENDS)}.")
    for package in ("contracts", backend):
        root = importlib.import_module(f"ascend_v4.operators.{package}")
        for found in sorted(pkgutil.iter_modules(root.__path__), key=lambda module: module.name):
            importlib.import_module(f"{root.__name__}.{found.name}")


def _choose(
    declared: Operator[..., Any],
    target: Target,
    wish: str | None,
    sizes: Mapping[str, int],
    *,
    allow_reference: bool,
) -> Choice | str:
    refused: list[str] = []
    for candidate in declared.implementations:
        if candidate.backend != target.backend:
            continue
        if wish is not None and candidate.provider != wish:
            refused.append(f"{candidate.provider}: {wish} was named")
            continue
        reason = candidate.refusal(target, sizes)
        if reason is None:
            return _chosen(declared, candidate, refused, candidate.waives(target, sizes))
        refused.append(f"{candidate.provider}: {reason}")
    if wish not in (None, REFERENCE):
        return f"{wish} was named; " + (
            "; ".join(refused) or f"no {target.backend} implementation is registered"
        )
    if allow_reference or wish == REFERENCE:
        return _chosen(declared, None, refused)
    return "; ".join(refused) or f"no {target.backend} implementation is registered"


def _chosen(
    declared: Operator[..., Any],
    candidate: Implementation[..., Any] | None,
    refused: list[str],
    waived: tuple[str, ...] = (),
) -> Choice:
    found = declared if candidate is None else candidate
    return Choice(
        operator=declared.name,
        backend=REFERENCE if candidate is None else candidate.backend,
        provider=REFERENCE if candidate is None else candidate.provider,
        call=declared.reference if candidate is None else candidate.call,
        plan=found.plan,
        prepare=found.prepare,
        storage=found.storage,
        refused=tuple(refused),
        waived=waived,
        too_slow=None if candidate is None else candidate.too_slow,
        capturable=candidate is not None and candidate.capturable,
    )
