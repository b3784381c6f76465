"""What a repack would write and how long it would take, without writing it.

Sizes follow from names and shapes, so a config alone is enough. Time follows from this machine: a sample of
each conversion is made, hashed and written to the disk that was named.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from ascend_v4.checkpoint.index import DTYPE_BYTES, expected_tensors
from ascend_v4.checkpoint.shards import find_shards
from ascend_v4.config import parse_model_config, read_config_fields, resolve_config_path
from ascend_v4.errors import CheckpointError
from ascend_v4.operators.select import OperatorTable
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.convert import ConversionRun, Scratch
from ascend_v4.repack.files import write_fully
from ascend_v4.repack.job import LaidOut, lay_out, open_source
from ascend_v4.repack.layouts import DocumentInputs, copied_files, disk_bytes
from ascend_v4.repack.on_device import operators_for, threads_of
from ascend_v4.repack.plan import Action, Conversion, plan_totals
from ascend_v4.repack.source_forms import SourceTensor, TensorKind

SAMPLE_SECONDS = 0.15
"""How long each kind of conversion is tried, after one warming round."""

SAMPLE_BYTES = 256 << 20
"""What a sample writes before it starts its file over."""

SAMPLE_ROWS_BYTES = 8 << 20
"""Bytes of the weight that a sample converts again and again."""

_UNIT_SCALE = 127


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """One target's output."""

    config: RepackConfig
    laid_out: LaidOut
    needed_bytes: int
    """Free bytes the run asks for before it starts."""

    @property
    def output_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.num_bytes for part in self.laid_out.parts)

    def summary(self) -> dict[str, Any]:
        """One JSON object."""
        totals = plan_totals(item for part in self.laid_out.parts for item in part.conversions)
        return {
            **self.config.options(self.laid_out.plan.recipe.name),
            "parts": len(self.laid_out.parts),
            "tensors": totals.num_tensors,
            "bytes": self.output_bytes,
            "needed_bytes": self.needed_bytes,
            "read_bytes": totals.read_bytes,
            "bytes_by_dtype": totals.bytes_by_dtype,
            "bytes_by_action": totals.bytes_by_action,
            "passed_through": list(self.laid_out.plan.unruled),
            "kept_rounded": list(self.laid_out.plan.stuck),
        }


def preview(config: RepackConfig) -> Preview:
    """Plan a repack of a checkpoint, or of the release that a config describes.

    `config.source` may be a directory, a config file or a shipped config's name.
    Raises CheckpointError, ConfigError as the repack itself would.
    """
    place = resolve_config_path(config.source)
    if place.is_dir() and find_shards(place):
        source = open_source(place, target=config.target)
        inputs = DocumentInputs(config_fields=source.fields, source=source.stamps.facts(), ranks=config.ranks)
        laid_out = lay_out(config, source.config, source.files.tensors, inputs, described=source.described)
        copied = sum(size for _, size in copied_files(place))
    else:
        fields = read_config_fields(place)
        model = parse_model_config(fields, source=str(place))
        inputs = DocumentInputs(config_fields=fields, ranks=config.ranks)
        laid_out = lay_out(config, model, expected_tensors(model), inputs)
        copied = 0
    needed = disk_bytes(laid_out.parts, laid_out.documents, copied_bytes=copied)
    return Preview(config=config, laid_out=laid_out, needed_bytes=needed)


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured on this machine."""

    threads: int
    bytes_per_s: dict[Action, float]
    """Of the output, all threads together."""


def measure_rates(
    previews: Iterable[Preview], *, directory: Path, jobs: int | None = None, device: str = "cpu"
) -> Rates:
    """Output bytes per second of every action in some previews: made, hashed and written into a directory.

    All threads work at once, each into a file without a name. Source pages are in memory already, and no sync
    is waited for: a slow disk makes the real run slower. Raises CheckpointError where nothing can be written
    there, DeviceError where the device cannot convert.
    """
    samples: dict[Action, Conversion] = {}
    for each in previews:
        for item in each.laid_out.plan.conversions:
            known = samples.get(item.action)
            if known is None or prod(item.shape) > prod(known.shape):
                samples[item.action] = item
    table = operators_for(device, samples.values())
    threads = threads_of(jobs, table, samples.values())
    measured = {
        action: _measure(_small(item), table, directory=directory, threads=threads)
        for action, item in samples.items()
    }
    return Rates(threads, measured)


def estimate_seconds(each: Preview, rates: Rates) -> float:
    """Seconds a repack takes at measured rates."""
    totals = plan_totals(item for part in each.laid_out.parts for item in part.conversions)
    rate_of = rates.bytes_per_s
    return sum(num_bytes / rate_of[Action(name)] for name, num_bytes in totals.bytes_by_action.items())


def free_bytes(directory: Path) -> tuple[Path, int]:
    """The directory, or the nearest above it that exists, and what is free there."""
    place = directory.resolve()
    while not place.is_dir():
        place = place.parent
    return place, shutil.disk_usage(place).free


class _SampleTensors:
    """Made-up source tensors: codes of every magnitude, scales of one."""

    def __init__(self, sources: Iterable[SourceTensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tensors: dict[str, Tensor] = {}
        for source in sources:
            num_bytes = prod(source.shape) * DTYPE_BYTES[source.dtype]
            values = torch.zeros(num_bytes, dtype=torch.uint8)
            if source.kind is TensorKind.SCALE and source.dtype in ("F8_E8M0", "U8"):
                values.fill_(_UNIT_SCALE)
            elif source.kind is TensorKind.WEIGHT and source.dtype in ("I8", "U8", "F8_E4M3"):
                values.random_(0, 256, generator=generator)
                # without the highest mantissa bit no FP8 code is NaN
                values &= 0xFB if source.dtype == "F8_E4M3" else 0xFF
            self._tensors[source.name] = values

    def bytes_of(self, name: str) -> Tensor:
        return self._tensors[name]

    def runs_of(self, name: str) -> Sequence[Tensor]:
        return (self._tensors[name],)

    def require_unchanged(self, names: Iterable[str]) -> None:
        """Nothing else knows the sample."""

    def release(self, names: Iterable[str]) -> None:
        """The sample is used again."""


def _small(item: Conversion) -> Conversion:
    """The same conversion of fewer rows, about a slab's worth for several threads."""
    rows = item.shape[0] if item.shape else 1
    row_bytes = max(1, item.outputs[0].num_bytes // max(1, rows))
    kept = min(rows, max(128, SAMPLE_ROWS_BYTES // row_bytes // 128 * 128))

    def fewer(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (-(-shape[0] * kept // rows), *shape[1:]) if shape else shape

    return replace(
        item,
        shape=fewer(item.shape),
        sources=tuple(replace(source, shape=fewer(source.shape)) for source in item.sources),
        outputs=tuple(replace(output, shape=fewer(output.shape)) for output in item.outputs),
    )


def _measure(item: Conversion, table: OperatorTable, *, directory: Path, threads: int) -> float:
    sample = _SampleTensors(item.sources)

    def work(seconds: float) -> int:
        scratch, digest, done_bytes = Scratch(), xxhash.xxh3_128(), 0
        with tempfile.TemporaryFile(dir=directory, buffering=0) as stream:
            started = time.perf_counter()
            while time.perf_counter() - started < seconds:
                run = ConversionRun(item, sample, table, scratch)
                for output in item.outputs:
                    for chunk in run.chunks(output):
                        digest.update(chunk)
                        write_fully(stream.fileno(), chunk)
                        done_bytes += len(chunk)
                if stream.tell() > SAMPLE_BYTES:
                    stream.seek(0)
        return done_bytes

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, [0.0] * threads))
            started = time.perf_counter()
            done_bytes = sum(pool.map(work, [SAMPLE_SECONDS] * threads))
            return done_bytes / (time.perf_counter() - started)
    except OSError as error:
        raise CheckpointError(
            f"nothing can be written to {directory} to measure it: {error.strerror or error}. Name an output "
            "directory on a disk that can be written."
        ) from None
