"""The conversions alone, beside memcpy: in cache and in memory, on one thread and on two.

    python -m ascend_v4.bench.transcode

A rate is weights per second; the last column is what memcpy does with the same bytes written. Every buffer
was written before it is timed, so that the host has backed its pages.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from ascend_v4.operators.contracts import transcode, transcode_exact
from ascend_v4.operators.contracts.quantize import FP4_GROUP, WEIGHT_BLOCK
from ascend_v4.operators.contracts.transcode import Rounding
from ascend_v4.operators.select import OperatorTable, select

WIDTH = 4096
CACHED_ROWS = 64
"""A slab of 256 thousand weights: input and output stay in the second cache."""
SLAB_ROWS = 1024
"""Rows of one call in memory, as `repack` makes them."""
LEAST_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Buffers:
    """Sources and outputs of one thread."""

    fp4: Tensor
    fp4_scale: Tensor
    fp8: Tensor
    fp8_scale: Tensor
    bf16: Tensor
    int8: Tensor
    int4: Tensor
    wide: Tensor
    row_scale: Tensor
    bias: Tensor
    mx_scale: Tensor
    fp4_as_int8: Tensor
    int8_scale: Tensor
    fp4_numbers: Tensor
    """The FP4 weights in the forms that go back."""
    fp4_again: Tensor

    @classmethod
    def drawn(cls, num_rows: int, seed: int) -> Buffers:
        """Gaussian-like weights: a group's scale is one of two neighbours in nine rows of ten."""
        generator = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)

        blocks = (-(-num_rows // WEIGHT_BLOCK), WIDTH // WEIGHT_BLOCK)
        fp8 = integers(0, 0x7F, num_rows, WIDTH)
        fp4 = integers(0, 256, num_rows, WIDTH // 2).view(torch.int8)
        fp4_scale = integers(118, 121, num_rows, WIDTH // FP4_GROUP)
        as_int8, int8_scale = torch.zeros(num_rows, WIDTH, dtype=torch.int8), torch.zeros(num_rows)
        numbers = torch.zeros(num_rows, WIDTH, dtype=torch.bfloat16)
        table = select("cpu", allow_reference=True)
        table[transcode.fp4_to_int8](fp4, fp4_scale, as_int8, int8_scale, rounding=Rounding.EXACT)
        table[transcode_exact.fp4_to_bf16](fp4, fp4_scale, numbers)
        return cls(
            fp4=fp4,
            fp4_scale=fp4_scale,
            fp8=fp8.view(torch.float8_e4m3fn),
            fp8_scale=integers(110, 113, *blocks),
            bf16=torch.randn(num_rows, WIDTH, generator=generator).to(torch.bfloat16),
            int8=torch.zeros(num_rows, WIDTH, dtype=torch.int8),
            int4=torch.zeros(num_rows // 2, WIDTH, dtype=torch.int8),
            wide=torch.zeros(num_rows, WIDTH, dtype=torch.bfloat16),
            row_scale=torch.zeros(num_rows),
            bias=torch.zeros(num_rows, 1),
            mx_scale=torch.zeros(num_rows, WIDTH // FP4_GROUP, dtype=torch.uint8),
            fp4_as_int8=as_int8,
            int8_scale=int8_scale,
            fp4_numbers=numbers,
            fp4_again=torch.zeros(num_rows, WIDTH // 2, dtype=torch.int8),
        )


Step = Callable[[Buffers, slice], object]


def conversions(table: OperatorTable) -> dict[str, tuple[Step, float]]:
    """Each conversion on a run of rows, and the bytes it writes per weight."""
    to_int8, to_int4 = table[transcode.fp4_to_int8], table[transcode.fp4_to_int4]
    fp8_int8, bf16_int8 = table[transcode.fp8_to_int8], table[transcode.bf16_to_int8]
    fp4_bf16, fp8_bf16 = table[transcode_exact.fp4_to_bf16], table[transcode_exact.fp8_to_bf16]
    to_mx = table[transcode_exact.fp8_scale_to_mx]
    int8_fp4, bf16_fp4 = table[transcode_exact.int8_to_fp4], table[transcode_exact.bf16_to_fp4]
    to_scale = table[transcode_exact.derive_fp4_scale]

    def halves(rows: slice) -> slice:
        return slice(rows.start // 2, rows.stop // 2)

    def fp8_to_mx(b: Buffers, rows: slice) -> None:
        b.int8[rows].copy_(b.fp8.view(torch.int8)[rows])
        to_mx(b.fp8_scale, b.mx_scale[rows], first_row=rows.start)

    def fp4_to_mx(b: Buffers, rows: slice) -> None:
        b.int4[halves(rows)].view(-1).copy_(b.fp4[rows].view(-1))
        b.mx_scale[rows].copy_(b.fp4_scale[rows])

    def back_from_bf16(b: Buffers, rows: slice) -> None:
        to_scale(b.fp4_numbers[rows], b.mx_scale[rows])
        bf16_fp4(b.fp4_numbers[rows], b.mx_scale[rows], b.fp4_again[rows])

    return {
        "fp4 to int8, exact": (
            lambda b, r: to_int8(
                b.fp4[r], b.fp4_scale[r], b.int8[r], b.row_scale[r], rounding=Rounding.EXACT
            ),
            1.0,
        ),
        "fp4 to int8, absmax": (
            lambda b, r: to_int8(
                b.fp4[r], b.fp4_scale[r], b.int8[r], b.row_scale[r], rounding=Rounding.ABSMAX
            ),
            1.0,
        ),
        "fp4 to int4": (
            lambda b, r: to_int4(b.fp4[r], b.fp4_scale[r], b.int4[halves(r)], b.row_scale[r], b.bias[r]),
            0.5,
        ),
        "fp4 to bf16": (lambda b, r: fp4_bf16(b.fp4[r], b.fp4_scale[r], b.wide[r]), 2.0),
        "fp4 to mx (copy)": (fp4_to_mx, 0.53125),
        "fp8 to int8": (
            lambda b, r: fp8_int8(b.fp8[r], b.fp8_scale, b.int8[r], b.row_scale[r], first_row=r.start),
            1.0,
        ),
        "fp8 to bf16": (lambda b, r: fp8_bf16(b.fp8[r], b.fp8_scale, b.wide[r], first_row=r.start), 2.0),
        "fp8 to mx": (fp8_to_mx, 1.03125),
        "int8 to fp4": (
            lambda b, r: int8_fp4(b.fp4_as_int8[r], b.int8_scale[r], b.fp4_scale[r], None, b.fp4_again[r]),
            0.5,
        ),
        "bf16 to fp4": (back_from_bf16, 0.53125),
        "bf16 to int8": (lambda b, r: bf16_int8(b.bf16[r], b.int8[r], b.row_scale[r]), 1.0),
    }


def weights_per_second(step: Step, buffers: list[Buffers], *, repeats: int) -> float:
    """Median rate of all threads together, each walking its own buffers in slabs."""

    def walk(mine: Buffers, walks: int) -> None:
        num_rows = len(mine.int8)
        slab = min(SLAB_ROWS, num_rows)
        for low in [*range(0, num_rows, slab)] * walks:
            step(mine, slice(low, min(low + slab, num_rows)))

    def once(pool: ThreadPoolExecutor, walks: int) -> float:
        start = time.perf_counter()
        list(pool.map(lambda mine: walk(mine, walks), buffers))
        return time.perf_counter() - start

    weights = sum(each.int8.numel() for each in buffers)
    with ThreadPoolExecutor(len(buffers)) as pool:
        once(pool, 1)
        walks = max(1, int(LEAST_SECONDS / once(pool, 1)))
        return weights * walks / statistics.median(once(pool, walks) for _ in range(repeats))


def copy_bytes_per_second(buffers: list[Buffers], *, repeats: int) -> float:
    """memcpy between buffers of the same places, slab by slab, in bytes written."""

    def step(b: Buffers, rows: slice) -> None:
        b.int8[rows].copy_(b.fp8.view(torch.int8)[rows])

    return weights_per_second(step, buffers, repeats=repeats)


@click.command()
@click.option("--rows", default=16384, show_default=True, type=click.IntRange(256, 1 << 20))
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1, 100))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1, 64))
def main(*, rows: int, repeats: int, threads: int) -> None:
    """Print the rates as a table, then as one line of JSON."""
    # torch's own copies would otherwise use every core for one of the threads.
    torch.set_num_threads(1)
    table = select("cpu", allow_reference=True)
    steps = conversions(table)
    places = {
        "cache, 1 thread": [Buffers.drawn(CACHED_ROWS, 0)],
        "memory, 1 thread": [Buffers.drawn(rows // threads, 0)],
        f"memory, {threads} threads": [Buffers.drawn(rows // threads, seed) for seed in range(threads)],
    }
    rates = {}
    for place, buffers in places.items():
        copied = copy_bytes_per_second(buffers, repeats=repeats)
        rates[place] = {"memcpy_bytes_per_s": copied}
        print(f"\n{place}: memcpy writes {copied / 1e9:.1f} GB/s")
        print(f"{'':24}{'Gweights/s':>12}{'written GB/s':>14}{'of memcpy':>12}")
        for name, (step, written_bytes) in steps.items():
            rate = weights_per_second(step, buffers, repeats=repeats)
            rates[place][name] = rate
            share = rate * written_bytes / copied
            print(f"{name:24}{rate / 1e9:12.2f}{rate * written_bytes / 1e9:14.2f}{share:12.0%}")
    provider = table.choices[transcode.fp4_to_int8.name].provider
    click.echo(json.dumps({"provider": provider, "weights_per_s": rates}))


if __name__ == "__main__":
    main()
