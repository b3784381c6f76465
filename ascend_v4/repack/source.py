"""What the source's files were when the plan was made, and whether they still are.

A change is recognised by inode, size and time of the last write, the way a build tool does; the manifest's
`--verify --source` compares bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ascend_v4.checkpoint.names import CONFIG_FILE, INDEX_FILE
from ascend_v4.checkpoint.shards import MAX_HEADER_BYTES
from ascend_v4.errors import CheckpointError
from ascend_v4.repack.files import read_bounded


class Stamp(NamedTuple):
    """Identity of one file's content, without reading it."""

    inode: int
    num_bytes: int
    written_ns: int

    @classmethod
    def of(cls, path: str | Path) -> Stamp:
        """The stamp of a file. Raises OSError."""
        status = os.stat(path)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class SourceFiles:
    """The shards, the config and the index of one checkpoint, as they were at one moment."""

    directory: Path
    stamps: dict[str, Stamp]
    header_sha256: dict[str, str]
    """Of each shard's header: names, dtypes, shapes and places of its tensors."""
    config_sha256: str
    index_sha256: str | None

    @classmethod
    def read(cls, directory: Path, shards: Iterable[str]) -> SourceFiles:
        """Stamps first, contents after: what changes in between is noticed. Raises CheckpointError."""
        files = sorted(shards)
        try:
            extras = [name for name in (CONFIG_FILE, INDEX_FILE) if (directory / name).exists()]
            stamps = {name: Stamp.of(directory / name) for name in [*files, *extras]}
            headers = {name: _header_sha256(directory / name) for name in files}
        except OSError as error:
            raise CheckpointError(f"{directory} cannot be read: {error}.") from None
        return cls(
            directory=directory,
            stamps=stamps,
            header_sha256=headers,
            config_sha256=_text_sha256(directory / CONFIG_FILE),
            index_sha256=_text_sha256(directory / INDEX_FILE) if INDEX_FILE in stamps else None,
        )

    def require_unchanged(self, files: Iterable[str] | None = None) -> None:
        """Raise CheckpointError naming the first of these files, or of all, that is not what it was."""
        for name in self.stamps if files is None else files:
            # asked for every slab: joining strings is many times cheaper than making paths
            path = f"{self.directory}{os.sep}{name}"
            try:
                now = Stamp.of(path)
            except OSError as error:
                raise CheckpointError(
                    f"{path} went away while it was read ({error.strerror}). Restore it and repack again."
                ) from None
            if now != self.stamps[name]:
                raise CheckpointError(
                    f"{path} changed while it was read: {_difference(self.stamps[name], now)}. Wait until "
                    "nothing writes to the source, remove the output directory and repack again."
                )

    def facts(self) -> dict[str, object]:
        """What a pack says of its source; the same for every copy of the same files."""
        parts = {
            name: {"bytes": self.stamps[name].num_bytes, "header_sha256": digest}
            for name, digest in self.header_sha256.items()
        }
        return {"config_sha256": self.config_sha256, "index_sha256": self.index_sha256, "parts": parts}

    def digest(self) -> str:
        """One value that differs when any file was replaced or written to."""
        text = repr((sorted(self.stamps.items()), self.config_sha256, self.index_sha256))
        return hashlib.sha256(text.encode()).hexdigest()


def _difference(was: Stamp, now: Stamp) -> str:
    if now.num_bytes != was.num_bytes:
        return f"it had {was.num_bytes} bytes and has {now.num_bytes}"
    return "another file took its place" if now.inode != was.inode else "it was written to"


def _text_sha256(path: Path) -> str:
    return hashlib.sha256(read_bounded(path, MAX_HEADER_BYTES)).hexdigest()


def _header_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = min(
            int.from_bytes(prefix, "little"), MAX_HEADER_BYTES, os.fstat(stream.fileno()).st_size
        )
        return hashlib.sha256(prefix + stream.read(header_bytes)).hexdigest()
