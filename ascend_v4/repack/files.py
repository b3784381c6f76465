"""Small files written so that each name holds either all of its bytes or the ones it held before.

A part of many gigabytes takes the same road in writer.py: a temporary name, its bytes, fsync, rename, fsync
of the directory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path

import xxhash

from ascend_v4.errors import CheckpointError

PARTIAL_MARK = ".partial-"
"""Part of every temporary name; whatever carries it is no result and may be deleted under the lock."""

READ_BYTES = 4 << 20

WRITE_BYTES = 1 << 20
"""Bytes of one call. A larger one takes larger runs of pages, which a virtual machine's host may not have
backed yet: several times slower there, and no faster elsewhere."""


def partial_path(path: Path) -> Path:
    """The temporary name of a file, in its own directory so that the rename moves no bytes."""
    return path.with_name(f".{path.name}{PARTIAL_MARK}{os.getpid()}")


def remove_partials(directory: Path) -> int:
    """Delete what interrupted runs left below a directory; returns how many files. Hold the lock."""
    leftovers = sorted(directory.rglob(f".*{PARTIAL_MARK}*"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return len(leftovers)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_fully(descriptor: int, piece: memoryview) -> None:
    """Write all of a piece at the file's position."""
    while piece:
        piece = piece[os.write(descriptor, piece[:WRITE_BYTES]) :]


def write_atomically(path: Path, content: bytes) -> None:
    """Put a small file under its name, whole and synced."""
    temporary = partial_path(path)
    try:
        with temporary.open("wb", buffering=0) as stream:
            write_fully(stream.fileno(), memoryview(content))
            os.fsync(stream.fileno())
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


def write_error(path: Path, error: OSError) -> CheckpointError:
    """What a failed write to the output means and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{path} cannot be written: the disk is full ({os.strerror(error.errno)}). Free space and run "
            "the same command again: whole parts are kept and it goes on from there."
        )
    return CheckpointError(
        f"{path} cannot be written: {error.strerror or error}. Mend that and run the same command again: "
        "whole parts are kept and it goes on from there."
    )


def hash_bytes(content: bytes) -> str:
    """XXH3 of 128 bits, in hexadecimal as `xxhsum -H2` prints it."""
    return xxhash.xxh3_128_hexdigest(content)


def hash_file(path: Path) -> str:
    """XXH3 of 128 bits over a file, read in pieces. Raises OSError."""
    digest = xxhash.xxh3_128()
    piece = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as stream:
        while got_bytes := stream.readinto(piece):
            digest.update(piece[:got_bytes])
    return digest.hexdigest()


def render_json(content: object) -> bytes:
    """JSON as this package writes it: the same content always gives the same bytes."""
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def parse_json(raw: bytes, *, source: Path) -> object:
    """JSON from outside; a key given twice is an error. Raises CheckpointError."""
    try:
        return json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source} is not readable as JSON: {str(error)[:200]}. Repack the checkpoint again."
        ) from None


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A file's bytes. Raises CheckpointError where it is missing, unreadable or larger than the bound."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path} has more than {max_bytes} bytes; no such file of ours is that large.")
    return raw


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("an object has the same key twice")
    return mapping
