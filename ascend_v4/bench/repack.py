"""`make bench`, second half: repack beside plain writes of the same bytes, in one run on one file system.

    python -m ascend_v4.bench.repack --output FILE.md

Repack's clock holds everything: planning, reading, converting, hashing, writing, the manifest. Before every
timed run a file of the same size is written and removed, so that all write into pages the host has backed.
"""

from __future__ import annotations

import datetime
import gc
import json
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from ascend_v4.bench.machine import describe_machine, median_seconds
from ascend_v4.bench.repack_cases import CASES, Case, make_source
from ascend_v4.bench.repack_peers import (
    BETTER_OF,
    PEERS,
    THREADS,
    Payload,
    back_pages,
    syncs_left_out,
)
from ascend_v4.bench.repack_report import render
from ascend_v4.bench.transcode import Buffers, conversions, copy_bytes_per_second, weights_per_second
from ascend_v4.operators.select import select
from ascend_v4.repack.job import Job
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.writer import StageSeconds

REPACK = "repack"
KERNEL_ROWS = 8192
SAMPLE_SECONDS = 0.005
STATUS_FILE = Path("/proc/self/status")


@dataclass(slots=True)
class Runs:
    """Timed runs of one case: seconds by contender, and what repack said of its own."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    stages: list[StageSeconds] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)


@click.command()
@click.option("--scale", default=1, show_default=True, type=click.IntRange(1, 64), help="Times 1.6 GB.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1, 100))
@click.option("--case", "only", multiple=True, help="Part of a case's name; default: all.")
@click.option(
    "--workspace", type=click.Path(path_type=Path, file_okay=False), help="Directory on the disk to measure."
)
@click.option("--output", type=click.Path(path_type=Path), help="Markdown file for the tables.")
def main(
    *, scale: int, repeats: int, only: tuple[str, ...], workspace: Path | None, output: Path | None
) -> None:
    """Time repack and its peers on each case, interleaved, and report medians."""
    cases = [case for case in CASES if not only or any(part in case.name for part in only)]
    if not cases:
        raise click.BadParameter(f"no case has that in its name: {', '.join(case.name for case in CASES)}.")
    rows = []
    with tempfile.TemporaryDirectory(dir=workspace, prefix="bench-repack-") as made:
        disk = Path(made)
        for source in sorted({case.source for case in cases}):
            say(f"making the source {source}")
            directory = make_source(source, disk, scale=scale)
            rows += [
                _measure(case, directory, disk, repeats=repeats) for case in cases if case.source == source
            ]
            shutil.rmtree(directory)
        disk_name = _file_system(disk)
    kernels = _kernel_rates([case.kernel for case in cases], repeats=repeats)
    for row in rows:
        rate = kernels[row["kernel"]]["weights_per_s"]
        row["kernel_thread_seconds"] = THREADS * row["weights"] / rate
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "file_system": disk_name,
        "repeats": repeats,
        "cases": rows,
        "kernels": kernels,
    }
    text = render(result)
    say(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        say(f"written to {output}")
    click.echo(json.dumps(result))


def say(text: str) -> None:
    """One line on stderr; stdout carries the JSON result alone."""
    click.echo(text, err=True)


def _measure(case: Case, source: Path, disk: Path, *, repeats: int) -> dict[str, Any]:
    """All numbers of one case."""
    jobs: list[Job] = []
    config = case.config(source, disk / "warm-up", jobs=THREADS)
    with PeakMemory() as memory:
        run_repack(config, on_plan=jobs.append)
    weights, share = case.counted(jobs[0])
    part_bytes = jobs[0].part_bytes
    payload = _payload(jobs[0], disk / "warm-up")
    shutil.rmtree(disk / "warm-up")
    jobs.clear()
    say(f"{case.name}: {part_bytes / 1e9:.2f} GB")
    clocks: dict[str, Callable[[], AbstractContextManager[None]]] = {"cached": syncs_left_out}
    if case.synced:
        clocks["synced"] = nullcontext
    found: dict[str, Any] = {
        "case": case.name,
        "kernel": case.kernel,
        "weights": weights,
        "bytes": part_bytes,
        "share_of_bytes": share,
        "memory_before_bytes": memory.before_bytes,
        "memory_peak_bytes": memory.peak_bytes,
    }
    for clock, guard in clocks.items():
        with guard():
            runs = _race(case, source, disk, payload, repeats=repeats)
        found[clock] = _summary(runs, weights=weights, num_bytes=part_bytes)
    return found


def _race(case: Case, source: Path, disk: Path, payload: Payload, *, repeats: int) -> Runs:
    runs = Runs()
    for _ in range(repeats):
        for peer in PEERS:

            def write(directory: Path, write: Callable[[Path, Payload], None] = peer.write) -> None:
                directory.mkdir()
                write(directory, payload)

            runs.seconds.setdefault(peer.name, []).append(_timed(write, disk, len(payload)))

        def repack(directory: Path) -> None:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            runs.stages.append(run_repack(case.config(source, directory, jobs=THREADS)).stages)
            runs.faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

        runs.seconds.setdefault(REPACK, []).append(_timed(repack, disk, len(payload)))
    return runs


def _timed(write: Callable[[Path], None], disk: Path, num_bytes: int) -> float:
    back_pages(disk / "scratch", num_bytes)
    target = disk / "run"
    # what earlier runs left to collect is no contender's: a walk over torch's objects takes 50 ms
    gc.collect()
    started = time.perf_counter()
    write(target)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def _payload(job: Job, directory: Path) -> Payload:
    """The bytes of all parts in memory."""
    payload = np.empty(job.part_bytes, np.uint8)
    start = 0
    for part in job.parts:
        with (directory / part.file_name).open("rb", buffering=0) as stream:
            end = start + part.num_bytes
            while start < end:
                start += stream.readinto(payload.data[start:end])
    return payload


def _summary(runs: Runs, *, weights: int, num_bytes: int) -> dict[str, Any]:
    medians = {name: median_seconds(seconds) for name, seconds in runs.seconds.items()}
    best = min(medians[peer.name] for peer in BETTER_OF)
    strictest = min(medians[peer.name] for peer in PEERS)
    own = medians[REPACK]
    # the shares of the run whose time is reported
    middle = min(range(len(runs.stages)), key=lambda index: abs(runs.seconds[REPACK][index] - own))
    stages = runs.stages[middle]
    busy = stages.transcode + stages.digest + stages.write
    return {
        "seconds": runs.seconds,
        "gb_per_s": {name: num_bytes / 1e9 / seconds for name, seconds in medians.items()},
        "weights_per_s": weights / own,
        "of_better_peer": best / own,
        "of_strictest_peer": strictest / own,
        "thread_seconds": {
            "transcode": stages.transcode,
            "hash": stages.digest,
            "write": stages.write,
            # the two workers' time outside of parts: plan, manifest, the last part of the other one, syncs
            "rest": THREADS * runs.seconds[REPACK][middle] - busy,
        },
        "page_faults": runs.faults[middle],
    }


def _kernel_rates(names: list[str], *, repeats: int) -> dict[str, Any]:
    threads = torch.get_num_threads()
    # torch's own copies would otherwise use every core for one of the threads
    torch.set_num_threads(1)
    table = select("cpu")
    buffers = [Buffers.drawn(KERNEL_ROWS, seed) for seed in range(THREADS)]
    steps = conversions(table)
    rates: dict[str, Any] = {"memcpy_gb_per_s": copy_bytes_per_second(buffers, repeats=repeats) / 1e9}
    for name in names:
        step, written_bytes = steps[name]
        rate = weights_per_second(step, buffers, repeats=repeats)
        rates[name] = {"weights_per_s": rate, "gb_per_s": rate * written_bytes / 1e9}
    torch.set_num_threads(threads)
    return rates


def _file_system(path: Path) -> str:
    """Type of the file system a path lies on, as the system lists it."""
    mounts = Path("/proc/self/mounts")
    if not mounts.is_file():
        return "unknown"
    best, kind = "", "unknown"
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, name, *_ = line.split()
        inside = path.resolve().is_relative_to(point)
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


class PeakMemory:
    """Highest sum of anonymous and shared pages of this process while it is entered, by sampling.

    Mapped files do not count: the system takes their pages back when it wants them. Zero where there is no
    /proc.
    """

    def __init__(self) -> None:
        self.before_bytes = _held_bytes()
        self.peak_bytes = self.before_bytes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, _held_bytes())


def _held_bytes() -> int:
    if not STATUS_FILE.is_file():
        return 0
    kept = [
        int(line.split()[1]) * 1024
        for line in STATUS_FILE.read_text(encoding="ascii", errors="replace").splitlines()
        if line.startswith(("RssAnon:", "RssShmem:"))
    ]
    return sum(kept)


if __name__ == "__main__":
    main()
