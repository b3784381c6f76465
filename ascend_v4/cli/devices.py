"""`ascend-v4 devices`: what this machine can run on, and what keeps the rest from being used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from ascend_v4.cli.output import emit_json

GIB = 1 << 30


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(*, as_json: bool) -> None:
    """List the devices of this machine: chip, memory, driver, software, and what keeps others from use.

    Works without torch_npu, without CANN and beside an installation that is broken. The exit status is 0
    whatever was found.
    """
    from ascend_v4.device.inventory import take_inventory

    found = take_inventory()
    if as_json:
        emit_json(found)
        return
    for line in report_lines(found):
        click.echo(line)


def report_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The report for a terminal."""
    cpu = found["cpu"]
    yield f"torch     {found['torch'] or 'cannot be imported'}"
    yield from _problem_lines(found["problem"])
    yield f"cpu       {cpu['name']}, {cpu['threads']} threads, {_memory(cpu['memory'])}"
    yield from _device_lines("cuda", found["cuda"]["devices"])
    yield from _problem_lines(found["cuda"]["problem"], kind="cuda")
    npu = found["npu"]
    yield from _device_lines("npu", npu["devices"])
    yield from _problem_lines(npu["problem"], kind="npu")
    software = {"driver": npu["driver"], "CANN": npu["cann"], **npu["packages"]}
    there = ", ".join(f"{name} {version}" for name, version in software.items() if version)
    absent = ", ".join(name for name, version in software.items() if not version)
    yield f"          {'; '.join(filter(None, (there, f'not found: {absent}' if absent else '')))}"
    chips = ", ".join(f"{chip} ({products})" for chip, products in found["sim"]["chips"].items())
    yield f"sim       --device sim --chip {chips}"


def _device_lines(kind: str, devices: list[dict[str, Any]]) -> Iterator[str]:
    for device in devices:
        chip = f" ({device['chip']})" if device.get("chip") else ""
        memory = _memory(device["memory"]) if device["memory"] else "memory unknown: another process holds it"
        place = f"{kind}:{device['index']}"
        yield f"{place:9} {device['name']}{chip}, {memory}"
    for device in devices[:1]:
        if device.get("formats"):
            yield f"          computes {', '.join(device['formats'])}; runs {', '.join(device['packs'])}"
            yield from (f"          {limit}" for limit in device["limits"])


def _problem_lines(problem: Mapping[str, str] | None, *, kind: str = "") -> Iterator[str]:
    if problem is not None:
        do = f" {problem['do']}." if problem["do"] else ""
        yield f"{kind:9} {problem['what']}.{do}"


def _memory(memory: Mapping[str, int]) -> str:
    return f"{memory['free_bytes'] / GIB:.1f} of {memory['total_bytes'] / GIB:.1f} GiB free"
