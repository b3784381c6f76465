"""What an interrupted run had finished: one line per whole part, each synced before it counts.

The first line names the plan. A later run goes on only under the same plan, so that what it adds fits what is
there. A line cut off by a crash is dropped with all that follows it; its part is then written again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ascend_v4.errors import CheckpointError
from ascend_v4.repack.files import hash_bytes, read_bounded, sync_directory, write_error, write_fully

JOURNAL_FILE = "repack.journal"
MAX_JOURNAL_BYTES = 1 << 30
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One whole part. `statistics` has the sums of each slice written, in the order of the part."""

    file: str
    num_bytes: int
    xxh3_128: str
    statistics: tuple[tuple[float, ...] | None, ...]


class Journal:
    """The open journal of one output directory. Hold the directory's lock."""

    def __init__(self, directory: Path, descriptor: int, finished: dict[str, PartRecord]) -> None:
        self.finished = finished
        """Records of earlier runs by file name."""
        self._path = directory / JOURNAL_FILE
        self._descriptor = descriptor
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, plan: Mapping[str, str]) -> Journal:
        """Begin or go on. `plan` maps each thing that decides the output's bytes to its value or digest.

        Raises CheckpointError where the directory holds the beginning of another plan.
        """
        path = directory / JOURNAL_FILE
        head = _line({"repack_journal": FORMAT_VERSION, "plan": dict(plan)})
        finished: dict[str, PartRecord] = {}
        kept_bytes = 0
        if path.exists():
            raw = read_bounded(path, MAX_JOURNAL_BYTES)
            lines, kept_bytes = _whole_lines(raw)
            if lines:
                _require_same_plan(directory, lines[0], plan)
                records = (_record(path, line) for line in lines[1:])
                finished = {record.file: record for record in records}
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            journal = cls(directory, descriptor, finished)
            if os.fstat(descriptor).st_size > kept_bytes:
                # only then: some file systems write a file that was cut back when it is closed, and wait
                os.ftruncate(descriptor, kept_bytes)
            os.lseek(descriptor, 0, os.SEEK_END)
            journal._append(b"" if kept_bytes else head)
            sync_directory(directory)
        except OSError as error:
            raise write_error(path, error) from error
        return journal

    def add(self, record: PartRecord) -> None:
        """Note a part that lies synced under its own name. Threads may call it."""
        with self._lock:
            try:
                self._append(_line(asdict(record)))
            except OSError as error:
                raise write_error(self._path, error) from error

    def _append(self, line: bytes) -> None:
        write_fully(self._descriptor, memoryview(line))
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of the file and leave it for a later run."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Delete the file: the output is complete and its manifest says so."""
        self.close()
        self._path.unlink(missing_ok=True)
        sync_directory(self._path.parent)


def _line(content: Mapping[str, Any]) -> bytes:
    """One line, with a hash in front: a torn or damaged line must not pass for a record."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return hash_bytes(text).encode() + b" " + text + b"\n"


def _whole_lines(raw: bytes) -> tuple[list[dict[str, Any]], int]:
    """Lines up to the first that is damaged, and the bytes they take."""
    lines: list[dict[str, Any]] = []
    kept_bytes = 0
    for line in raw.splitlines(keepends=True):
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or digest != hash_bytes(text).encode():
            break
        lines.append(json.loads(text))
        kept_bytes += len(line)
    return lines, kept_bytes


def _require_same_plan(directory: Path, head: Mapping[str, Any], plan: Mapping[str, str]) -> None:
    begun = head.get("plan")
    if head.get("repack_journal") != FORMAT_VERSION or not isinstance(begun, dict):
        raise CheckpointError(
            f"{directory / JOURNAL_FILE} was written by another version. Remove {directory} and repack anew."
        )
    differing = [
        f"{key} was {_shown(begun.get(key))} and is {_shown(plan.get(key))}"
        for key in dict.fromkeys([*plan, *begun])
        if begun.get(key) != plan.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{directory} holds the beginning of another repack: {'; '.join(differing)}. "
            "Give the options of that run to finish it, or remove the directory, or name another."
        )


def _shown(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _record(path: Path, line: Mapping[str, Any]) -> PartRecord:
    try:
        statistics = tuple(None if sums is None else tuple(map(float, sums)) for sums in line["statistics"])
        return PartRecord(str(line["file"]), int(line["num_bytes"]), str(line["xxh3_128"]), statistics)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} has a line that is no record ({error!r:.80}). Remove the directory and repack anew."
        ) from None
