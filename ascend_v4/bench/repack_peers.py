"""What repack is measured against: plain writes and mapped copies of the same bytes, two threads each.

The bytes lie ready in memory, so a peer neither reads a source, nor converts, nor hashes. No program that
makes such a file can be faster than the better of them by more than the noise.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

Payload = NDArray[np.uint8]

THREADS = 2
PIECE_BYTES = 1 << 20
"""Bytes of one call. Larger pieces leave the second cache, smaller ones pay for the calls."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to get bytes into new files."""

    name: str
    write: Callable[[Path, Payload], None]
    """Fills a directory that is empty; syncs what it wrote."""


def pwrite_one_file(directory: Path, payload: Payload) -> None:
    """Both threads write into one file, each its half. The system lets one of them in at a time."""
    descriptor = _create(directory / "whole")
    try:
        _in_spans(len(payload), lambda start, stop: _pwrite(descriptor, payload, start, stop, at=start))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pwrite_file_each(directory: Path, payload: Payload) -> None:
    """Each thread writes a file of its own, as repack's do."""

    def write(start: int, stop: int) -> None:
        descriptor = _create(directory / f"from-{start}")
        try:
            _pwrite(descriptor, payload, start, stop, at=0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    _in_spans(len(payload), write)


def mapped_copy(directory: Path, payload: Payload) -> None:
    """Both threads copy into a shared mapping of one new file, each its half."""
    descriptor = _create(directory / "mapped")
    try:
        os.ftruncate(descriptor, len(payload))
        with mmap.mmap(descriptor, len(payload)) as mapped:
            _copy_into(np.frombuffer(mapped, np.uint8), payload)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy_into(target: Payload, payload: Payload) -> None:
    """A function of its own: a mapping that an array still looks at cannot be closed."""

    def copy(start: int, stop: int) -> None:
        for low in range(start, stop, PIECE_BYTES):
            high = min(low + PIECE_BYTES, stop)
            target[low:high] = payload[low:high]

    _in_spans(len(payload), copy)


PEERS = (
    Peer("pwrite, one file", pwrite_one_file),
    Peer("mapped copy, one file", mapped_copy),
    Peer("pwrite, a file per thread", pwrite_file_each),
)
BETTER_OF = PEERS[:2]
"""The peers whose better one is repack's measure; the third is stricter and stands beside them."""


def back_pages(scratch: Path, num_bytes: int) -> None:
    """Write a file of this size and remove it again.

    A virtual machine's host gives memory and disk blocks to pages on their first write, and takes free ones
    back after seconds. Without this a run of luck decides: the same write takes one or eight times as long.
    """
    piece = memoryview(bytes(PIECE_BYTES))
    with scratch.open("wb", buffering=0) as stream:
        for start in range(0, num_bytes, PIECE_BYTES):
            stream.write(piece[: num_bytes - start])
    scratch.unlink()


@contextlib.contextmanager
def syncs_left_out() -> Iterator[None]:
    """Inside, `os.fsync` does nothing, for repack and its peers alike: the disk is out of the clock."""

    def nothing(descriptor: Any) -> None:  # noqa: ANN401 - os.fsync takes anything with a fileno
        """Accept what os.fsync accepts."""

    with mock.patch.object(os, "fsync", nothing):
        yield


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)


def _pwrite(descriptor: int, payload: Payload, start: int, stop: int, *, at: int) -> None:
    view = payload.data
    while start < stop:
        written_bytes = os.pwrite(descriptor, view[start : min(start + PIECE_BYTES, stop)], at)
        start += written_bytes
        at += written_bytes


def _in_spans(num_bytes: int, work: Callable[[int, int], None]) -> None:
    edges = [num_bytes * part // THREADS for part in range(THREADS + 1)]
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(work, start, stop) for start, stop in pairwise(edges)]:
            done.result()
