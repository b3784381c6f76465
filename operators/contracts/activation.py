"""The clamped SwiGLU of routed and shared experts. Legend: T rows, J intermediate channels."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contract import FLOATS, Spec, Tolerance, operator


@operator(
    source="reference/model.md 2.7; ascend-operators.md 13.2",
    tolerance=Tolerance(2, "one rounding of the output after float32 arithmetic"),
)
def clamped_swiglu(
    gate_up_TJ: Annotated[Tensor, Spec("T J", FLOATS)],
    row_weight_T: Annotated[Tensor | None, Spec("T", (torch.float32,))] = None,
    *,
    limit: float,
) -> Annotated[Tensor, Spec("T I", FLOATS)]:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), times the row's weight; gate is the first half of J.

    The routing weight is applied here, before the down projection, so it stands inside its activation
    quantisation.
    """
    gate, up = gate_up_TJ.float().chunk(2, dim=-1)
    hidden = functional.silu(gate.clamp_max(limit)) * up.clamp(-limit, limit)
    if row_weight_T is not None:
        hidden = hidden * row_weight_T.unsqueeze(-1)
    return hidden.to(gate_up_TJ.dtype)
