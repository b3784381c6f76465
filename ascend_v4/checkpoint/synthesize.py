"""Writes a random checkpoint in the release layout: names, dtypes, packing, shards and index.

Everything is written beside the target and moved there when it is complete, so that no half checkpoint ever
lies under its name. Memory is bounded by one piece of one tensor.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_v4.checkpoint.index import DTYPE_BYTES, Specs, expected_tensors
from ascend_v4.checkpoint.names import CONFIG_FILE, INDEX_FILE
from ascend_v4.checkpoint.tokenizer_files import TokenizerChoice, tokenizer_files
from ascend_v4.checkpoint.values import RandomValues
from ascend_v4.config import parse_model_config
from ascend_v4.errors import CheckpointError, ConfigError

MAX_SHARD_BYTES = 4_000_000_000
"""Default bound of a shard's tensors; the release's shards have about 3.5 GB."""

_HEADER_ENTRY_BYTES = 160
"""Space to reserve for one tensor in a header and in the index."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesisPlan:
    """What will be written, decided before anything is."""

    fields: dict[str, Any]
    specs: Specs
    shards: tuple[tuple[str, ...], ...]
    """Tensor names of each shard, in the order they lie in it."""
    texts: dict[str, str]
    """Small files by name: config and tokenizer."""
    seed: int
    num_experts: int
    skips_drafts: bool
    """True where the config asks for draft blocks, which are not made."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.num_bytes for spec in self.specs.values())


def plan_synthesis(
    fields: Mapping[str, Any],
    *,
    seed: int = 0,
    tokenizer: TokenizerChoice | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    source: str = "config",
) -> SynthesisPlan:
    """Validate a config and lay its checkpoint out.

    `fields` are the config's own and are written as they are. Raises ConfigError, TokenizerError.
    """
    config = parse_model_config(fields, source=source)
    if max_shard_bytes < 1:
        raise ConfigError(f"the shard size is {max_shard_bytes} bytes; it must be at least 1.")
    specs = expected_tensors(config)
    try:
        texts = {CONFIG_FILE: json.dumps(dict(fields), indent=1, allow_nan=False) + "\n"}
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{source} cannot be written as JSON: {error}. Remove what JSON cannot spell."
        ) from None
    if tokenizer is not None:
        texts |= tokenizer_files(tokenizer, config)
    return SynthesisPlan(
        fields=dict(fields),
        specs=specs,
        shards=_split(specs, max_shard_bytes),
        texts=texts,
        seed=seed,
        num_experts=config.n_routed_experts,
        skips_drafts=config.draft is not None,
    )


def synthesize(
    directory: str | Path, plan: SynthesisPlan, *, on_bytes: Callable[[int], None] | None = None
) -> float:
    """Write a planned checkpoint; returns the seconds it took. `on_bytes` hears of every piece written.

    Raises CheckpointError where the directory holds anything, the disk is too small or a write fails.
    """
    target = Path(directory)
    started = time.perf_counter()
    _require_empty(target)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_space(target.parent, plan)
        partial.mkdir()
        _write_all(partial, plan, on_bytes)
        # an empty directory may be renamed over, and anything else must not be
        partial.rename(target)
        _sync_directory(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return time.perf_counter() - started


def _split(specs: Specs, max_shard_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Tensors in release order, cut into shards; a tensor larger than the bound has one to itself."""
    shards: list[list[str]] = [[]]
    filled_bytes = 0
    for name, spec in specs.items():
        if shards[-1] and filled_bytes + spec.num_bytes > max_shard_bytes:
            shards.append([])
            filled_bytes = 0
        shards[-1].append(name)
        filled_bytes += spec.num_bytes
    # wide elements first: every tensor is then aligned to its element
    return tuple(tuple(sorted(names, key=lambda name: -DTYPE_BYTES[specs[name].dtype])) for names in shards)


def _require_empty(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        if any(target.iterdir()):
            raise CheckpointError(f"{target} is not empty. Name a new directory, or remove this one first.")
    elif target.exists() or target.is_symlink():
        raise CheckpointError(f"{target} exists and is not a directory. Name a new directory.")
    if not target.name:
        raise CheckpointError(f"{target} cannot be replaced. Name a new directory.")


def _require_space(parent: Path, plan: SynthesisPlan) -> None:
    texts_bytes = sum(len(text.encode()) for text in plan.texts.values())
    needed_bytes = plan.num_bytes + texts_bytes + 2 * len(plan.specs) * _HEADER_ENTRY_BYTES
    free_bytes = shutil.disk_usage(parent).free
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"the checkpoint takes {needed_bytes} bytes and {parent} has {free_bytes} free. "
            "Name a directory on a larger disk."
        )


def _write_all(partial: Path, plan: SynthesisPlan, on_bytes: Callable[[int], None] | None) -> None:
    values = RandomValues(plan.specs, seed=plan.seed, num_experts=plan.num_experts)
    weight_map: dict[str, str] = {}
    for shard_index, names in enumerate(plan.shards, start=1):
        file = f"model-{shard_index:05d}-of-{len(plan.shards):05d}.safetensors"
        _write_shard(partial / file, plan.specs, names, values=values, on_bytes=on_bytes)
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": plan.num_bytes},
        # the release's order, not the order within shards
        "weight_map": {name: weight_map[name] for name in plan.specs},
    }
    texts = plan.texts | {INDEX_FILE: json.dumps(index, indent=1) + "\n"}
    for file, text in texts.items():
        with (partial / file).open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            os.fsync(stream.fileno())
    _sync_directory(partial)


def _write_shard(
    path: Path,
    specs: Specs,
    names: tuple[str, ...],
    *,
    values: RandomValues,
    on_bytes: Callable[[int], None] | None,
) -> None:
    with path.open("wb", buffering=0) as stream:
        stream.write(_header(specs, names))
        for name in names:
            for piece in values.draw(name):
                _write_fully(stream.fileno(), piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
        os.fsync(stream.fileno())


def _write_fully(descriptor: int, piece: memoryview) -> None:
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _header(specs: Specs, names: tuple[str, ...]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start_bytes = 0
    for name in names:
        spec = specs[name]
        stop_bytes = start_bytes + spec.num_bytes
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [start_bytes, stop_bytes],
        }
        start_bytes = stop_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    # the format pads with spaces so that the data starts at a multiple of 8
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
