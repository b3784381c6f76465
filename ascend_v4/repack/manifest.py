"""`manifest.json`: every file of a finished output with size and hash, and what became of every tensor.

It is written last. An output without it is unfinished, whatever else lies there. Its own last entry is the
hash of what stands above, so that a flipped bit in it is seen as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ascend_v4.errors import CheckpointError
from ascend_v4.repack.files import hash_bytes, parse_json, read_bounded, render_json
from ascend_v4.repack.journal import JOURNAL_FILE

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 29
FORMAT_VERSION = 1
_KEYS = ("format", "version", "options", "source", "files", "totals", "tensors")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the output."""

    num_bytes: int
    xxh3_128: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A finished output. Everything in it follows from the source and the options: nothing tells the time."""

    options: dict[str, Any]
    """What was asked: target, recipe, rounding, layout and so on."""
    source: dict[str, Any]
    files: dict[str, FileEntry]
    totals: dict[str, Any]
    tensors: dict[str, dict[str, Any]]
    """The report of each converted weight, by its name in the source."""

    def render(self) -> bytes:
        """The file's bytes."""
        content: dict[str, Any] = {
            "format": "ascend_v4_manifest",
            "version": FORMAT_VERSION,
            "options": self.options,
            "source": self.source,
            "files": {
                name: {"bytes": entry.num_bytes, "xxh3_128": entry.xxh3_128}
                for name, entry in self.files.items()
            },
            "totals": self.totals,
            "tensors": self.tensors,
        }
        return _seal(content)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a finished output. Raises CheckpointError where there is none or it is damaged."""
    path = directory / MANIFEST_FILE
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory. Name the output of ascend-v4 repack.")
    if not path.exists():
        begun = (directory / JOURNAL_FILE).exists()
        raise CheckpointError(
            f"{directory} holds an unfinished repack. Run the same ascend-v4 repack again: it goes on from "
            "there."
            if begun
            else f"{directory} has no {MANIFEST_FILE}. Name a directory that ascend-v4 repack finished."
        )
    raw = read_bounded(path, MAX_MANIFEST_BYTES)
    content = parse_json(raw, source=path)
    if not isinstance(content, dict) or content.get("format") != "ascend_v4_manifest":
        raise CheckpointError(f"{path} is no manifest of ascend-v4 repack. Repack the checkpoint again.")
    if not _is_sealed(content, raw):
        raise CheckpointError(
            f"{path} is damaged: it does not have the hash it names. Repack the checkpoint again."
        )
    if content.get("version") != FORMAT_VERSION or tuple(content) != _KEYS:
        raise CheckpointError(
            f"{path} has version {content.get('version')!r}; this version of ascend-v4 reads "
            f"{FORMAT_VERSION}."
        )
    try:
        return Manifest(
            options=dict(content["options"]),
            source=dict(content["source"]),
            files={name: _entry(name, entry) for name, entry in content["files"].items()},
            totals=dict(content["totals"]),
            tensors=dict(content["tensors"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not as this version writes it: {error!r:.120}.") from None


def _seal(content: Mapping[str, Any]) -> bytes:
    return render_json({**content, "xxh3_128": hash_bytes(render_json(content))})


def _is_sealed(content: dict[str, Any], raw: bytes) -> bool:
    """Whether a file is to the byte what `_seal` makes of its content; the hash leaves the content."""
    if content.pop("xxh3_128", None) is None:
        return False
    try:
        return _seal(content) == raw
    except (ValueError, RecursionError):
        # an infinity, say, which JSON reads and does not write
        return False


def _entry(name: str, entry: Mapping[str, Any]) -> FileEntry:
    # a manifest from elsewhere must not make verify read outside the directory
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise ValueError(f"it names the file {name!r}")
    return FileEntry(int(entry["bytes"]), str(entry["xxh3_128"]))
