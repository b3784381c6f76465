"""Picks one implementation per operator, once, before a model is built, and keeps every reason for
refusal.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

from ascend_v4.errors import ConfigError, NoImplementationError
from ascend_v4.operators.contract import CATALOG, Operator

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("cpu",)
"""Backends with a package of implementations in this version."""

REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen for one operator, and why the others were not."""

    operator: str
    backend: str
    provider: str
    call: Callable[..., Any]
    plan: Callable[..., Any] | None
    prepare: Callable[..., Any] | None
    refused: tuple[str, ...]


class OperatorTable:
    """The chosen callables. `table[operator]` is typed like the operator itself."""

    def __init__(self, choices: Mapping[str, Choice]) -> None:
        self.choices = dict(choices)

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
    backend: str, *, allow_reference: bool = True, named: Mapping[str, str] | None = None
) -> OperatorTable:
    """Chooses for every declared operator: what `named` says, else the backend's best usable, else the
    reference.

    named maps operator -> provider (or "reference").
    Raises ConfigError for an unknown backend, operator or provider; NoImplementationError, listing every
    operator without a usable implementation and why each candidate was refused.
    """
    load_backend(backend)
    wishes = dict(named or {})
    unknown = sorted(wishes.keys() - CATALOG.keys())
    if unknown:
        raise ConfigError(f"no operator is called {', '.join(unknown)}. Known: {', '.join(CATALOG)}.")
    choices: dict[str, Choice] = {}
    missing: list[str] = []
    for declared in CATALOG.values():
        chosen = _choose(declared, backend, wishes.get(declared.name), allow_reference=allow_reference)
        if isinstance(chosen, Choice):
            choices[declared.name] = chosen
        else:
            missing.append(f"{declared.name}: {chosen}")
    if missing:
        lines = "".join(f"\n  - {line}" for line in missing)
        raise NoImplementationError(f"{len(missing)} operator(s) have nothing usable on {backend}:{lines}")
    return OperatorTable(choices)


def load_backend(backend: str) -> None:
    """Imports the contracts and one backend's implementations. Raises ConfigError for an unknown backend."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend {backend!r} is not available; this version has {', '.join(BACKENDS)}.")
    for package in ("contracts", backend):
        root = importlib.import_module(f"ascend_v4.operators.{package}")
        for found in sorted(pkgutil.iter_modules(root.__path__), key=lambda module: module.name):
            importlib.import_module(f"{root.__name__}.{found.name}")


def _choose(
    declared: Operator[..., Any], backend: str, wish: str | None, *, allow_reference: bool
) -> Choice | str:
    refused: list[str] = []
    for candidate in declared.implementations:
        if candidate.backend != backend:
            continue
        if wish is not None and candidate.provider != wish:
            refused.append(f"{candidate.provider}: {wish} was named")
            continue
        reason = candidate.unusable()
        if reason is None:
            return Choice(
                operator=declared.name,
                backend=backend,
                provider=candidate.provider,
                call=candidate.call,
                plan=candidate.plan,
                prepare=candidate.prepare,
                refused=tuple(refused),
            )
        refused.append(f"{candidate.provider}: {reason}")
    if wish not in (None, REFERENCE):
        return f"{wish} was named; " + ("; ".join(refused) or f"no {backend} implementation is registered")
    if allow_reference or wish == REFERENCE:
        return Choice(
            operator=declared.name,
            backend=REFERENCE,
            provider=REFERENCE,
            call=declared.reference,
            plan=declared.plan,
            prepare=declared.prepare,
            refused=tuple(refused),
        )
    return "; ".join(refused) or f"no {backend} implementation is registered"
