"""The tensors behind the caches of a model, and page tables as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ascend_v4.cache.layout import CacheRole, CacheSpec, PageGroup, PoolPlan
from ascend_v4.cache.pages import SequencePages
from ascend_v4.config import ModelConfig
from ascend_v4.model.numerics import Numerics
from ascend_v4.operators.contracts.cache import CacheStorage, write_index_keys, write_kv
from ascend_v4.operators.select import OperatorTable


class CacheTensors:
    """One tensor [pages, rows per page, row width] per cache, zero-filled: untouched pages cost no memory on
    a CPU.
    """

    def __init__(
        self,
        specs: Iterable[CacheSpec],
        plan: PoolPlan,
        *,
        storages: Mapping[CacheRole, CacheStorage],
        device: torch.device,
    ) -> None:
        self._tensors: dict[str, Tensor] = {}
        for spec in specs:
            storage = storages[spec.role]
            width = spec.row_width if spec.role is CacheRole.STATE else storage.width
            shape = (plan.pages[spec.group], spec.rows_per_page, width)
            self._tensors[spec.name] = _zeros(shape, dtype=storage.dtype, device=device)

    def __getitem__(self, spec: CacheSpec) -> Tensor:
        return self._tensors[spec.name]


def cache_storages(
    config: ModelConfig, operators: OperatorTable, numerics: Numerics
) -> dict[CacheRole, CacheStorage]:
    """How the chosen operators store the rows of each kind of cache."""
    return {
        CacheRole.KV: operators.storage(write_kv)(
            width=config.head_dim, nope_dim=config.nope_head_dim, format=numerics.kv, dtype=numerics.dtype
        ),
        CacheRole.INDEX_KEYS: operators.storage(write_index_keys)(
            width=config.index_head_dim, format=numerics.index, dtype=numerics.dtype
        ),
        # row widths of states differ by layer
        CacheRole.STATE: CacheStorage(torch.float32, 0),
    }


def _zeros(shape: tuple[int, int, int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU of memory that the system backs when it is first written, which torch.zeros does not
    do.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def table_tensor(
    sequences: Sequence[SequencePages],
    group: PageGroup,
    *,
    device: torch.device,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """Page tables of one group, int64 [B, P]; shorter ones end in page 0.

    A shape may ask for more rows, which are all page 0, and for more pages.
    """
    tables = [pages.tables[group] for pages in sequences]
    if shape is None:
        shape = (len(tables), max(len(table) for table in tables))
    rows = np.zeros(shape, dtype=np.int64)
    for row, table in zip(rows, tables, strict=False):
        row[: len(table)] = table
    return torch.from_numpy(rows).to(device)
