"""One part's way to the disk: a temporary name, bytes front to back, fsync, rename.

Hashing and writing read a chunk while it is still in the processor's cache. Until the rename nothing lies
under the part's own name, and after it every byte is on the disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from ascend_v4.errors import CheckpointError
from ascend_v4.repack.files import partial_path, sync_directory, write_error, write_fully


class StoppedError(Exception):
    """Another thread failed or the user interrupted; this one gives up its part."""


@dataclass(slots=True)
class StageSeconds:
    """Where threads spent their time, summed over them."""

    transcode: float = 0.0
    """Making chunks: reading the source's pages, converting."""
    digest: float = 0.0
    write: float = 0.0
    sync: float = 0.0

    def add(self, other: StageSeconds) -> None:
        """Add another thread's share."""
        self.transcode += other.transcode
        self.digest += other.digest
        self.write += other.write
        self.sync += other.sync


@dataclass(frozen=True, slots=True)
class Pulse:
    """What threads share while they write: a request to stop, and who hears of progress."""

    stop: threading.Event
    on_bytes: Callable[[int], None]
    """Called from several threads with the bytes of each chunk."""


@dataclass(slots=True)
class WrittenPart:
    """A part whose bytes were all handed to the system, still under its temporary name."""

    path: Path
    temporary: Path
    descriptor: int
    num_bytes: int
    xxh3_128: str
    seconds: StageSeconds = field(default_factory=StageSeconds)

    def publish(self) -> None:
        """Sync it and give it its name. Raises CheckpointError; nothing is left under either name then."""
        started = time.perf_counter()
        try:
            with _write_errors(self.path):
                try:
                    os.fsync(self.descriptor)
                finally:
                    os.close(self.descriptor)
                os.rename(self.temporary, self.path)
                sync_directory(self.path.parent)
        except CheckpointError:
            _remove(self.temporary)
            raise
        self.seconds.sync = time.perf_counter() - started

    def discard(self) -> None:
        """Give it up."""
        os.close(self.descriptor)
        _remove(self.temporary)


def write_part(path: Path, chunks: Iterator[memoryview], *, pulse: Pulse) -> WrittenPart:
    """Write and hash chunks in turn; each may be overwritten once the next is asked for.

    Raises StoppedError, CheckpointError for what the disk refuses, and whatever `chunks` raises; the
    temporary file is gone then.
    """
    temporary = partial_path(path)
    with _write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    written = WrittenPart(path, temporary, descriptor, num_bytes=0, xxh3_128="")
    try:
        _copy(written, chunks, pulse)
    except BaseException:
        # also on an interrupt: a temporary file must not stay behind while the process lives on
        written.discard()
        raise
    return written


def _copy(written: WrittenPart, chunks: Iterator[memoryview], pulse: Pulse) -> None:
    digest = xxhash.xxh3_128()
    seconds = written.seconds
    mark = time.perf_counter()
    for chunk in chunks:
        made = time.perf_counter()
        digest.update(chunk)
        hashed = time.perf_counter()
        with _write_errors(written.path):
            write_fully(written.descriptor, chunk)
        now = time.perf_counter()
        seconds.transcode += made - mark
        seconds.digest += hashed - made
        seconds.write += now - hashed
        mark = now
        written.num_bytes += len(chunk)
        pulse.on_bytes(len(chunk))
        if pulse.stop.is_set():
            raise StoppedError
    written.xxh3_128 = digest.hexdigest()


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
