"""Writes into paged caches. Legend: T rows to write, D row width, C pages, S rows per page."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from ascend_v4.operators.contract import BITWISE, FLOATS, INT64, Spec, operator
from ascend_v4.operators.contracts.quantize import (
    KV_GROUP,
    IndexFormat,
    KvFormat,
    fake_quantize_fp8,
    quantize_index,
)


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
    source="reference/model.md 2.4 step 2; ascend-operators.md 7", tolerance=BITWISE, mutates=("cache_CSD",)
)
def write_kv(
    cache_CSD: Annotated[Tensor, Spec("C S D", FLOATS)],
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


@operator(source="reference/model.md 2.6; ascend-operators.md 7.2", tolerance=BITWISE, mutates=("cache_CSD",))
def write_index_keys(
    cache_CSD: Annotated[Tensor, Spec("C S D", FLOATS)],
    keys_TD: Annotated[Tensor, Spec("T D", FLOATS)],
    slots_T: Annotated[Tensor, Spec("T", INT64)],
    *,
    format: IndexFormat,
) -> None:
    """Caches indexer keys, rotated and quantised as `format` says. Slots as in write_kv."""
    scatter_rows(cache_CSD, quantize_index.reference(keys_TD, format=format), slots_T)
