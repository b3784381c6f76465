"""Checks a finished output: every byte against its manifest, and on request every number against its source.

Without a source: sizes and hashes of all files, headers, index, and no file too many. With one: the source is
converted again and compared byte for byte, and a decoder that shares nothing with the converting operators
counts the weights that changed.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.checkpoint.shards import MAX_HEADER_BYTES, Problem, scan_shards
from ascend_v4.errors import CheckpointError
from ascend_v4.repack.config import RepackConfig, default_threads
from ascend_v4.repack.convert import Scratch
from ascend_v4.repack.decode import decode_rows
from ascend_v4.repack.files import hash_file, parse_json, read_bounded
from ascend_v4.repack.job import Job, plan_job
from ascend_v4.repack.journal import JOURNAL_FILE
from ascend_v4.repack.layouts import Part
from ascend_v4.repack.lock import LOCK_FILE
from ascend_v4.repack.manifest import MANIFEST_FILE, FileEntry, Manifest, read_manifest
from ascend_v4.repack.pipeline import part_chunks
from ascend_v4.repack.plan import Action, Conversion

OnBytes = Callable[[int], None]

INDEX_SUFFIX = ".safetensors.index.json"
SHOWN_PROBLEMS = 40
DECODED_WEIGHTS = 1 << 20
"""Weights decoded at once; a float64 each, several times over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was compared; a difference is an error and not a report."""

    directory: Path
    num_files: int
    num_bytes: int
    num_tensors: int
    source: Path | None
    decoded_weights: int
    """Weights whose real numbers were compared with the source's."""
    seconds: float

    def summary(self) -> dict[str, Any]:
        """One JSON object."""
        return {
            "path": str(self.directory),
            "files": self.num_files,
            "bytes": self.num_bytes,
            "tensors": self.num_tensors,
            "source": None if self.source is None else str(self.source),
            "decoded_weights": self.decoded_weights,
            "seconds": self.seconds,
        }


def verify_output(
    directory: Path,
    *,
    source: Path | None = None,
    jobs: int | None = None,
    on_bytes: OnBytes | None = None,
) -> VerifyReport:
    """Check an output of repack, against its source as well where one is named.

    Raises one CheckpointError that lists every difference; ConfigError for an output of another version.
    """
    started = time.perf_counter()
    manifest = read_manifest(directory)
    heard = on_bytes or (lambda num_bytes: None)
    threads = jobs or default_threads()
    problems = _check_files(directory, manifest, threads=threads, on_bytes=heard)
    problems += _unlisted(directory, manifest)
    num_tensors = 0
    if not problems:
        found, num_tensors = _check_indexes(directory, manifest)
        problems += found
    decoded_weights = 0
    if source is not None and not problems:
        found, decoded_weights = _check_source(directory, source, manifest, threads=threads, on_bytes=heard)
        problems += found
    _raise(problems, directory)
    return VerifyReport(
        directory=directory,
        num_files=len(manifest.files) + 1,
        num_bytes=sum(entry.num_bytes for entry in manifest.files.values()),
        num_tensors=num_tensors,
        source=source,
        decoded_weights=decoded_weights,
        seconds=time.perf_counter() - started,
    )


def _raise(problems: list[Problem], directory: Path) -> None:
    if not problems:
        return
    lines = "".join(f"\n  - {problem}" for problem in problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        lines += f"\n  ... and {len(problems) - SHOWN_PROBLEMS} more"
    word = "difference" if len(problems) == 1 else "differences"
    raise CheckpointError(
        f"{directory}: {len(problems)} {word} from what repack wrote; remove it and repack again:{lines}"
    )


def _check_files(directory: Path, manifest: Manifest, *, threads: int, on_bytes: OnBytes) -> list[Problem]:
    def check(item: tuple[str, FileEntry]) -> Problem | None:
        name, entry = item
        problem = _check_file(directory / name, name, entry)
        on_bytes(entry.num_bytes)
        return problem

    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        return [problem for problem in pool.map(check, manifest.files.items()) if problem is not None]


def _check_file(path: Path, name: str, entry: FileEntry) -> Problem | None:
    try:
        num_bytes = path.stat().st_size
        if num_bytes != entry.num_bytes:
            return Problem("wrong size", None, name, f"{num_bytes} bytes, written were {entry.num_bytes}")
        digest = hash_file(path)
    except OSError as error:
        return Problem("missing file", None, name, error.strerror or str(error))
    if digest != entry.xxh3_128:
        return Problem("wrong hash", None, name, f"{digest}, written was {entry.xxh3_128}")
    return None


def _unlisted(directory: Path, manifest: Manifest) -> list[Problem]:
    """Files a loader might read that repack did not write."""
    known = {*manifest.files, MANIFEST_FILE, JOURNAL_FILE, LOCK_FILE}
    names = (
        path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file()
    )
    return [
        Problem("unlisted file", None, name, "repack did not write it; remove it")
        for name in names
        if name not in known and name.endswith((".safetensors", ".json"))
    ]


def _check_indexes(directory: Path, manifest: Manifest) -> tuple[list[Problem], int]:
    """Headers against each other and against the index beside them; also the number of tensors."""
    problems: list[Problem] = []
    num_tensors = 0
    for name in manifest.files:
        if not name.endswith(INDEX_SUFFIX):
            continue
        path = directory / name
        files = scan_shards(path.parent)
        problems += files.problems
        num_tensors += len(files.tensors)
        parsed = parse_json(read_bounded(path, MAX_HEADER_BYTES), source=path)
        placed = parsed.get("weight_map") if isinstance(parsed, dict) else None
        stored = {tensor: where.file for tensor, where in files.tensors.items()}
        if placed != stored or files.unreferenced:
            differing = sorted(set(stored.items()) ^ set(dict(placed or {}).items()))
            shown = differing[0][0] if differing else files.unreferenced[0]
            problems.append(Problem("wrong index", shown, name, "the shards hold it elsewhere or not at all"))
    return problems, num_tensors


def _check_source(
    directory: Path, source: Path, manifest: Manifest, *, threads: int, on_bytes: OnBytes
) -> tuple[list[Problem], int]:
    """Convert the source again and compare; also how many weights were decoded on both sides."""
    job = plan_job(RepackConfig.from_options(source, directory, manifest.options))
    contents = {**job.documents, **{name: job.copied_bytes(name) for name, _ in job.copied}}
    planned = {*contents, *(part.file_name for part in job.parts)}
    if planned != set(manifest.files):
        odd = sorted(planned ^ set(manifest.files))
        return [Problem("another source", None, odd[0], "this source and these files do not go together")], 0
    problems = [
        Problem("differs from source", None, name, "the file does not follow from this source")
        for name, content in contents.items()
        if (directory / name).read_bytes() != content
    ]
    check = _SourceCheck(job, directory, on_bytes)
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        for found in pool.map(check.compare_part, job.parts):
            problems += found
    job.stamps.require_unchanged()
    return problems + check.count_problems(manifest), check.decoded_weights


Window = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns of a weight."""


@dataclass(frozen=True, slots=True)
class _Counts:
    """Weights of one window whose real numbers differ, and rows without any."""

    changed: int
    exact_rows: int
    window: Window


@dataclass(slots=True)
class _SourceCheck:
    """Compares parts with their source; several threads share it."""

    job: Job
    directory: Path
    on_bytes: OnBytes
    decoded_weights: int = 0
    _counts: dict[str, dict[Window, _Counts]] = field(default_factory=dict)
    _outputs: dict[Path, CheckpointReader] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def compare_part(self, part: Part) -> list[Problem]:
        """The first tensor of a part that differs, or nothing; then the numbers of its converted weights."""
        offset_bytes = 0
        with (self.directory / part.file_name).open("rb", buffering=0) as stream:
            for chunk in part_chunks(self.job, part, Scratch(), []):
                if not _same_bytes(stream, chunk):
                    return [_difference(part, offset_bytes, offset_bytes + len(chunk))]
                offset_bytes += len(chunk)
                self.on_bytes(len(chunk))
        reader = self._reader((self.directory / part.file_name).parent)
        for item in part.conversions:
            if item.action is not Action.COPY:
                self._count(item, reader)
        return []

    def count_problems(self, manifest: Manifest) -> list[Problem]:
        """Weights whose report in the manifest says other than what was counted here."""
        problems = []
        for name, windows in self._counts.items():
            changed = sum(counts.changed for counts in windows.values())
            exact_rows = sum(counts.exact_rows for counts in windows.values())
            said = manifest.tensors.get(name, {})
            # cut by columns, a row is exact only where each of its pieces is, and these lie in several files
            by_rows = len({counts.window[1] for counts in windows.values()}) == 1
            if said.get("changed_weights") != changed or (by_rows and said.get("exact_rows") != exact_rows):
                detail = (
                    f"{changed} weights changed and {exact_rows} rows exact; the manifest says "
                    f"{said.get('changed_weights')} and {said.get('exact_rows')}"
                )
                problems.append(Problem("wrong report", name, MANIFEST_FILE, detail))
        return problems

    def _reader(self, folder: Path) -> CheckpointReader:
        with self._lock:
            if folder not in self._outputs:
                self._outputs[folder] = CheckpointReader(folder, self.job.model, scan_shards(folder))
            return self._outputs[folder]

    def _count(self, item: Conversion, reader: CheckpointReader) -> None:
        rows, columns = item.shape
        (row_first, row_stop), (first, stop) = item.kept_rows or (0, rows), item.kept_columns or (0, columns)
        before = {
            source.kind: self.job.stored.bytes_of(source.name).view(source.shape[0], -1)
            for source in item.sources
        }
        after = {}
        for output in item.outputs:
            with self._lock:
                written = reader.tensor(output.name)
            after[output.kind] = written.reshape(-1).view(torch.uint8).view(output.shape[0], -1)
        changed = exact_rows = 0
        step = max(2, DECODED_WEIGHTS // columns // 2 * 2)
        for start in range(row_first, row_stop, step):
            end = min(row_stop, start + step)
            was = decode_rows(item.before, before, first=start, stop=end)[:, first:stop]
            now = decode_rows(item.after, after, first=start - row_first, stop=end - row_first)
            differing = (was != now).sum(dim=1)
            changed += int(differing.sum())
            exact_rows += int((differing == 0).sum())
        window = ((row_first, row_stop), (first, stop))
        with self._lock:
            self._counts.setdefault(item.name, {})[window] = _Counts(changed, exact_rows, window)
            self.decoded_weights += (row_stop - row_first) * (stop - first)
            for output in item.outputs:
                reader.release(output.name)
        self.job.stored.release(source.name for source in item.sources)


def _same_bytes(stream: io.FileIO, chunk: memoryview) -> bool:
    held = bytearray(len(chunk))
    waiting = memoryview(held)
    while waiting and (got_bytes := stream.readinto(waiting)):
        waiting = waiting[got_bytes:]
    return not waiting and np.array_equal(
        np.frombuffer(held, dtype=np.uint8), np.frombuffer(chunk, dtype=np.uint8)
    )


def _difference(part: Part, first_byte: int, stop_byte: int) -> Problem:
    names = [
        placed.output.name
        for placed in part.tensors
        if placed.offset_bytes < stop_byte and first_byte < placed.offset_bytes + placed.num_bytes
    ]
    place = f"bytes {first_byte} to {stop_byte} are not what the source gives"
    return Problem("differs from source", names[0] if names else None, part.file_name, place)
