"""What a repack did to the numbers: per tensor for the manifest, per part of the model for a reader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

from ascend_v4.operators.contracts.transcode import RowStats
from ascend_v4.operators.select import OperatorTable
from ascend_v4.repack.layouts import Part
from ascend_v4.repack.manifest import FileEntry, Manifest
from ascend_v4.repack.plan import Conversion, RepackPlan
from ascend_v4.repack.writer import StageSeconds

Sums = tuple[float, ...]
SHOWN_NAMES = 10


@dataclass(frozen=True, slots=True)
class WeightOutcome:
    """One converted weight, whole, however many ranks share it."""

    conversion: Conversion
    stats: RowStats

    def summary(self) -> dict[str, Any]:
        """The weight's entry in the manifest."""
        item = self.conversion
        return {
            "from": item.before.value,
            "to": item.after.value,
            "weights": prod(item.shape),
            **_errors(self.stats),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RepackReport:
    """What a run wrote and how fast. Seconds are this run's own; parts found whole took no part in them."""

    output: Path
    manifest: Manifest
    plan: RepackPlan
    num_parts: int
    resumed_parts: int
    part_bytes: int
    written_bytes: int
    seconds: float
    stages: StageSeconds
    operators: OperatorTable

    def summary(self) -> dict[str, Any]:
        """One JSON object."""
        totals = self.manifest.totals
        return {
            "output": str(self.output),
            **self.manifest.options,
            "parts": self.num_parts,
            "resumed_parts": self.resumed_parts,
            "bytes": self.part_bytes,
            "written_bytes": self.written_bytes,
            "seconds": self.seconds,
            "gb_per_s": self.written_bytes / 1e9 / self.seconds,
            "thread_seconds": {
                "transcode": self.stages.transcode,
                "hash": self.stages.digest,
                "write": self.stages.write,
                "sync": self.stages.sync,
            },
            "operators": {
                name: choice.provider
                for name, choice in self.operators.choices.items()
                if name in {item.action.value for item in self.plan.conversions}
            },
            "kinds": totals["kinds"],
            "passed_through": totals["passed_through"],
            "kept_rounded": totals["kept_rounded"],
        }


def sums_of(stats: RowStats | None) -> Sums | None:
    """Statistics as the journal keeps them."""
    return None if stats is None else tuple(map(float, astuple(stats)))


def weight_outcomes(
    parts: Iterable[Part], statistics: Mapping[str, tuple[Sums | None, ...]]
) -> dict[str, WeightOutcome]:
    """Every converted weight by name, in the order written; `statistics` is by file name.

    Ranks that hold the same rows count once, and ranks that hold different rows add up.
    """
    spans: dict[str, dict[tuple[int, int], RowStats]] = {}
    conversions: dict[str, Conversion] = {}
    for part in parts:
        for item, sums in zip(part.conversions, statistics[part.file_name], strict=True):
            if sums is None:
                continue
            rows, exact, changed, *errors = sums
            stats = RowStats(int(rows), int(exact), int(changed), *errors)
            conversions.setdefault(item.name, item)
            spans.setdefault(item.name, {})[item.kept_rows or (0, item.shape[0])] = stats
    return {
        name: WeightOutcome(conversions[name], _add(stats for _, stats in sorted(by_rows.items())))
        for name, by_rows in spans.items()
    }


def output_totals(
    plan: RepackPlan, files: Mapping[str, FileEntry], outcomes: Mapping[str, WeightOutcome]
) -> dict[str, Any]:
    """The manifest's totals: files, bytes, and a row per part of the model and form."""
    return {
        "files": len(files),
        "bytes": sum(entry.num_bytes for entry in files.values()),
        "kinds": _kinds(plan, outcomes),
        "passed_through": list(plan.unruled),
        "kept_rounded": list(plan.stuck),
    }


def report_lines(totals: Mapping[str, Any]) -> list[str]:
    """The totals for a terminal."""
    head = ("part", "from", "to", "tensors", "rows", "rows exact", "weights changed", "error", "absmax")
    rows = [head, *(_kind_cells(kind) for kind in totals["kinds"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    lines += _named("passed through unchanged, no recipe knows them", totals["passed_through"])
    lines += _named("stay rounded as they were packed", totals["kept_rounded"])
    return lines


def _named(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    rest = [f"  ... and {len(names) - SHOWN_NAMES:,} more"] if len(names) > SHOWN_NAMES else []
    return [f"{len(names):,} tensors {title}:", *(f"  {name}" for name in names[:SHOWN_NAMES]), *rest]


def _kinds(plan: RepackPlan, outcomes: Mapping[str, WeightOutcome]) -> list[dict[str, Any]]:
    members: dict[tuple[str, str, str], list[Conversion]] = {}
    for item in plan.conversions:
        key = (item.part or "of no part", item.before.value, item.after.value)
        members.setdefault(key, []).append(item)
    kinds = []
    for (part, before, after), items in members.items():
        found = [outcomes[item.name].stats for item in items if item.name in outcomes]
        row: dict[str, Any] = {"part": part, "from": before, "to": after, "tensors": len(items)}
        if found:
            row["weights"] = sum(prod(item.shape) for item in items)
            row |= _errors(_add(found))
        kinds.append(row)
    return kinds


def _kind_cells(kind: Mapping[str, Any]) -> tuple[str, ...]:
    names = (kind["part"], kind["from"], kind["to"], f"{kind['tensors']:,}")
    if "rows" not in kind:
        return (*names, "", "copied", "", "", "")
    exact = 100 * kind["exact_rows"] / max(1, kind["rows"])
    changed = 100 * kind["changed_weights"] / max(1, kind["weights"])
    return (
        *names,
        f"{kind['rows']:,}",
        # all or none is said as such only where it is so
        f"{exact:.4g}%" if kind["exact_rows"] in (0, kind["rows"]) else f"{min(exact, 99.9999):.6g}%",
        f"{kind['changed_weights']:,} ({changed:.3g}%)",
        f"{kind['relative_error']:.3g}",
        f"{kind['absmax_relative_error']:.3g}",
    )


def _errors(stats: RowStats) -> dict[str, Any]:
    norm = stats.squared_norm
    return {
        "rows": stats.rows,
        "exact_rows": stats.exact_rows,
        "changed_weights": stats.changed_weights,
        "relative_error": sqrt(stats.squared_error / norm) if norm else 0.0,
        "absmax_relative_error": sqrt(stats.absmax_squared_error / norm) if norm else 0.0,
    }


def _add(found: Iterable[RowStats]) -> RowStats:
    total = RowStats(0, 0, 0, 0.0, 0.0, 0.0)
    for stats in found:
        total += stats
    return total
