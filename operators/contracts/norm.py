"""RMS norms. Statistics in float32, one rounding at the end, unless the release does otherwise.

Legend: T tokens, D channels, H heads.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contract import FLOATS, Spec, Tolerance, operator


def prepare_norm(weight_D: Tensor, *, copy: bool) -> Tensor:
    """The weight in float32, in which it is applied."""
    return weight_D.float()


@operator(
    source="reference/model.md 2.2 and 2.9",
    tolerance=Tolerance(4, "one rounding of the output; the mean's summation order is free"),
    prepare=prepare_norm,
)
def rms_norm(
    x_TD: Annotated[Tensor, Spec("T D", FLOATS)],
    weight_D: Annotated[Tensor, Spec("D", FLOATS)],
    *,
    eps: float,
) -> Annotated[Tensor, Spec("T D", FLOATS)]:
    """Weighted RMS norm over the last axis; weight applied in float32."""
    return functional.rms_norm(x_TD.float(), (x_TD.shape[-1],), weight_D.float(), eps).to(x_TD.dtype)


@operator(
    source="reference/model.md 2.4 step 1",
    tolerance=Tolerance(2, "a product of two rounded factors; the mean may round either way"),
)
def head_rms_norm(
    q_THD: Annotated[Tensor, Spec("T H D", FLOATS)], *, eps: float, rounded_once: bool
) -> Annotated[Tensor, Spec("T H D", FLOATS)]:
    """Unweighted RMS norm of each query head.

    rounded_once: float32 until the result, as the chips' kernels do. Otherwise every step is rounded to the
    input's dtype as the release does; the reciprocal square root is taken in float32 and rounded once.
    """
    if rounded_once:
        return functional.rms_norm(q_THD.float(), (q_THD.shape[-1],), eps=eps).to(q_THD.dtype)
    square_THD = q_THD * q_THD
    mean_TH1 = square_THD.float().mean(-1, keepdim=True).to(q_THD.dtype) + eps
    return q_THD * torch.rsqrt(mean_TH1.float()).to(q_THD.dtype)
