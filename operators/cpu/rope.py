"""Rotary embedding on a CPU: float32 heads are rotated where they lie."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.batch import Plan
from ascend_v4.operators.contracts.rope import RopeRows, rotate


@implements(rotate, backend="cpu", provider="torch")
def rotate_in_place(x_THD: Tensor, rows: Plan, *, inverse: bool = False) -> None:
    """One complex product on a view of the rotated channels; other dtypes go through float32."""
    assert isinstance(rows, RopeRows), type(rows)
    turn = rows.inverse if inverse else rows.forward
    tail = x_THD[..., x_THD.shape[-1] - 2 * turn.shape[-1] :]
    pairs = tail.view(*tail.shape[:-1], turn.shape[-1], 2)
    if x_THD.dtype is torch.float32 and _views_as_complex(pairs):
        torch.view_as_complex(pairs).mul_(turn)
        return
    wide = pairs.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    pairs.copy_(torch.view_as_real(torch.view_as_complex(wide).mul_(turn)))


def _views_as_complex(pairs: Tensor) -> bool:
    """Whether the pairs are neighbours at even offsets, as a complex view wants."""
    *outer, inner = pairs.stride()
    return inner == 1 and pairs.storage_offset() % 2 == 0 and all(stride % 2 == 0 for stride in outer)
