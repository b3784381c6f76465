"""Headers of a checkpoint's safetensors files: where every tensor lies, and everything wrong with the files.

Nothing here raises for one bad shard: problems are collected so that one error can list them all. Every
length read from a file is compared with the file before it is used. Standard library only.

Format: 8 bytes little-endian header length, a JSON object of name -> {dtype, shape, data_offsets}, then the
tensors without gaps; offsets count from the end of the header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ascend_v4.checkpoint.index import DTYPE_BYTES
from ascend_v4.checkpoint.names import DESCRIPTION_FILE, INDEX_FILE, SINGLE_FILE
from ascend_v4.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit for a header; the index file is held to it too."""

MAX_DIMENSIONS = 8
SHOWN_PROBLEMS = 40


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a shard. `offset_bytes` counts from the start of the file.

    Of a tensor in slices, `dtype`, `shape` and `num_bytes` are the whole's, the place is the first slice's.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    num_bytes: int
    slices: tuple[StoredTensor, ...] = ()
    """Of a tensor that ranks share out: its slices in order along `slice_axis`."""
    slice_axis: int = 0

    @property
    def places(self) -> tuple[StoredTensor, ...]:
        """Where the bytes lie: the slices, or this tensor itself."""
        return self.slices or (self,)


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference between the files and what must be there."""

    kind: str
    tensor: str | None
    file: str | None
    detail: str

    def __str__(self) -> str:
        place = " in ".join(part for part in (self.tensor, self.file) if part)
        return f"{self.kind}: {place}: {self.detail}" if place else f"{self.kind}: {self.detail}"


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """What the shards of one checkpoint hold. `tensors` has only those whose bytes are all there."""

    directory: Path
    shards: tuple[str, ...]
    tensors: dict[str, StoredTensor]
    problems: tuple[Problem, ...]
    damaged: frozenset[str]
    """Tensors already named by a problem; comparing them again would say the same thing twice."""
    unreferenced: tuple[str, ...]
    """Tensors in a shard that the index does not place there; nothing reads them."""


def find_shards(directory: Path) -> bool:
    """Whether a directory holds any safetensors file or an index of them."""
    return (directory / INDEX_FILE).exists() or any(directory.glob("*.safetensors"))


def scan_shards(directory: Path) -> StoredFiles:
    """Read the headers of every shard, by the index file where there is one.

    Raises CheckpointError only where there is nothing to scan: no directory, no shard, no readable index.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory. Name the one that holds the shards.")
    index = _index_of(directory)
    if index is not None:
        return _scan_indexed(directory, _read_weight_map(index))
    if (directory / SINGLE_FILE).exists():
        return _scan_listed(directory, [SINGLE_FILE])
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{directory} holds neither {INDEX_FILE} nor any .safetensors file. Name a checkpoint directory, "
            "or make one with: ascend-v4 make-checkpoint."
        )
    return _scan_listed(directory, files)


def _index_of(directory: Path) -> Path | None:
    """The index file; tools that write a ModelSlim description name theirs after its shards."""
    if (directory / INDEX_FILE).exists():
        return directory / INDEX_FILE
    if not (directory / DESCRIPTION_FILE).exists():
        return None
    others = sorted(directory.glob("*.safetensors.index.json"))
    return others[0] if len(others) == 1 else None


def raise_problems(problems: Iterable[Problem], *, source: str) -> None:
    """Raise one CheckpointError that counts every problem and shows some of each kind and file; or return."""
    listed = list(problems)
    if not listed:
        return
    kinds: dict[str, int] = {}
    for problem in listed:
        kinds[problem.kind] = kinds.get(problem.kind, 0) + 1
    summary = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    shown = _spread(listed, SHOWN_PROBLEMS)
    lines = "".join(f"\n  - {problem}" for problem in shown)
    if len(shown) < len(listed):
        lines += f"\n  ... and {len(listed) - len(shown)} more"
    word = "difference" if len(listed) == 1 else "differences"
    raise CheckpointError(f"{source}: {len(listed)} {word} from what the config says ({summary}):{lines}")


def _spread(problems: list[Problem], most: int) -> list[Problem]:
    """At most `most` problems, taken in turn from every kind and file so that none of these goes unseen."""
    queues: dict[tuple[str, str | None], list[Problem]] = {}
    for problem in problems:
        queues.setdefault((problem.kind, problem.file), []).append(problem)
    ranked = [(rank, problem) for queue in queues.values() for rank, problem in enumerate(queue)]
    ranked.sort(key=lambda pair: pair[0])
    chosen = {id(problem) for _, problem in ranked[:most]}
    return [problem for problem in problems if id(problem) in chosen]


def _read_weight_map(path: Path) -> dict[str, str]:
    advice = "Download it again, or delete it if the shards are complete without it."
    try:
        index_bytes = path.stat().st_size
        if index_bytes > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is {index_bytes} bytes; the bound is {MAX_HEADER_BYTES}. {advice}")
        parsed = json.loads(path.read_bytes(), object_pairs_hook=_unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {str(error)[:200]}. {advice}") from None
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map of tensor names to shard files. {advice}")
    if not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: weight_map must give a file name for every tensor. {advice}")
    return weight_map


def _scan_indexed(directory: Path, weight_map: dict[str, str]) -> StoredFiles:
    placed: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        placed.setdefault(file, []).append(name)
    scan = _Scan(directory)
    unreferenced: list[str] = []
    for file, names in sorted(placed.items()):
        if not _is_inside(file):
            scan.blame(names, "unsafe path", file, "the index may name only .safetensors files in here")
            continue
        found = scan.read(file, names)
        scan.tensors |= {name: found[name] for name in names if name in found}
        unreferenced += [name for name in found if weight_map.get(name) != file]
    return scan.result(sorted(placed), unreferenced)


def _scan_listed(directory: Path, files: list[str]) -> StoredFiles:
    scan = _Scan(directory)
    for file in files:
        for name, stored in scan.read(file, []).items():
            if name in scan.tensors:
                scan.blame([name], "duplicate tensor", file, f"{scan.tensors[name].file} holds it too")
            scan.tensors.setdefault(name, stored)
    return scan.result(files, [])


def _is_inside(file: str) -> bool:
    # links are not followed here: a model hub's cache legitimately links its shards to another directory
    path = PurePosixPath(file)
    unusual = "\\" in file or ":" in file or "\0" in file
    return not (unusual or path.is_absolute() or ".." in path.parts) and path.suffix == ".safetensors"


@dataclass(slots=True)
class _Scan:
    """Collects tensors and problems while the shards of one directory are read."""

    directory: Path
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    def blame(self, names: Iterable[str], kind: str, file: str, detail: str) -> None:
        named = list(names)
        self.damaged.update(named)
        self.problems += [Problem(kind, name, file, detail) for name in named]
        if not named:
            self.problems.append(Problem(kind, None, file, detail))

    def result(self, shards: list[str], unreferenced: list[str]) -> StoredFiles:
        return StoredFiles(
            directory=self.directory,
            shards=tuple(shards),
            tensors=self.tensors,
            problems=tuple(self.problems),
            damaged=frozenset(self.damaged),
            unreferenced=tuple(unreferenced),
        )

    def read(self, file: str, placed: list[str]) -> dict[str, StoredTensor]:
        """Sound tensors of one shard; `placed` are those the index puts there."""
        path = self.directory / file
        try:
            with path.open("rb") as stream:
                file_bytes = os.fstat(stream.fileno()).st_size
                header_bytes, text = _read_header(stream, file_bytes)
            header = json.loads(text, object_pairs_hook=_unique_keys)
            if not isinstance(header, dict):
                raise _BadHeaderError(f"the header is a {type(header).__name__}, not an object")
        except FileNotFoundError:
            self.blame(placed, "missing shard", file, "the index names this file and it is not there")
            return {}
        except _TruncatedError as error:
            self.blame(placed, "truncated shard", file, str(error))
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.blame(placed, "unreadable shard", file, str(error)[:200])
            return {}
        header.pop("__metadata__", None)
        data_start = 8 + header_bytes
        entries = self._parse_entries(file, header, data_start)
        sound = self._inside_file(file, entries, data_start, file_bytes)
        absent = [name for name in placed if name not in header]
        self.blame_absent(file, absent)
        return sound

    def blame_absent(self, file: str, names: list[str]) -> None:
        if names:
            self.blame(names, "not in shard", file, "the index places it there, the file's header lacks it")

    def _parse_entries(
        self, file: str, header: Mapping[str, object], data_start: int
    ) -> dict[str, StoredTensor]:
        entries: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            try:
                entries[name] = _parse_entry(file, entry, data_start)
            except _BadHeaderError as error:
                self.blame([name], "bad header", file, str(error))
        return entries

    def _inside_file(
        self, file: str, entries: dict[str, StoredTensor], data_start: int, file_bytes: int
    ) -> dict[str, StoredTensor]:
        """Entries that neither overlap nor leave the file; all gaps of a shard are one problem."""
        sound: dict[str, StoredTensor] = {}
        end_bytes = data_start
        gaps = False
        for name, stored in sorted(entries.items(), key=_by_place):
            stop_bytes = stored.offset_bytes + stored.num_bytes
            if stored.offset_bytes < end_bytes:
                self.blame([name], "bad header", file, "its bytes overlap those of another tensor")
            elif stop_bytes > file_bytes:
                detail = (
                    f"it ends at byte {stop_bytes} and the file has {file_bytes}; download the file again"
                )
                self.blame([name], "truncated shard", file, detail)
            else:
                sound[name] = stored
            gaps |= stored.offset_bytes > end_bytes
            end_bytes = max(end_bytes, stop_bytes)
        # a header that already has bad entries explains any gap by itself
        if (gaps or end_bytes < file_bytes) and not any(problem.file == file for problem in self.problems):
            place = (
                "between its tensors" if gaps else f"after its last tensor, which ends at byte {end_bytes}"
            )
            detail = f"the file has {file_bytes} bytes, some of them {place}; the format allows no gaps"
            self.problems.append(Problem("bad header", None, file, detail))
        return sound


class _BadHeaderError(ValueError):
    pass


class _TruncatedError(Exception):
    pass


def _by_place(item: tuple[str, StoredTensor]) -> tuple[int, int]:
    return item[1].offset_bytes, item[1].num_bytes


def _read_header(stream: BinaryIO, file_bytes: int) -> tuple[int, bytes]:
    prefix = stream.read(8)
    if len(prefix) < 8:
        raise _TruncatedError(f"the file has {file_bytes} bytes and no header; download it again")
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise _BadHeaderError(f"the header claims {header_bytes} bytes; the bound is {MAX_HEADER_BYTES}")
    if 8 + header_bytes > file_bytes:
        raise _TruncatedError(
            f"the header claims {header_bytes} bytes and the file has {file_bytes}; download it again"
        )
    text = stream.read(header_bytes)
    if len(text) < header_bytes:
        raise _TruncatedError(f"the header ends after {len(text)} of {header_bytes} bytes; download it again")
    return header_bytes, text


def _parse_entry(file: str, entry: object, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict):
        raise _BadHeaderError(f"its entry is {str(entry)[:60]!r}, not an object")
    dtype, shape, offsets = (
        entry.get("dtype"),
        _counts(entry.get("shape")),
        _counts(entry.get("data_offsets")),
    )
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _BadHeaderError(f"dtype is {str(dtype)[:40]!r}; known are {', '.join(DTYPE_BYTES)}")
    if shape is None or len(shape) > MAX_DIMENSIONS:
        shown = str(entry.get("shape"))[:80]
        raise _BadHeaderError(
            f"shape is {shown}; it must be a list of at most {MAX_DIMENSIONS} integers >= 0"
        )
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        shown = str(entry.get("data_offsets"))[:80]
        raise _BadHeaderError(f"data_offsets is {shown}; it must be two rising integers >= 0")
    num_bytes = prod(shape) * DTYPE_BYTES[dtype]
    if num_bytes != offsets[1] - offsets[0]:
        raise _BadHeaderError(
            f"{dtype} {shape} takes {num_bytes} bytes and data_offsets span {offsets[1] - offsets[0]}"
        )
    return StoredTensor(file, dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _counts(value: object) -> list[int] | None:
    # numbers below 2^60 are valid file positions, and their products stay printable
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 60 for item in value):
        return value
    return None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a JSON object has the same key twice")
    return mapping
