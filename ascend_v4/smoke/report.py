"""What the checks found: a row each, and the rules that turn an exception into a row.

A check never stops the ones after it: whatever it raises becomes its row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ascend_v4.errors import AscendV4Error

PARTS: Mapping[str, str] = {
    "device": "what this machine has, as `ascend-v4 devices` shows it",
    "operators": "every operator by every provider against its reference",
    "layer": "models of one layer against the CPU engine",
    "model": "whole models against golden logits",
    "chat": "a conversation with a tool call in the prompt",
    "repeat": "the same logits twice, to the bit",
    "memory": "what is held before and after",
}
"""Each part with what it checks, in the order they run."""
ANY_FAILURE = (
    AscendV4Error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a broken installation raises: every error but those that ask the process to end."""
MAX_WHY_CHARS = 600


class Status(Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class SkippedError(AscendV4Error):
    """A check cannot be made here; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a check compared and measured; it passes where the difference is within the bound."""

    compared: str
    measure: str | None = None
    """What the difference is of: `1 - mean cosine`, `share of what is allowed`."""
    difference: float | None = None
    bound: float | None = None
    why: str | None = None
    """A failure that the difference does not show."""

    @property
    def is_good(self) -> bool:
        """Within the bound; NaN is not."""
        within = self.difference is None or self.bound is None or self.difference <= self.bound
        return within and self.why is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One check as it is reported."""

    part: str
    name: str
    status: Status
    seconds: float
    compared: str = ""
    measure: str | None = None
    difference: float | None = None
    bound: float | None = None
    why: str | None = None
    do: str | None = None
    """Of a failure: the one thing to try."""

    def to_json(self) -> dict[str, Any]:
        """The row as plain data; a difference that is no number is null."""
        is_number = self.difference is not None and math.isfinite(self.difference)
        return {
            "part": self.part,
            "name": self.name,
            "status": self.status.value,
            "seconds": round(self.seconds, 3),
            "compared": self.compared,
            "measure": self.measure,
            "difference": self.difference if is_number else None,
            "bound": self.bound,
            "why": self.why,
            "do": self.do,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All rows, and what they were made with."""

    described: Mapping[str, Any]
    rows: tuple[Row, ...]
    seconds: float

    @property
    def has_failed(self) -> bool:
        """Whether any check failed."""
        return any(row.status is Status.FAILED for row in self.rows)

    def count(self, status: Status) -> int:
        """Rows that ended so."""
        return sum(row.status is status for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """The report as `smoke --json` prints it."""
        return {
            **self.described,
            "status": (Status.FAILED if self.has_failed else Status.PASSED).value,
            "seconds": round(self.seconds, 3),
            "counts": {status.value: self.count(status) for status in Status},
            "rows": [row.to_json() for row in self.rows],
        }


@dataclass(kw_only=True)
class Recorder:
    """Runs checks and keeps their rows."""

    only: frozenset[str]
    """Parts to run; empty means all."""
    required: str | None
    """The device for which nothing may be skipped."""
    announce: Callable[[Row], None]
    rows: list[Row] = field(default_factory=list)
    synchronize: Callable[[], None] | None = None
    """Waits for the device; raises where an earlier kernel has broken it."""
    lost: str | None = None
    """Why the device answers no more."""

    def wants(self, part: str) -> bool:
        """Whether the part is to be run."""
        return not self.only or part in self.only

    def check(
        self, part: str, name: str, run: Callable[[], Outcome], *, do: str | Callable[[BaseException], str]
    ) -> None:
        """Runs one check; `do` is the one thing to try when it fails, or makes it of the error."""
        started = time.perf_counter()
        if self.lost is not None:
            self._skip(part, name, self.lost, seconds=0.0)
            return
        try:
            outcome = run()
            if self.synchronize is not None and outcome.is_good:
                self.synchronize()
        except SkippedError as skipped:
            self._skip(part, name, str(skipped), seconds=time.perf_counter() - started)
            return
        except ANY_FAILURE as error:
            seconds = time.perf_counter() - started
            advice = do if isinstance(do, str) else do(error)
            why = told(error)
            self._add(Row(part=part, name=name, status=Status.FAILED, seconds=seconds, why=why, do=advice))
            self._look_after_device(name)
            return
        advice = do if isinstance(do, str) else do(AssertionError(outcome.why or ""))
        self._add(
            Row(
                part=part,
                name=name,
                status=Status.PASSED if outcome.is_good else Status.FAILED,
                seconds=time.perf_counter() - started,
                compared=outcome.compared,
                measure=outcome.measure,
                difference=outcome.difference,
                bound=outcome.bound,
                why=outcome.why,
                do=None if outcome.is_good else advice,
            )
        )
        if not outcome.is_good:
            self._look_after_device(name)

    def skip(self, part: str, name: str, why: str) -> None:
        """A check that cannot be made."""
        self._skip(part, name, why, seconds=0.0)

    def leave(self, part: str, why: str) -> None:
        """A whole part that cannot be run for a reason that has its own row already."""
        self._add(Row(part=part, name="all", status=Status.SKIPPED, seconds=0.0, why=why))

    def _skip(self, part: str, name: str, why: str, *, seconds: float) -> None:
        if self.required is None:
            self._add(Row(part=part, name=name, status=Status.SKIPPED, seconds=seconds, why=why))
            return
        do = "Mend what the reason says; ascend-v4 devices lists what this machine has."
        why = f"--require {self.required} allows no skipped check: {why}"
        self._add(Row(part=part, name=name, status=Status.FAILED, seconds=seconds, why=why, do=do))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self.announce(row)

    def _look_after_device(self, name: str) -> None:
        if self.synchronize is None:
            return
        try:
            self.synchronize()
        except RuntimeError as error:
            self.lost = f"the device answers no more since {name}: {told(error)}"


def told(error: BaseException) -> str:
    """An error in one line: the first that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    if isinstance(error, (AssertionError, AscendV4Error)) and text:
        return text[:MAX_WHY_CHARS]
    return f"{type(error).__name__}: {text}"[:MAX_WHY_CHARS].rstrip(": ")
