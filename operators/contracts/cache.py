"""Writes into paged caches, and how rows are stored there.

Legend: T rows to write, D row width, C pages, S rows per page, W elements of a stored row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ascend_v4.operators.contract import BITWISE, CACHES, FLOATS, INT64, Spec, operator
from ascend_v4.operators.contracts.quantize import (
    KV_GROUP,
    IndexFormat,
    KvFormat,
    fake_quantize_fp8,
    quantize_index,
)


@dataclass(frozen=True, slots=True)
class CacheStorage:
    """A cache as a tensor [C, S, width] of `dtype`. This one stores a row's D numbers one after the other.

    Implementations whose kernels want another layout bring a subclass; within a backend all that write and
    read a cache must bring the same one.
    """

    dtype: torch.dtype
    width: int

    def pack(self, pages_CSD: Tensor) -> Tensor:
        """Stored pages [C, S, width] of numbers [C, S, D]. For tests and transfers, not for the model."""
        return pages_CSD.to(self.dtype)

    def unpack(self, stored_CSW: Tensor) -> Tensor:
        """The numbers [C, S, D] of stored pages, float32."""
        return stored_CSW.float()


def kv_storage(*, width: int, nope_dim: int, format: KvFormat, dtype: torch.dtype) -> CacheStorage:
    """Rows as they are, in the model's dtype: quantised ones are read back before they are cached."""
    return CacheStorage(dtype, width)


def index_key_storage(*, width: int, format: IndexFormat, dtype: torch.dtype) -> CacheStorage:
    """Rows as they are; codes times float scales need float32."""
    is_wide = format in (IndexFormat.INT8, IndexFormat.FP8)
    return CacheStorage(torch.float32 if is_wide else dtype, width)


def scatter_rows(cache_CSD: Tensor, rows_TD: Tensor, slots_T: Tensor) -> None:
    """cache row slots[t] becomes rows[t]; negative slots are skipped."""
    if len(slots_T) == 0:
        return
    flat = cache_CSD.view(-1, cache_CSD.shape[-1])
    if bool((slots_T < 0).any()):
        kept = slots_T >= 0
        rows_TD, slots_T = rows_TD[kept], slots_T[kept]
    flat.index_copy_(0, slots_T, rows_TD.to(cache_CSD.dtype))


@operator(
    source="reference/model.md 2.4 step 2; ascend-operators.md 7",
    tolerance=BITWISE,
    mutates=("cache_CSD",),
    storage=kv_storage,
)
def write_kv(
    cache_CSD: Annotated[Tensor, Spec("C S W", CACHES)],
    kv_TD: Annotated[Tensor, Spec("T D", FLOATS)],
    slots_T: Annotated[Tensor, Spec("T", INT64)],
    *,
    nope_dim: int,
    format: KvFormat,
) -> None:
    """Caches window rows or compressed entries. Slots are page * rows per page + row; -1 skips a row.

    With FP8_GROUP the first `nope_dim` channels are quantised and read back; the rope channels are stored as
    they are.
    """
    if format is KvFormat.FP8_GROUP:
        kv_TD = kv_TD.clone()
        kv_TD[:, :nope_dim] = fake_quantize_fp8.reference(kv_TD[:, :nope_dim], group=KV_GROUP)
    scatter_rows(cache_CSD, kv_TD, slots_T)


@operator(
    source="reference/model.md 2.6; ascend-operators.md 7.2",
    tolerance=BITWISE,
    mutates=("cache_CSD",),
    storage=index_key_storage,
)
def write_index_keys(
    cache_CSD: Annotated[Tensor, Spec("C S W", CACHES)],
    keys_TD: Annotated[Tensor, Spec("T D", FLOATS)],
    slots_T: Annotated[Tensor, Spec("T", INT64)],
    *,
    format: IndexFormat,
) -> None:
    """Caches indexer keys, rotated and quantised as `format` says. Slots as in write_kv."""
    scatter_rows(cache_CSD, quantize_index.reference(keys_TD, format=format), slots_T)
