"""How near a correct run came to its bound."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import Tolerance
from ascend_v4.operators.testing.cases import ROUNDED_INSIDE, Case, Run


def share_of_allowed(case: Case, got: Run, want: Run) -> float:
    """The largest difference of any output, as a share of what its tolerance allows; 0 where bits are equal.

    For a run that `case.require_agreement` has passed. Choices of entries are judged by their scores, and
    count as 0 here.
    """
    pairs = [
        (mine, theirs)
        for mine, theirs in zip(_outputs(got.outputs), _outputs(want.outputs), strict=False)
        if mine.shape == theirs.shape
    ]
    pairs += [
        (got.written(name, rows), want.written(name, rows)) for name, rows in want.inputs.written_rows.items()
    ]
    is_mixed = len({theirs.dtype for _, theirs in pairs}) > 1
    return max((_share(case, *pair, is_mixed=is_mixed) for pair in pairs), default=0.0)


def _outputs(value: object) -> tuple[Tensor, ...]:
    if isinstance(value, Tensor):
        return (value,)
    return value if isinstance(value, tuple) else ()


def _share(case: Case, got: Tensor, want: Tensor, *, is_mixed: bool) -> float:
    tolerance: Tolerance = case.tolerance
    if is_mixed and want.dtype is not torch.float32:
        tolerance = case.operator.tolerance
    if not want.dtype.is_floating_point or tolerance.steps == 0:
        return 0.0
    low = case.operator.name in ROUNDED_INSIDE and want.dtype is torch.float32
    dtype = case.dtype if low else want.dtype
    mine, theirs = got.detach().cpu().to(dtype).double(), want.detach().cpu().to(dtype).double()
    finite = torch.isfinite(theirs)
    if not bool(finite.any()):
        return 0.0
    worst = (mine - theirs)[finite].abs().max().item()
    allowed = tolerance.steps * torch.finfo(dtype).eps * theirs[finite].abs().max().item()
    return worst / allowed if worst else 0.0
