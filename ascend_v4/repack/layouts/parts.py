"""Which tensor lies where in which file: parts of bounded size, without gaps, every tensor aligned.

The safetensors format: 8 bytes little-endian header length, a JSON object padded with spaces, the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from ascend_v4.checkpoint.index import DTYPE_BYTES
from ascend_v4.errors import ConfigError
from ascend_v4.repack.plan import Conversion, OutputTensor
from ascend_v4.repack.recipes import model_parts

DEFAULT_PART_BYTES = 4_000_000_000
MIN_PART_BYTES = 1 << 16
MAX_PART_BYTES = 1 << 40
ALIGNMENT_BYTES = 8
MAX_PARTS = 99_999


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """One tensor of a part. `offset_bytes` counts from the start of the file."""

    output: OutputTensor
    offset_bytes: int
    num_bytes: int
    conversion_index: int
    """The one of the part's conversions that makes it."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file: `header`, then `tensors` in file order without gaps.

    They are in the order of `conversions`, each weight before its companions, except tensors whose bytes are
    not a multiple of 8: those are at the end, wide elements first, so that every tensor is aligned. In models
    of the release's sizes that concerns a few biases of some bytes.
    """

    file_name: str
    """Relative to the output directory, with forward slashes."""
    rank: int | None
    conversions: tuple[Conversion, ...]
    tensors: tuple[PlacedTensor, ...]
    header: bytes
    num_bytes: int
    """Of the whole file."""


def cut_parts(
    conversions: Iterable[Conversion], *, max_part_bytes: int, stem: str, rank: int | None = None
) -> tuple[Part, ...]:
    """Files `stem-00001-of-0000n.safetensors` with the conversions in their order.

    A file is as large as fits `max_part_bytes` of tensors; the matrices of one expert are never parted, and
    what is larger by itself gets a file of its own. With a rank the files lie in its folder.
    Raises ConfigError for a bound outside [64 KiB, 1 TiB] or one that gives more than 99,999 files.
    """
    if not MIN_PART_BYTES <= max_part_bytes <= MAX_PART_BYTES:
        raise ConfigError(
            f"the part size is {max_part_bytes} bytes; it must be in [{MIN_PART_BYTES}, {MAX_PART_BYTES}]. "
            f"The default is {DEFAULT_PART_BYTES}."
        )
    filled = list(_fill(conversions, max_part_bytes))
    if len(filled) > MAX_PARTS:
        raise ConfigError(
            f"parts of {max_part_bytes} bytes make {len(filled)} files; the bound is {MAX_PARTS}. "
            "Use larger parts."
        )
    folder = "" if rank is None else f"{rank_folder(rank)}/"
    return tuple(
        _part(f"{folder}{stem}-{number:05d}-of-{len(filled):05d}.safetensors", rank, members)
        for number, members in enumerate(filled, start=1)
    )


def rank_folder(rank: int) -> str:
    """Folder of a rank's files."""
    return f"rank-{rank:03d}"


def weight_map(parts: Iterable[Part]) -> dict[str, str]:
    """Tensor name -> file name without its folder, for an index beside the files."""
    return {
        placed.output.name: part.file_name.rpartition("/")[2] for part in parts for placed in part.tensors
    }


def index_document(parts: Iterable[Part]) -> bytes:
    """The index file of parts that lie in one folder."""
    listed = list(parts)
    total = sum(placed.num_bytes for part in listed for placed in part.tensors)
    return json_document({"metadata": {"total_size": total}, "weight_map": weight_map(listed)})


def json_document(value: object) -> bytes:
    """UTF-8 JSON, indented, the same bytes for the same value."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _fill(conversions: Iterable[Conversion], max_part_bytes: int) -> Iterator[list[Conversion]]:
    members: list[Conversion] = []
    filled_bytes = 0
    for _, grouped in groupby(conversions, key=_together):
        unit = list(grouped)
        unit_bytes = sum(output.num_bytes for item in unit for output in item.outputs)
        if members and filled_bytes + unit_bytes > max_part_bytes:
            yield members
            members, filled_bytes = [], 0
        members += unit
        filled_bytes += unit_bytes
    if members:
        yield members


def _together(item: Conversion) -> str:
    """Equal for the conversions that must share a file."""
    routed = item.part is not None and model_parts()[item.part].routed
    return expert_prefix(item) if routed else item.name


def expert_prefix(item: Conversion) -> str:
    """What the names of the matrices of a routed expert start with; it ends with the expert's id."""
    return item.name.rsplit(".", 2)[0]


def _part(file_name: str, rank: int | None, members: list[Conversion]) -> Part:
    outputs = [
        (output, output.num_bytes, index) for index, item in enumerate(members) for output in item.outputs
    ]
    # the sort is stable: whole multiples of the alignment stay in their order in front
    outputs.sort(key=_unevenness)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: list[int] = []
    end_bytes = 0
    for output, num_bytes, _ in outputs:
        assert output.name not in entries, f"two outputs are called {output.name}"
        starts.append(end_bytes)
        end_bytes += num_bytes
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": output.shape,
            "data_offsets": (starts[-1], end_bytes),
        }
    header = _header(entries)
    tensors = tuple(
        PlacedTensor(output, len(header) + start, num_bytes, index)
        for (output, num_bytes, index), start in zip(outputs, starts, strict=True)
    )
    return Part(file_name, rank, tuple(members), tensors, header, len(header) + end_bytes)


def _unevenness(entry: tuple[OutputTensor, int, int]) -> int:
    """0 for what stays in order; wide elements before narrow ones at the end."""
    output, num_bytes, _ = entry
    return ALIGNMENT_BYTES + 1 - DTYPE_BYTES[output.dtype] if num_bytes % ALIGNMENT_BYTES else 0


def _header(entries: dict[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text
