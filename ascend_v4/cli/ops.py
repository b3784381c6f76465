"""`ascend-v4 ops`: which implementation of every operator a device would run, and why not another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import click

from ascend_v4.cli.options import DeviceOptions, device_options
from ascend_v4.cli.output import emit_json, say
from ascend_v4.errors import ConfigError, NoImplementationError

NOTHING = "nothing"


@click.command()
@click.argument("model", metavar="[CONFIG|CHECKPOINT]", default="flash")
@device_options
@click.option(
    "--tp",
    "attention_parallel",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    metavar="N",
    help="Ranks that share the attention heads.",
)
@click.option("--candidates", is_flag=True, help="Also print what each candidate needs and its limits.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every candidate.")
def command(
    *, model: str, on: DeviceOptions, attention_parallel: int, candidates: bool, as_json: bool
) -> None:
    """List each operator that a model calls on a device: the chosen implementation, those refused and why.

    The model, a config file, a checkpoint, or one of flash, pro, tiny, decides the sizes that operators have
    limits on; flash unless given. Where an operator has no implementation the exit status is 2, and the list
    is printed all the same.
    """
    from ascend_v4.config import ModelConfig, resolve_config_path
    from ascend_v4.model.sizes import model_sizes, require_attention_parallel
    from ascend_v4.operators.status import host_operators, operator_rows
    from ascend_v4.operators.targets import open_target

    config = ModelConfig.from_file(resolve_config_path(model))
    target = open_target(on.request())
    trouble: ConfigError | None = None
    try:
        require_attention_parallel(config, attention_parallel, chip=target.chip, waived=target.waived)
    except ConfigError as error:
        trouble = error
    sizes = model_sizes(config, attention_parallel=attention_parallel)
    rows = [asdict(row) for row in operator_rows(target, sizes)]
    missing = [row["operator"] for row in rows if not row["provider"]]
    report = {
        "device": target.device,
        "chip": None if target.chip is None else target.chip.value,
        "model": model,
        "waived_limits": sorted(target.waived),
        "without": sorted(target.masked),
        "sizes": sizes,
        "operators": rows,
        "too_slow": too_slow(rows),
        "missing": missing,
        "host": [{"operator": name, "called_by": who} for name, who in host_operators()],
        "problem": None if trouble is None else str(trouble),
    }
    if as_json:
        emit_json(report)
    else:
        click.echo(f"operators of {model} on {target.describe()}")
        for line in (*table_lines(report, with_candidates=candidates), *summary_lines(report)):
            click.echo(line)
    if trouble is not None:
        raise trouble
    if missing:
        raise NoImplementationError(
            f"{len(missing)} operator(s) have nothing usable on {target.describe()}: "
            f"{', '.join(missing)}. The list says what each candidate lacks."
        )
    if target.waived and any(row_waives(row) for row in rows):
        say("limits were waived: what runs like this counts as simulated (waived)")


def row_waives(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Sizes that the chosen candidate takes only because they are waived."""
    chosen = _chosen(row)
    return () if chosen is None else tuple(chosen["waived"])


def too_slow(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Operators whose chosen implementation is too slow to serve with, and why."""
    found = {row["operator"]: (_chosen(row) or {}).get("too_slow") for row in rows}
    return {name: reason for name, reason in found.items() if reason is not None}


def table_lines(report: Mapping[str, Any], *, with_candidates: bool) -> Iterator[str]:
    """One line per operator, and below it one for every candidate that was refused before the chosen one."""
    rows = report["operators"]
    width = max((len(row["operator"]) for row in rows), default=0)
    for row in rows:
        chosen = _chosen(row)
        notes = [] if chosen is None else [chosen["verified"], *(["too slow"] if chosen["too_slow"] else [])]
        yield f"{row['operator']:{width}}  {row['provider'] or NOTHING:14} {', '.join(notes)}".rstrip()
        for candidate in row["candidates"]:
            if not candidate["is_for_chip"]:
                continue
            if candidate["reason"] is not None:
                yield f"{'':{width}}  not {candidate['provider']}: {candidate['reason']}"
            if with_candidates:
                limits = "; ".join(candidate["limits"]) or "none"
                yield f"{'':{width}}  {candidate['provider']} needs {candidate['needs']}; limits: {limits}"


def summary_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """What is slow, what is waived, what never reaches a device."""
    for name, reason in report["too_slow"].items():
        yield f"too slow to serve: {name}: {reason}"
    waived = sorted({size for row in report["operators"] for size in row_waives(row)})
    if waived:
        sizes = ", ".join(f"{name} {report['sizes'][name]}" for name in waived)
        yield f"waived: {sizes}"
    yield f"host: {', '.join(each['operator'] for each in report['host'])}"


def _chosen(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((each for each in row["candidates"] if each["is_chosen"]), None)
