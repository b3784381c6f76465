"""RMS norms, alone and fused with an addition or a dynamic INT8 quantisation.

Sums and products are float32 and a result is rounded once, when it is stored (rms_norm.h of ops-nn). The
fused quantisation works on the float32 values of the norm, which are not rounded in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.state import SimulatedChip, require

INT8_MAX = 127.0
HALVES = (torch.float16, torch.bfloat16)


def _rstd_shape(x: Tensor, gamma: Tensor) -> tuple[int, ...]:
    kept = x.dim() - gamma.dim()
    return (*x.shape[:kept], *(1 for _ in range(gamma.dim())))


def _require_norm(operator: str, x: Tensor, gamma: Tensor) -> None:
    require(
        x.dtype in (*HALVES, torch.float32), operator, f"x must be float16, bfloat16 or float32, is {x.dtype}"
    )
    require(
        gamma.dtype in (x.dtype, torch.float32),
        operator,
        f"gamma must be {x.dtype} like x or float32, is {gamma.dtype}",
    )
    require(gamma.numel() > 0, operator, "gamma is empty")
    require(
        0 < gamma.dim() <= x.dim() and x.shape[x.dim() - gamma.dim() :] == gamma.shape,
        operator,
        f"gamma {tuple(gamma.shape)} must be the last axes of x {tuple(x.shape)}",
    )


def _normalised(x: Tensor, gamma_dims: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """x over its root mean square, in float32, and the factor itself."""
    axes = tuple(range(x.dim() - gamma_dims, x.dim()))
    wide = x.float()
    rstd = 1.0 / torch.sqrt(wide.square().mean(dim=axes, keepdim=True) + epsilon)
    return wide * rstd, rstd


def _norm_meta(sim: SimulatedChip, *, input: Tensor, gamma: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    _require_norm("npu_rms_norm", input, gamma)
    return torch.empty_like(input), input.new_empty(_rstd_shape(input, gamma), dtype=torch.float32)


@kernel("npu::npu_rms_norm", meta=_norm_meta)
def npu_rms_norm(
    sim: SimulatedChip,
    *,
    input: Tensor,
    gamma: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """(y, rstd): y = x / sqrt(mean(x^2) + epsilon) * gamma over the axes of gamma."""
    _require_norm("npu_rms_norm", input, gamma)
    values, rstd = _normalised(input, gamma.dim(), epsilon)
    return (values * gamma.float()).to(input.dtype), rstd


@kernel("npu::npu_gemma_rms_norm", meta=_norm_meta)
def npu_gemma_rms_norm(
    sim: SimulatedChip,
    *,
    input: Tensor,
    gamma: Tensor,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """As npu_rms_norm, with gamma + 1 for gamma."""
    require(gamma.dtype is input.dtype, "npu_gemma_rms_norm", f"gamma must be {input.dtype} like x")
    _require_norm("npu_gemma_rms_norm", input, gamma)
    values, rstd = _normalised(input, gamma.dim(), epsilon)
    return (values * (gamma.float() + 1.0)).to(input.dtype), rstd


def _add_norm_meta(
    sim: SimulatedChip, *, x1: Tensor, x2: Tensor, gamma: Tensor, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    _require_norm("npu_add_rms_norm", x1, gamma)
    rstd = x1.new_empty(_rstd_shape(x1, gamma), dtype=torch.float32)
    return torch.empty_like(x1), rstd, torch.empty_like(x1)


@kernel("npu::npu_add_rms_norm", meta=_add_norm_meta)
def npu_add_rms_norm(
    sim: SimulatedChip, *, x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, rstd, x1 + x2); the norm is of the sum as it is stored."""
    _require_norm("npu_add_rms_norm", x1, gamma)
    require(
        x1.shape == x2.shape and x1.dtype is x2.dtype,
        "npu_add_rms_norm",
        f"x1 {tuple(x1.shape)} {x1.dtype} and x2 {tuple(x2.shape)} {x2.dtype} differ",
    )
    total = (x1.float() + x2.float()).to(x1.dtype)
    values, rstd = _normalised(total, gamma.dim(), epsilon)
    return (values * gamma.float()).to(x1.dtype), rstd, total


def _require_quant(
    operator: str,
    x: Tensor,
    gamma: Tensor,
    *,
    smooth_scale: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
) -> None:
    require(x.numel() > 0, operator, f"x is empty: {tuple(x.shape)}")
    require(gamma.numel() > 0, operator, "gamma is empty")
    require(x.dtype in HALVES, operator, f"x must be float16 or bfloat16, is {x.dtype}")
    require(
        gamma.dim() == 1 and gamma.shape[0] == x.shape[-1],
        operator,
        f"gamma {tuple(gamma.shape)} must have one axis as long as the last of x {tuple(x.shape)}",
    )
    for name, given in (("gamma", gamma), ("smooth_scale", smooth_scale), ("beta", beta)):
        if given is None:
            continue
        require(given.dtype is x.dtype, operator, f"{name} must be {x.dtype} like x, is {given.dtype}")
        require(given.shape == gamma.shape, operator, f"{name} must have the shape of gamma")
    require(epsilon > 0, operator, f"epsilon must be greater than 0, is {epsilon}")


def _quant_meta(sim: SimulatedChip, *, x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _quantised(sim: SimulatedChip, values: Tensor) -> tuple[Tensor, Tensor]:
    """INT8 codes and the scale of each row. A row of zeros gives zeros and scale 0."""
    top = values.abs().amax(dim=-1, keepdim=True)
    if sim.is_ideal:
        scale = top / INT8_MAX
        codes = values / scale
    else:
        inverse = INT8_MAX / top
        scale = 1.0 / inverse
        codes = values * inverse
    codes = torch.where(top == 0, torch.zeros_like(codes), codes)
    return codes.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale.squeeze(-1)


@kernel("_C_ascend::npu_rms_norm_dynamic_quant", meta=_quant_meta, chips=A2_A3)
@kernel("custom::npu_rms_norm_dynamic_quant", meta=_quant_meta, chips=A2_A3)
def npu_rms_norm_dynamic_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    gamma: Tensor,
    smooth_scale: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """(INT8 codes, scale of each row) of an RMS norm, in one pass without rounding in between."""
    _require_quant(
        "npu_rms_norm_dynamic_quant", x, gamma, smooth_scale=smooth_scale, beta=beta, epsilon=epsilon
    )
    values = _normalised(x, 1, epsilon)[0] * gamma.float()
    if beta is not None:
        values = values + beta.float()
    if smooth_scale is not None:
        values = values * smooth_scale.float()
    return _quantised(sim, values)


def _add_quant_meta(
    sim: SimulatedChip, *, x1: Tensor, smooth_scale2: Tensor | None, **_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes, scale = _quant_meta(sim, x=x1)
    if smooth_scale2 is None:
        return codes, codes.new_empty(1), torch.empty_like(x1), scale, torch.empty_like(scale)
    return codes, torch.empty_like(codes), torch.empty_like(x1), scale, torch.empty_like(scale)


@kernel("npu::npu_add_rms_norm_dynamic_quant", meta=_add_quant_meta)
def npu_add_rms_norm_dynamic_quant(
    sim: SimulatedChip,
    *,
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    smooth_scale1: Tensor | None,
    smooth_scale2: Tensor | None,
    beta: Tensor | None,
    epsilon: float,
    output_mask: list[bool] | None,
    y_dtype: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes, second codes, x1 + x2, scale, second scale); the second pair needs smooth_scale2."""
    name = "npu_add_rms_norm_dynamic_quant"
    _require_quant(name, x1, gamma, smooth_scale=smooth_scale1, beta=beta, epsilon=epsilon)
    require(x1.shape == x2.shape and x1.dtype is x2.dtype, name, "x1 and x2 differ in shape or dtype")
    require(output_mask is None and y_dtype in (None, 1), name, "output_mask and y_dtype are not simulated")
    require(
        smooth_scale2 is None or smooth_scale1 is not None,
        name,
        "smooth_scale2 needs smooth_scale1 beside it",
    )
    total = (x1.float() + x2.float()).to(x1.dtype)
    values = _normalised(total, 1, epsilon)[0] * gamma.float()
    if beta is not None:
        values = values + beta.float()
    codes, scale = _quantised(sim, values if smooth_scale1 is None else values * smooth_scale1.float())
    if smooth_scale2 is None:
        empty = torch.empty(1, dtype=torch.int8).fill_(-128)
        return codes, empty, total, scale, torch.full_like(scale, float("nan"))
    second, second_scale = _quantised(sim, values * smooth_scale2.float())
    return codes, second, total, scale, second_scale
