"""Packs divided over ranks: what each rank's folder holds, and where the slices of whole tensors lie.

Every rank states which slice of which weight it has; what lies beside a weight is cut with it, in units of
its own. Of copies on several ranks the lowest rank's is read. Headers only, standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ascend_v4.checkpoint.index import FP4_GROUP, FP8_BLOCK
from ascend_v4.checkpoint.names import PACK_FILE
from ascend_v4.checkpoint.pack import Pack, PackedForm, RankFolders, read_description
from ascend_v4.checkpoint.shards import (
    MAX_DIMENSIONS,
    Problem,
    StoredFiles,
    StoredTensor,
    scan_shards,
)
from ascend_v4.errors import CheckpointError

COMPANIONS = (
    "scale",
    "weight_scale",
    "weight_bias",
    "weight_offset",
    "release_scale",
    "release_weight",
    "negative_zeros",
)
"""What may follow a weight's stem in the name of a tensor that lies beside it."""
OWN_KEYS = ("rank", "slices", "tensors")
"""Keys of a rank's description that are not those of the whole pack's."""
MAX_EXTENT = 1 << 60
ADVICE = "Copy the folders of all ranks again, or repack again."

Unit = tuple[int | None, ...]
"""Per axis of a weight, its elements behind one element of a tensor; None where all of them are."""

_BLOCKS: Unit = (FP8_BLOCK, FP8_BLOCK)
_GROUPS: Unit = (1, FP4_GROUP)
_PACKED_UNITS: dict[PackedForm, Unit] = {
    PackedForm.INT4_CHANNEL: (2, 1),
    PackedForm.FP4_GROUP: (1, 2),
}
_COMPANION_UNITS: dict[str, tuple[Unit, ...]] = {
    "release_scale": (_BLOCKS, _GROUPS),
    "release_weight": ((1, 1),),
    "negative_zeros": ((1, 8),),
}
"""Of those whose weight's form does not decide; the others have an element per row."""


@dataclass(frozen=True, slots=True)
class Slice:
    """The part of a weight that one rank holds: elements [first, stop) along `axis` of the shape `of`.

    They count numbers, of which packed forms hold two in one stored element.
    """

    axis: int
    first: int
    stop: int
    of: tuple[int, ...]


def scan_pack(directory: Path, pack: Pack | None) -> StoredFiles:
    """The headers of every shard of a checkpoint or pack; over ranks, with the slices of each tensor found.

    Raises CheckpointError where there is nothing to scan, and where a rank's folder or description is missing
    or is not one of this pack. Damaged shards and slices that do not make a whole are among the problems.
    """
    if pack is None or pack.ranks is None:
        return scan_shards(directory)
    shares = [_read_share(directory, pack, pack.ranks, index=index) for index in range(pack.ranks.ep)]
    return _Join(directory, pack, shares).join()


@dataclass(frozen=True, slots=True)
class _Share:
    """What one rank holds. The files of `files` are relative to the pack's directory."""

    folder: str
    weights: frozenset[str]
    """Names its description lists."""
    slices: Mapping[str, Slice]
    files: StoredFiles

    @property
    def description(self) -> str:
        return f"{self.folder}/{PACK_FILE}"

    def lacks(self, name: str) -> bool:
        """Whether a tensor is absent and no problem with the files has said why."""
        return name not in self.files.tensors and name not in self.files.damaged


def _read_share(directory: Path, pack: Pack, ranks: RankFolders, *, index: int) -> _Share:
    folder = ranks.folders[index]
    place = directory / folder
    if not place.is_dir():
        raise CheckpointError(
            f"{place} is not there: it holds the share of rank {index} of this pack's {ranks.ep}. {ADVICE}"
        )
    path = place / PACK_FILE
    described = read_description(path)
    _require_of_pack(path, described, ranks, index=index)
    weights = _listed_weights(path, described, pack)
    slices = _listed_slices(path, described, weights)
    found = scan_shards(place)
    files = StoredFiles(
        directory=directory,
        shards=tuple(f"{folder}/{file}" for file in found.shards),
        tensors={
            name: replace(stored, file=f"{folder}/{stored.file}") for name, stored in found.tensors.items()
        },
        problems=tuple(
            replace(problem, file=folder if problem.file is None else f"{folder}/{problem.file}")
            for problem in found.problems
        ),
        damaged=found.damaged,
        unreferenced=found.unreferenced,
    )
    return _Share(folder, weights, slices, files)


def _require_of_pack(path: Path, described: Mapping[str, Any], ranks: RankFolders, *, index: int) -> None:
    """Raise CheckpointError for the description of another rank, or of a rank of another pack."""
    own = {key: value for key, value in described.items() if key not in OWN_KEYS}
    for key in sorted({*own, *ranks.shared}):
        if own.get(key) != ranks.shared.get(key):
            raise CheckpointError(
                f"{path} has {key} {own.get(key)!r:.60} and the pack it is a share of "
                f"{ranks.shared.get(key)!r:.60}: they are of different repacks. {ADVICE}"
            )
    stated = described.get("rank")
    for key, wanted in (("index", index), ("tp", ranks.tp), ("ep", ranks.ep)):
        found = stated.get(key) if isinstance(stated, dict) else None
        if found != wanted:
            raise CheckpointError(f"{path} is of a rank with {key} {found!r:.40}, not {wanted}. {ADVICE}")


def _listed_weights(path: Path, described: Mapping[str, Any], pack: Pack) -> frozenset[str]:
    listed = described.get("tensors")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path} lists no tensors. {ADVICE}")
    for name, entry in listed.items():
        form = pack.forms.get(name)
        found = entry.get("format") if isinstance(entry, dict) else None
        if form is None or found != form.value:
            wanted = "no such tensor" if form is None else form.value
            raise CheckpointError(
                f"{path} says that {name[:120]} is {found!r:.40}; the pack it is a share of has {wanted}. "
                f"{ADVICE}"
            )
    return frozenset(listed)


def _listed_slices(path: Path, described: Mapping[str, Any], weights: frozenset[str]) -> dict[str, Slice]:
    listed = described.get("slices")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path} does not say which slices it holds. {ADVICE}")
    slices = {}
    for name, entry in listed.items():
        found = _parse_slice(entry)
        if name not in weights or found is None:
            raise CheckpointError(
                f"{path} has the slice {entry!r:.80} of {name[:120]}; a slice is of a tensor it lists: an "
                f"axis of the shape `of`, and a range of two rising integers within it. {ADVICE}"
            )
        slices[name] = found
    return slices


def _parse_slice(entry: object) -> Slice | None:
    if not isinstance(entry, dict):
        return None
    axis, extents, of = entry.get("axis"), _integers(entry.get("range")), _integers(entry.get("of"))
    if extents is None or of is None or len(extents) != 2 or not 1 <= len(of) <= MAX_DIMENSIONS:
        return None
    if type(axis) is not int or not 0 <= axis < len(of):
        return None
    first, stop = extents
    return Slice(axis, first, stop, tuple(of)) if first < stop <= of[axis] else None


def _integers(value: object) -> list[int] | None:
    if isinstance(value, list) and all(type(item) is int and 0 <= item < MAX_EXTENT for item in value):
        return value
    return None


@dataclass(frozen=True, slots=True)
class _Cut:
    """How ranks share a weight out: ranges along `axis` in order without gaps, and who has each."""

    axis: int
    of: tuple[int, ...]
    spans: tuple[tuple[int, int, tuple[int, ...]], ...]
    """(first, stop, ranks); several ranks hold copies."""


@dataclass(slots=True)
class _Join:
    """Puts the tensors of all ranks together and collects what does not fit."""

    directory: Path
    pack: Pack
    shares: Sequence[_Share]
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)

    def join(self) -> StoredFiles:
        holders: dict[str, list[int]] = {}
        listing: dict[str, list[int]] = {}
        for rank, share in enumerate(self.shares):
            self.problems += share.files.problems
            self.damaged |= share.files.damaged
            for name in share.files.tensors:
                holders.setdefault(name, []).append(rank)
            for name in share.weights:
                listing.setdefault(name, []).append(rank)
        for weight in self.pack.forms:
            self._join_weight(weight, listing.get(weight, []), holders)
        for name, ranks in holders.items():
            # of no known weight: nothing cuts it, and the comparison with the config will list it
            self._keep_whole(name, ranks)
        shards = (file for share in self.shares for file in share.files.shards)
        unreferenced = (name for share in self.shares for name in share.files.unreferenced)
        return StoredFiles(
            directory=self.directory,
            shards=tuple(shards),
            tensors=self.tensors,
            problems=tuple(self.problems),
            damaged=frozenset(self.damaged),
            unreferenced=tuple(dict.fromkeys(unreferenced)),
        )

    def _join_weight(self, weight: str, listing: list[int], holders: dict[str, list[int]]) -> None:
        """Join a weight and what lies beside it, and take them out of `holders`."""
        names = [weight, *(name for name in _companions(weight) if name not in self.pack.forms)]
        held = {name: holders.pop(name) for name in names if name in holders}
        for name in {weight: None, **held}:
            for rank in listing:
                if self.shares[rank].lacks(name):
                    detail = f"the rank's description lists {weight} and its shards lack this"
                    self._blame(name, "missing", self.shares[rank].folder, detail)
        if not any(weight in self.shares[rank].slices for rank in listing):
            for name, ranks in held.items():
                self._keep_whole(name, ranks)
            return
        cut = self._find_cut(weight, listing)
        if cut is None:
            self.damaged.update(held)
            return
        for name, ranks in held.items():
            units = _units(self.pack.forms[weight], name, weight, cut.of)
            if units[0][cut.axis] is None:
                self._keep_whole(name, ranks)
            else:
                self._join_slices(name, ranks, cut, units)

    def _find_cut(self, weight: str, listing: list[int]) -> _Cut | None:
        """The ranges of a weight's slices where they make the whole; else a problem."""
        slices = [(rank, self.shares[rank].slices.get(weight)) for rank in listing]
        wanted = next(found for _, found in slices if found is not None)
        ranks: dict[tuple[int, int], list[int]] = {}
        for rank, found in slices:
            if found is None or (found.axis, found.of) != (wanted.axis, wanted.of):
                mine = "the whole of it" if found is None else f"a slice along {_shown(found)}"
                detail = f"the rank holds {mine}, another a slice along {_shown(wanted)}"
                self._blame(weight, "slices disagree", self.shares[rank].description, detail)
                return None
            ranks.setdefault((found.first, found.stop), []).append(rank)
        spans = [(first, stop, tuple(who)) for (first, stop), who in sorted(ranks.items())]
        end = 0
        for first, stop, who in [*spans, (wanted.of[wanted.axis], MAX_EXTENT, (listing[-1],))]:
            if first != end:
                what = "is on no rank" if first > end else "is in two different slices"
                edges = (end, first) if first > end else (first, min(end, stop))
                detail = f"[{edges[0]}, {edges[1]}) along {_shown(wanted)} {what}"
                kind = "gap between slices" if first > end else "overlapping slices"
                self._blame(weight, kind, self.shares[who[0]].description, detail)
                return None
            end = stop
        return _Cut(wanted.axis, wanted.of, tuple(spans))

    def _join_slices(self, name: str, ranks: list[int], cut: _Cut, units: Sequence[Unit]) -> None:
        parts: list[StoredTensor] = []
        for _, _, who in cut.spans:
            lowest = self._equal_copies(name, [rank for rank in ranks if rank in who])
            if lowest is None:
                # the copies differ, or no rank holds this slice: both are said already
                self.damaged.add(name)
                return
            parts.append(lowest)
        misfits = [_misfit(parts, cut, unit) for unit in units]
        if all(misfits):
            place, detail = next(misfit for misfit in misfits if misfit is not None)
            self._blame(name, "slice misfit", place, detail)
            return
        unit = units[misfits.index(None)][cut.axis]
        assert unit is not None, (name, units)
        if len({(part.dtype, _without(part.shape, cut.axis)) for part in parts}) > 1:
            detail = f"the ranks hold {', '.join(sorted({_form(part) for part in parts}))[:200]}"
            self._blame(name, "slice misfit", parts[0].file, detail)
            return
        self.tensors[name] = parts[0] if len(parts) == 1 else _whole(parts, cut, unit)

    def _keep_whole(self, name: str, ranks: list[int]) -> None:
        found = self._equal_copies(name, ranks)
        if found is not None:
            self.tensors[name] = found

    def _equal_copies(self, name: str, ranks: list[int]) -> StoredTensor | None:
        """The lowest rank's copy of what several ranks hold. None where there is none or copies differ."""
        copies = [self.shares[rank].files.tensors[name] for rank in ranks]
        for copy in copies[1:]:
            if (copy.dtype, copy.shape) != (copies[0].dtype, copies[0].shape):
                detail = f"{_form(copy)}, and {_form(copies[0])} in {copies[0].file}"
                self._blame(name, "copies differ", copy.file, detail)
                return None
        return copies[0] if copies else None

    def _blame(self, name: str, kind: str, file: str, detail: str) -> None:
        self.damaged.add(name)
        self.problems.append(Problem(kind, name, file, detail))


def _whole(parts: Sequence[StoredTensor], cut: _Cut, unit: int) -> StoredTensor:
    shape = list(parts[0].shape)
    shape[cut.axis] = -(-cut.of[cut.axis] // unit)
    return replace(
        parts[0],
        shape=tuple(shape),
        num_bytes=sum(part.num_bytes for part in parts),
        slices=tuple(parts),
        slice_axis=cut.axis,
    )


def _companions(weight: str) -> list[str]:
    if not weight.endswith(".weight"):
        return []
    stem = weight.removesuffix("weight")
    return [stem + companion for companion in COMPANIONS]


def _units(form: PackedForm, name: str, weight: str, of: tuple[int, ...]) -> tuple[Unit, ...]:
    """The units in which a tensor may be cut with its weight; its shape says which where there are two."""
    if len(of) != 2:
        return ((1,) * len(of),)
    if name == weight:
        return (_PACKED_UNITS.get(form, (1, 1)),)
    kind = name.rpartition(".")[2]
    if kind == "scale":
        return (_BLOCKS,) if form is PackedForm.FP8_BLOCK else (_GROUPS,)
    return _COMPANION_UNITS.get(kind, ((1, None),))


def _misfit(parts: Sequence[StoredTensor], cut: _Cut, unit: Unit) -> tuple[str, str] | None:
    """File and reason of the first slice whose shape is not what its range gives; None where all are."""
    step = unit[cut.axis]
    assert step is not None, unit
    for part, (first, stop, _) in zip(parts, cut.spans, strict=True):
        if first % step or (stop % step and stop != cut.of[cut.axis]):
            return part.file, f"[{first}, {stop}) cuts through it: it has one element per {step}"
        wanted = [
            None if each is None else -(-extent // each) for extent, each in zip(cut.of, unit, strict=True)
        ]
        wanted[cut.axis] = -(-stop // step) - first // step
        if not _has_extents(part.shape, wanted):
            shown = [extent for extent in wanted if extent is not None]
            return part.file, f"{list(part.shape)}, expected {shown} for [{first}, {stop}) of {list(cut.of)}"
    return None


def _has_extents(shape: tuple[int, ...], wanted: Sequence[int | None]) -> bool:
    known = [extent for extent in wanted if extent is not None]
    if len(known) == len(wanted):
        return list(shape) == known
    # one value per row, with or without an axis of its own beside it
    return len(shape) in (1, 2) and shape[0] == known[0]


def _without(shape: Iterable[int], axis: int) -> tuple[int, ...]:
    return tuple(extent for index, extent in enumerate(shape) if index != axis)


def _shown(found: Slice) -> str:
    return f"axis {found.axis} of {list(found.of)}"


def _form(stored: StoredTensor) -> str:
    return f"{stored.dtype} {list(stored.shape)}"
