"""The page `python -m ascend_v4.bench.repack` writes, from the numbers it measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CLOCKS = {
    "cached": "Into the page cache (no contender syncs)",
    "synced": "Onto the disk (every contender syncs inside the clock)",
}


def render(result: Mapping[str, Any]) -> str:
    """Markdown, one table per question."""
    cases = result["cases"]
    lines = [
        "# repack beside plain writes of the same bytes on a CPU",
        "",
        f"- date: {result['date']}",
        f"- machine: {result['machine']}; file system {result['file_system']}",
        f"- command: `python -m ascend_v4.bench.repack` (2 threads each, median of {result['repeats']}, "
        "interleaved)",
        "- sources: random checkpoints in the release's layout, one shard each, in the page cache",
        "- repack's clock: plan, read, convert, hash (XXH3-128), write, manifest; the peers' clock: write",
        "- before each run a file of the same size is written and removed, so that the host has backed the "
        "pages",
        "- peers write repack's own output from memory, 1 MiB at a time, into new files",
        "",
    ]
    for clock, title in CLOCKS.items():
        timed = [case for case in cases if clock in case]
        if timed:
            lines += [f"## {title}", "", *_speed_table(timed, clock), ""]
    lines += ["## Memory", "", *_memory_table(cases), ""]
    lines += ["## The conversion alone", "", *_kernel_table(cases, result["kernels"]), ""]
    lines += ["## What the time is", "", *_time_table(cases), ""]
    return "\n".join(lines)


def _speed_table(cases: list[dict[str, Any]], clock: str) -> list[str]:
    peers = [name for name in cases[0][clock]["gb_per_s"] if name != "repack"]
    lines = [
        f"| case | output | repack | {' | '.join(peers)} | of the better of the first two | of the best "
        "| weights/s |",
        "|---|---:|---:|" + "---:|" * (len(peers) + 3),
    ]
    for case in cases:
        found = case[clock]
        rates = found["gb_per_s"]
        lines.append(
            f"| {case['case']} | {case['bytes'] / 1e9:.2f} GB | {rates['repack']:.2f} GB/s "
            + "".join(f"| {rates[name]:.2f} GB/s " for name in peers)
            + f"| **{found['of_better_peer']:.0%}** | {found['of_strictest_peer']:.0%} "
            f"| {found['weights_per_s'] / 1e9:.2f} billion |"
        )
    return [*lines, "", "Fastest and slowest run of each:", "", *_spreads(cases, clock)]


def _spreads(cases: list[dict[str, Any]], clock: str) -> list[str]:
    lines = []
    for case in cases:
        spans = [
            f"{name} {min(seconds):.2f} to {max(seconds):.2f} s"
            for name, seconds in case[clock]["seconds"].items()
        ]
        lines.append(f"- {case['case']}: {', '.join(spans)}")
    return lines


def _memory_table(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Anonymous and shared pages of the process, torch included, sampled every 5 ms.",
        "",
        "| case | before | peak | repack's own |",
        "|---|---:|---:|---:|",
    ]
    for case in cases:
        before, peak = case["memory_before_bytes"], case["memory_peak_bytes"]
        lines.append(
            f"| {case['case']} | {before / 2**20:.0f} MiB | {peak / 2**20:.0f} MiB "
            f"| {(peak - before) / 2**20:.0f} MiB |"
        )
    return lines


def _kernel_table(cases: list[dict[str, Any]], kernels: Mapping[str, Any]) -> list[str]:
    copied = kernels["memcpy_gb_per_s"]
    lines = [
        f"In memory, two threads, 1024 rows at a time; memcpy writes {copied:.1f} GB/s here.",
        "",
        "| conversion | weights/s | written | of memcpy |",
        "|---|---:|---:|---:|",
    ]
    for name in dict.fromkeys(case["kernel"] for case in cases):
        rate = kernels[name]
        lines.append(
            f"| {name} | {rate['weights_per_s'] / 1e9:.2f} billion | {rate['gb_per_s']:.1f} GB/s "
            f"| {rate['gb_per_s'] / copied:.0%} |"
        )
    return lines


def _time_table(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Of repack into the page cache, as shares of its two threads' time. `transcode` reads the source's "
        "pages and converts; `kernel` is what the conversion alone would take at the rate above, and part of "
        "it; `write` copies into new pages; `rest` is the plan, the manifest and waiting for the other "
        "thread.",
        "",
        "| case | share of the output | transcode | kernel | hash | write | rest | page faults |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        spent = case["cached"]["thread_seconds"]
        whole = sum(spent.values())
        kernel = case["kernel_thread_seconds"]
        lines.append(
            f"| {case['case']} | {case['share_of_bytes']:.0%} | {spent['transcode'] / whole:.0%} "
            f"| {kernel / whole:.0%} | {spent['hash'] / whole:.0%} | {spent['write'] / whole:.0%} "
            f"| {spent['rest'] / whole:.0%} | {case['cached']['page_faults']:,} |"
        )
    return lines
