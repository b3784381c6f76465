"""Caches of a case: drawn as numbers, stored as the target stores them, compared as numbers again.

Legend: C pages, S rows per page, D channels, W elements of a stored row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.operators.contract import Implementation, Operator
from ascend_v4.operators.contracts.cache import CacheStorage, write_index_keys, write_kv
from ascend_v4.operators.contracts.quantize import KvFormat
from ascend_v4.operators.select import NO_SIZES
from ascend_v4.operators.testing.recipe import IndexKeyCache, Inputs, KvCache


def kv_format_of(target: Target) -> KvFormat:
    """How a target's caches hold key-values where a case leaves it to the target."""
    return KvFormat.FP8_GROUP if target.chip is Chip.A950 else KvFormat.PLAIN


@dataclass(frozen=True, slots=True)
class StoredCaches:
    """The caches among a case's arguments, and how the case stores them."""

    arguments: Mapping[str, Tensor]
    storages: Mapping[str, CacheStorage]

    def numbers(self, name: str) -> Tensor:
        """What a cache holds now, float32 [C, S, D]."""
        return self.storages[name].unpack(self.arguments[name])

    def is_rows(self, name: str) -> bool:
        """Whether stored rows lie one after the other, each with the numbers of one logical row."""
        return type(self.storages[name]) is CacheStorage


def store(
    inputs: Inputs,
    target: Target,
    chosen: Operator[..., Any] | Implementation[..., Any],
    *,
    dtype: torch.dtype,
) -> StoredCaches:
    """The caches as an implementation on a target has them.

    A writer brings the storage itself; readers get that of the writer which the target would choose.
    """
    storages = {name: _storage(cache, target, chosen, dtype=dtype) for name, cache in inputs.caches.items()}
    packed = {name: storage.pack(inputs.arguments[name]) for name, storage in storages.items()}
    return StoredCaches(packed, storages)


def read_back(inputs: Inputs, stored: StoredCaches, *, dtype: torch.dtype) -> StoredCaches:
    """The same numbers as the reference keeps them: what a trip through the storage left of them.

    stored holds the very numbers of the inputs, not yet written to.
    """
    arguments: dict[str, Tensor] = {}
    storages: dict[str, CacheStorage] = {}
    for name, cache in inputs.caches.items():
        declared, settings = _declared(cache, Target(device="cpu"))
        assert declared.storage is not None, declared.name
        storages[name] = declared.storage(**settings, dtype=dtype)
        numbers = inputs.arguments[name] if inputs.far else stored.numbers(name)
        arguments[name] = storages[name].pack(numbers)
    return StoredCaches(arguments, storages)


def _storage(
    cache: KvCache | IndexKeyCache,
    target: Target,
    chosen: Operator[..., Any] | Implementation[..., Any],
    *,
    dtype: torch.dtype,
) -> CacheStorage:
    declared, settings = _declared(cache, target)
    make = chosen.storage
    if make is None and isinstance(chosen, Implementation):
        writers = (
            each
            for each in declared.implementations
            if each.backend == target.backend and each.refusal(target, NO_SIZES) is None
        )
        make = next((each.storage for each in writers), None)
    make = make or declared.storage
    assert make is not None, declared.name
    storage: CacheStorage = make(**settings, dtype=dtype)
    return storage


def _declared(cache: KvCache | IndexKeyCache, target: Target) -> tuple[Operator[..., Any], dict[str, object]]:
    if isinstance(cache, IndexKeyCache):
        return write_index_keys, {"width": cache.width, "format": cache.format}
    format = cache.format or kv_format_of(target)
    return write_kv, {"width": cache.width, "nope_dim": cache.nope_dim, "format": format}
