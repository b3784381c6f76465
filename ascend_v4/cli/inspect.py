"""`ascend-v4 inspect`: what a checkpoint or a config is, and what its files lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ascend_v4.cli.output import emit_json, say

SHOWN_NAMES = 20


@click.command()
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with every name in full.")
def command(path: str, as_json: bool) -> None:
    """Describe a checkpoint or a config.json and list what differs.

    PATH is a checkpoint directory, a config file (.json, .yaml), or one of flash, pro, tiny. A bare config is
    described as its release-layout checkpoint would be.

    Files that are damaged or contradict the config are listed on stderr, and the exit status is 2.
    """
    from ascend_v4.checkpoint.describe import examine
    from ascend_v4.checkpoint.shards import raise_problems

    description = examine(path)
    if as_json:
        emit_json(description.summary)
    else:
        for line in summary_lines(description.summary):
            click.echo(line)
    raise_problems(description.damage, source=path)
    missing = description.summary["missing"]
    if missing:
        say(f"warning: {len(missing)} tensors are missing; this checkpoint cannot be loaded.")


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary for a terminal."""
    layers, parameters = summary["layers"], summary["parameters"]
    formats = summary["quantization"]
    lines = [
        f"model        {summary['model_type']}, linears {formats['linears']}, experts {formats['experts']}",
        f"layers       {layers['swa']} SWA, {layers['csa']} CSA, {layers['hca']} HCA, {layers['mtp']} MTP",
        "parameters   " + ", ".join(f"{parameters[part]:,} {part}" for part in ("total", "active", "mtp")),
        f"tensors      {summary['tensors']:,} in {summary['bytes']:,} bytes",
    ]
    lines += [
        f"  {dtype:10} {count:,} in {summary['dtype_bytes'][dtype]:,} bytes"
        for dtype, count in summary["dtypes"].items()
    ]
    if summary["shards"] is None:
        lines.append("files        none; counted as the release lays them out")
    else:
        lines.append(f"files        {len(summary['shards'])} shards")
        lines += _name_lines("missing", summary["missing"]) + _name_lines("unexpected", summary["unexpected"])
    if summary["draft_fields"] is not None:
        lines.append(f"draft        {', '.join(summary['draft_fields'])}: its mtp tensors are never loaded")
        lines += _name_lines("of drafts", summary["draft_tensors"] or [])
    if summary["ignored_fields"]:
        lines.append(f"ignored      config fields {', '.join(summary['ignored_fields'])}")
    return lines


def _name_lines(title: str, names: list[str]) -> list[str]:
    if not names:
        return [f"{title:12} none"]
    rest = [f"  ... and {len(names) - SHOWN_NAMES:,} more"] if len(names) > SHOWN_NAMES else []
    return [f"{title:12} {len(names):,}", *(f"  {name}" for name in names[:SHOWN_NAMES]), *rest]
