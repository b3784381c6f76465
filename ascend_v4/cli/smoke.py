"""`ascend-v4 smoke`: the first command on a new machine, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ascend_v4.cli.options import DeviceOptions, device_options
from ascend_v4.cli.output import emit_json, say

PARTS = ("device", "operators", "layer", "model", "chat", "repeat", "memory")
EXIT_FAILED = 1
PIPE_WIDTH = 300
COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option(
    "--only",
    type=click.Choice(PARTS),
    multiple=True,
    help="Run this part only. May be given several times.",
)
@click.option(
    "--operator",
    "operators",
    multiple=True,
    metavar="NAME",
    help="Check this operator only. May be given several times.",
)
@click.option(
    "--require",
    "required",
    type=click.Choice(["npu", "cuda"]),
    help="Use this device, and count as failed whatever would be skipped.",
)
@click.option(
    "--largest", is_flag=True, help="Also the operators' cases of released sizes: minutes and gigabytes."
)
@device_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with the device's facts.")
@click.pass_context
def command(
    context: click.Context,
    *,
    checkpoint: Path | None,
    only: tuple[str, ...],
    operators: tuple[str, ...],
    required: str | None,
    largest: bool,
    on: DeviceOptions,
    as_json: bool,
) -> None:
    """Check a device from its operators to a conversation, and say what to try where something fails.

    Without CHECKPOINT, models are drawn at random from configs that come with this package. A failed check
    stops no other. The exit status is 0 when nothing failed, 1 when something did, 2 for wrong usage.
    """
    from dataclasses import replace

    from ascend_v4.smoke import SmokeConfig, run_smoke

    target = on.request()
    if required is not None and required != target.device:
        if context.get_parameter_source("device") is not ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--require {required} and --device {target.device} contradict each other."
            )
        target = replace(target, device=required)
    config = SmokeConfig(
        target=target,
        checkpoint=checkpoint,
        only=frozenset(only),
        operators=operators,
        required=required,
        largest=largest,
    )
    report = run_smoke(config, announce=lambda row: say(progress_line(row.to_json()))).to_json()
    if as_json:
        emit_json(report)
    else:
        print_table(report)
        say_other_devices(report)
    if report["counts"]["failed"]:
        context.exit(EXIT_FAILED)


def progress_line(row: Mapping[str, Any]) -> str:
    """One line while the checks run."""
    return f"{row['status']:7} {row['part']}: {row['name']} ({row['seconds']:.1f} s)"


def print_table(report: Mapping[str, Any]) -> None:
    """All rows on stdout; what failed again below them, each with the one thing to try."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        # in a file or a pipe a row stays a line, however long
        console.width = PIPE_WIDTH
    table = Table(box=None, pad_edge=False)
    for heading in ("", "part", "check", "s", "difference", "bound", "what was compared"):
        table.add_column(heading, justify="right" if heading in ("s", "difference", "bound") else "left")
    for row in report["rows"]:
        table.add_row(
            f"[{COLOURS[row['status']]}]{row['status']}[/]",
            row["part"],
            escape(row["name"]),
            f"{row['seconds']:.1f}",
            _number(row["difference"]),
            _number(row["bound"]),
            escape(row["compared"] or row["why"] or ""),
        )
    console.print(table)
    for row in report["rows"]:
        if row["status"] == "failed":
            click.echo(f"\n{row['part']}: {row['name']}: {_reason(row)}\n  try: {row['do']}")
    counted = ", ".join(f"{count} {status}" for status, count in report["counts"].items())
    click.echo(f"\n{counted} in {report['seconds']:.0f} s on {_where(report)}")


def say_other_devices(report: Mapping[str, Any]) -> None:
    """Where a run on the CPU left a device of this machine unused, its command."""
    for kind in ("npu", "cuda"):
        if report["device"] == "cpu" and report["facts"][kind]["devices"]:
            say(f"this machine has {kind} devices: ascend-v4 smoke --require {kind}")


def _reason(row: Mapping[str, Any]) -> str:
    bound = f"{row['measure']} is {_number(row['difference'])}, {_number(row['bound'])} is allowed"
    return str(row["why"] or bound)


def _where(report: Mapping[str, Any]) -> str:
    chip = "" if report["chip"] is None else f" ({report['chip']})"
    waived = f", limits waived: {', '.join(report['waived_limits'])}" if report["waived_limits"] else ""
    return f"{report['device']}{chip}{waived}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
