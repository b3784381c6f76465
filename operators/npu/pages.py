"""What all kernels over paged caches have in common: 32-bit tables, block sizes, writes of rows.

Legend: T rows to write, N rows of a cache, D row width, C pages, S rows per page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.errors import ContractError
from ascend_v4.operators.contract import Limit

LARGEST_INT32 = (1 << 31) - 1

BLOCKS = tuple(
    Limit(size=size, low=16, high=1024, multiple=16, source="READMEs of sharedkv and the indexer: block_size")
    for size in ("window_block", "csa_block", "hca_block")
)
"""Rows per page of every cache that attention reads."""
KEY_BLOCKS = tuple(limit for limit in BLOCKS if limit.size == "csa_block")
"""Rows per page of the indexer's keys."""


def table32(table_BP: Tensor) -> Tensor:
    """A page table as kernels take it: int32, no gaps."""
    return table_BP.to(torch.int32).contiguous()


def scatter_by_vllm(rows_ND: Tensor, update_TD: Tensor, slots_T: Tensor) -> None:
    """rows[slots[t]] = update[t] by npu_scatter_nd_update_v2, which skips rows at negative offsets.

    Its own callers pass (page, row) pairs that they split once per step; one index over all rows of the cache
    is the same offset to the kernel, and nothing has to be divided in every layer.
    Raises ContractError for a cache whose last offset does not fit: the kernel multiplies index and stride in
    32 bits, and what wraps to a negative offset would not be written at all.
    """
    if rows_ND.numel() > LARGEST_INT32:
        raise ContractError(
            f"a cache has {rows_ND.numel()} elements; npu_scatter_nd_update_v2 counts them in 32 bits, at "
            f"most {LARGEST_INT32}. Give the caches fewer tokens, or choose another provider of the write."
        )
    torch.ops._C_ascend.npu_scatter_nd_update_v2(rows_ND, slots_T.to(torch.int32).unsqueeze(1), update_TD)


def scatter_in_range(rows_ND: Tensor, update_TD: Tensor, slots_T: Tensor) -> None:
    """rows[slots[t]] = update[t] by npu_scatter_nd_update_, whose documentation wants every index in range.

    A skipped row writes what row 0 holds onto row 0: that lies in the reserved page, which no other row of a
    step is written to.
    """
    skipped_T = slots_T < 0
    update_TD = torch.where(skipped_T.unsqueeze(1), rows_ND[:1], update_TD)
    indices_T1 = slots_T.masked_fill(skipped_T, 0).unsqueeze(1)
    torch.ops.npu.npu_scatter_nd_update_(rows_ND, indices_T1, update_TD)
