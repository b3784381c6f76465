"""What this machine can do at most: GEMM rate, memory bandwidth, and what it is called."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

GEMM_EDGE = 1024
COPY_BYTES = 256 << 20
REPEATS = 7


def describe_machine() -> str:
    """Processor, cores, threads and versions in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
        cores = f"{len(names)} cores" if names else "cores unknown"
    else:
        cores = "cores unknown"
    return (
        f"{model}, {cores}, {torch.get_num_threads()} threads, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def best_seconds(run: Callable[[], object], *, repeats: int = REPEATS) -> float:
    """Shortest of several runs, after one to warm up: for limits, where noise only ever adds."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def median_seconds(times: list[float]) -> float:
    """The middle one."""
    return statistics.median(times)


def gemm_flops_per_second() -> float:
    """Float32 rate of a large square matrix product."""
    left, right = torch.randn(GEMM_EDGE, GEMM_EDGE), torch.randn(GEMM_EDGE, GEMM_EDGE)
    return float(2 * GEMM_EDGE**3 / best_seconds(lambda: left @ right))


def read_bytes_per_second() -> float:
    """Rate at which a sum reads a block larger than the caches."""
    block = torch.ones(COPY_BYTES // 4)
    return COPY_BYTES / best_seconds(block.sum)
