"""A checkpoint's tensors as views of its memory-mapped shards, checked against the config first."""

from __future__ import annotations

import mmap
import sys
from math import prod
from pathlib import Path
from types import TracebackType

import torch

from ascend_v4.checkpoint.compare import Comparison, compare
from ascend_v4.checkpoint.index import DTYPE_BYTES, Role, Specs, expected_tensors
from ascend_v4.checkpoint.names import CONFIG_FILE
from ascend_v4.checkpoint.pack import (
    Pack,
    find_pack,
    pack_config,
    pack_tensors,
    require_unrotated,
)
from ascend_v4.checkpoint.rank_sets import scan_pack
from ascend_v4.checkpoint.shards import Problem, StoredFiles, StoredTensor, raise_problems
from ascend_v4.config import ModelConfig
from ascend_v4.errors import CheckpointError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    # torch 2.6 has no such dtype: its exponents are then read as plain bytes
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}
"""Torch dtype of each safetensors dtype. Packed FP4 is I8, two weights per element, low nibble first."""


class CheckpointReader:
    """Tensors of one checkpoint directory, mapped and, unless ranks share them out, not copied.

    `open`, then `verify`, then `tensor`. Tensors stay valid after `close`: the last to go unmaps its shard.
    """

    def __init__(
        self, directory: Path, config: ModelConfig, files: StoredFiles, *, pack: Pack | None = None
    ) -> None:
        self.directory = directory
        self.config = config if pack is None else pack_config(config)
        self.pack = pack
        """How a pack says its weights are stored; None for the release layout."""
        self.specs: Specs = expected_tensors(config)
        known: frozenset[str] = frozenset()
        if pack is not None:
            require_unrotated(directory, pack, [*files.tensors, *files.unreferenced])
            self.specs = pack_tensors(config, pack, files.tensors)
            known = pack.kept_names()
        self.comparison: Comparison = compare(config, self.specs, files, known=known)
        self._files = files
        self._maps: dict[str, mmap.mmap] = {}

    @classmethod
    def open(cls, path: str | Path, *, config: ModelConfig | None = None) -> CheckpointReader:
        """Read the headers of a checkpoint or pack; the config is the directory's own unless one is given.

        Damaged shards do not stop it: `verify` reports them all. Raises CheckpointError, ConfigError.
        """
        directory = Path(path)
        if not directory.is_dir():
            raise CheckpointError(f"{directory} is not a directory. Name the one that holds {CONFIG_FILE}.")
        pack = find_pack(directory)
        config = config or ModelConfig.from_file(directory)
        return cls(directory, config, scan_pack(directory, pack), pack=pack)

    def verify(self) -> None:
        """Compare every expected tensor with the files; one CheckpointError lists every difference."""
        problems = list(self.comparison.problems)
        problems += [problem for name in self._token_expert_names() for problem in self._bad_expert_ids(name)]
        raise_problems(problems, source=str(self.directory))

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Tensors in the files that the model has no place for; worth a warning, never loaded."""
        return self.comparison.unexpected

    @property
    def drafts(self) -> tuple[str, ...]:
        """Tensors of draft blocks (dspark); listed, never loaded."""
        return self.comparison.drafts

    @property
    def num_tensors(self) -> int:
        """Tensors whose bytes are all in the files."""
        return len(self._files.tensors)

    @property
    def stored_bytes(self) -> int:
        """Bytes of those tensors."""
        return sum(stored.num_bytes for stored in self._files.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._files.tensors

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies. Raises CheckpointError where no shard holds it whole."""
        try:
            return self._files.tensors[name]
        except KeyError:
            raise CheckpointError(
                f"{self.directory}: no shard holds {name} whole. Run ascend-v4 inspect to see the damage."
            ) from None

    def dtype(self, name: str) -> str:
        """Safetensors spelling of a tensor's dtype. Raises CheckpointError where no shard holds it whole."""
        return self.stored(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor in the file's own dtype, sharing memory with the mapping.

        Writing to it never reaches the file. It is copied only where its offset does not suit its dtype, and
        where ranks share it out: then every call joins the slices in memory of its own.
        Raises CheckpointError where no shard holds it whole.
        """
        stored = self.stored(name)
        return self.raw_bytes(name).view(TORCH_DTYPES[stored.dtype]).view(stored.shape)

    def raw_bytes(self, name: str) -> torch.Tensor:
        """A tensor's bytes as they lie in its file, uint8 of one axis; as `tensor` in all else."""
        stored = self.stored(name)
        if stored.slices and stored.num_bytes:
            return self._joined(stored)
        raw = self._mapped(stored)
        # kernels may assume that an element never straddles its natural boundary
        return raw.clone() if stored.offset_bytes % DTYPE_BYTES[stored.dtype] else raw

    def byte_runs(self, name: str) -> tuple[torch.Tensor, ...]:
        """What `raw_bytes` has, in order; slices that lie one after another stay apart and are not copied."""
        stored = self.stored(name)
        if prod(stored.shape[: stored.slice_axis]) != 1:
            return (self.raw_bytes(name),)
        return tuple(self._mapped(place) for place in stored.places)

    def release(self, name: str) -> None:
        """Let the system drop the pages of a tensor that was consumed; reading it again maps them anew.

        Whole pages only, so neighbours keep theirs. What was written into the tensor is lost.
        """
        for place in self.stored(name).places:
            self._release(place)

    def close(self) -> None:
        """Drop the mappings; shards with living tensors stay mapped until these go."""
        # not mmap.close: tensors keep the mapping object alive, and close would unmap it under them
        self._maps.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mapped(self, place: StoredTensor) -> torch.Tensor:
        """The bytes at one place, uint8 of one axis, sharing memory with the mapping."""
        if place.num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(
            self._map(place.file), dtype=torch.uint8, count=place.num_bytes, offset=place.offset_bytes
        )

    def _joined(self, stored: StoredTensor) -> torch.Tensor:
        """The bytes of all slices in the order of the whole tensor, uint8 of one axis."""
        outer = prod(stored.shape[: stored.slice_axis])
        slices = [self._mapped(place).view(outer, place.num_bytes // outer) for place in stored.slices]
        joined = torch.cat(slices, dim=1).view(-1)
        for place in stored.slices:
            # a slice is copied once; its pages would only double the memory of the whole
            self._release(place)
        return joined

    def _release(self, place: StoredTensor) -> None:
        mapped = self._maps.get(place.file)
        if mapped is None or not hasattr(mapped, "madvise"):
            return
        page = mmap.PAGESIZE
        start = -(-place.offset_bytes // page) * page
        stop = (place.offset_bytes + place.num_bytes) // page * page
        if stop > start:
            mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _map(self, file: str) -> mmap.mmap:
        if file not in self._maps:
            try:
                with (self.directory / file).open("rb") as stream:
                    self._maps[file] = _map_private(stream.fileno())
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{self.directory / file} cannot be mapped: {error}.") from None
        return self._maps[file]

    def _token_expert_names(self) -> list[str]:
        return [
            name
            for name, spec in self.specs.items()
            if spec.role is Role.TOKEN_EXPERTS
            and name in self
            and (self.stored(name).dtype, self.stored(name).shape) == (spec.dtype, spec.shape)
        ]

    def _bad_expert_ids(self, name: str) -> list[Problem]:
        ids = self.tensor(name)
        low, high = (int(value) for value in torch.aminmax(ids))
        if low >= 0 and high < self.config.n_routed_experts:
            return []
        detail = f"expert ids span [{low}, {high}]; there are {self.config.n_routed_experts} routed experts"
        return [Problem("bad expert id", name, self.stored(name).file, detail)]


def _map_private(descriptor: int) -> mmap.mmap:
    """Map a whole file copy-on-write: torch wants writable memory, and no write may reach the file."""
    if sys.platform == "linux":
        # without NORESERVE the kernel charges a private mapping as if all of it would be written, and refuses
        # shards that are larger than its memory; the mmap module names the flag only from Python 3.13 on
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
