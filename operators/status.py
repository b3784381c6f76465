"""What `ascend-v4 ops` and the generated documents say of every operator on a target: what was chosen, why
others were not, and what was run where.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from ascend_v4.device.target import Target
from ascend_v4.errors import ConfigError
from ascend_v4.operators.contract import CATALOG, Implementation, Operator, Where
from ascend_v4.operators.select import REFERENCE, load_backend

WRITTEN = "written"
SIMULATED = "simulated"
WAIVED = "simulated (waived)"
ANY = "any"
"""In place of a chip, for backends without chips."""
_VERIFIED = re.compile(r"\S.*, \d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One registered implementation, seen from a target."""

    provider: str
    is_chosen: bool
    reason: str | None
    """Why it cannot run there; None where it could."""
    is_for_chip: bool
    """Whether it was written for this chip at all."""
    needs: str
    limits: tuple[str, ...]
    waived: tuple[str, ...]
    too_slow: str | None
    capturable: bool
    verified: str
    """What was run, in the words of status.yaml."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorRow:
    """One operator that the model calls, and its candidates, best first."""

    operator: str
    backend: str
    """Of the chosen candidate; the reference is a backend of its own. Empty where nothing can run."""
    provider: str
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that runs; None for the reference, and where nothing can run."""
        return next((each for each in self.candidates if each.is_chosen), None)


def operator_rows(target: Target, sizes: Mapping[str, int]) -> list[OperatorRow]:
    """Every operator that a model of these sizes calls on a target, as `select` would choose, never raising
    for what is missing.
    """
    load_backend(target.backend)
    return [_row(each, target, sizes) for each in CATALOG.values() if each.where is Where.DEVICE]


def host_operators() -> list[tuple[str, str]]:
    """Operators that no device runs: (name, who calls it)."""
    load_backend("cpu")
    return [(each.name, each.where.value) for each in CATALOG.values() if each.where is not Where.DEVICE]


def verified_on(operator: str, *, backend: str, provider: str, chip: str | None) -> str:
    """What was run of an implementation, from status.yaml."""
    status = load_status()
    found = status.get(backend, {}).get(provider, {}).get(operator, {}).get(chip or ANY)
    return str(found or status["defaults"].get(backend, WRITTEN))


@cache
def load_status() -> dict[str, Any]:
    """The table. Raises ConfigError for a status that claims what it does not say when and where."""
    text = resources.files(__package__).joinpath("status.yaml").read_text(encoding="utf-8")
    return parse_status(text)


def parse_status(text: str) -> dict[str, Any]:
    """backend -> provider -> operator -> chip -> status, and `defaults`."""
    table = yaml.safe_load(text)
    for backend, providers in table.items():
        if backend == "defaults":
            continue
        for provider, operators in providers.items():
            for operator, chips in operators.items():
                for chip, status in chips.items():
                    if status not in (WRITTEN, SIMULATED, WAIVED) and not _VERIFIED.fullmatch(str(status)):
                        raise ConfigError(
                            f"status.yaml, {backend}/{provider}/{operator}/{chip}: {status!r} is neither "
                            f"{WRITTEN}, {SIMULATED}, {WAIVED} nor `MACHINE, YYYY-MM-DD`."
                        )
                operators[operator] = {str(chip): status for chip, status in chips.items()}
    return dict(table)


def _row(declared: Operator[..., Any], target: Target, sizes: Mapping[str, int]) -> OperatorRow:
    found = [each for each in declared.implementations if each.backend == target.backend]
    reasons = [each.refusal(target, sizes) for each in found]
    best = reasons.index(None) if None in reasons else None
    candidates = tuple(
        _candidate(declared.name, each, target, sizes, reason=reason, is_chosen=index == best)
        for index, (each, reason) in enumerate(zip(found, reasons, strict=True))
    )
    if best is not None:
        backend, provider = target.backend, found[best].provider
    else:
        backend = provider = "" if target.backend == "npu" else REFERENCE
    return OperatorRow(operator=declared.name, backend=backend, provider=provider, candidates=candidates)


def _candidate(
    operator: str,
    each: Implementation[..., Any],
    target: Target,
    sizes: Mapping[str, int],
    *,
    reason: str | None,
    is_chosen: bool,
) -> Candidate:
    chip = None if target.chip is None else target.chip.value
    verified = verified_on(operator, backend=each.backend, provider=each.provider, chip=chip)
    waived = each.waives(target, sizes)
    return Candidate(
        provider=each.provider,
        is_chosen=is_chosen,
        reason=reason,
        is_for_chip=not each.needs.chips or target.chip in each.needs.chips,
        needs=each.needs.describe(),
        limits=tuple(limit.describe() for limit in each.limits if limit.applies(target, sizes)),
        waived=waived,
        too_slow=each.too_slow,
        capturable=each.capturable,
        verified=WAIVED if waived and verified == SIMULATED else verified,
    )
