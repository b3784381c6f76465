"""The tensors behind the caches of a model, and page tables as tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ascend_v4.cache.layout import CacheSpec, PageGroup, PoolPlan
from ascend_v4.cache.pages import SequencePages


class CacheTensors:
    """One tensor [pages, rows per page, row width] per cache, zero-filled: untouched pages cost no memory on
    a CPU.
    """

    def __init__(
        self, specs: Iterable[CacheSpec], plan: PoolPlan, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._tensors = {
            spec.name: _zeros(
                (plan.pages[spec.group], spec.rows_per_page, spec.row_width),
                dtype=torch.float32 if spec.is_state or spec.is_wide else dtype,
                device=device,
            )
            for spec in specs
        }

    def __getitem__(self, spec: CacheSpec) -> Tensor:
        return self._tensors[spec.name]


def _zeros(shape: tuple[int, int, int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU of memory that the system backs when it is first written, which torch.zeros does not
    do.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def table_tensor(sequences: Sequence[SequencePages], group: PageGroup, *, device: torch.device) -> Tensor:
    """Page tables of one group, int64 [B, P]; shorter ones end in page 0."""
    tables = [pages.tables[group] for pages in sequences]
    longest = max(len(table) for table in tables)
    return torch.tensor([table + [0] * (longest - len(table)) for table in tables], device=device).view(
        len(tables), longest
    )
