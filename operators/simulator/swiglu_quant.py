"""Simulated SwiGLU with quantisation of float inputs: per token, in blocks, and MX.

The numbers of quant_mode differ by package: MX is 2 in vLLM-Ascend's npu_swiglu_group_quant and 1 in the
recipes' and torch_npu's. Sources: npu_swiglu_quant and npu_swiglu_mx_quant in op-plugin, the document of
aclnnSwigluGroupQuant in ops-nn, the kernel of vLLM-Ascend, documents and tests of the recipes' operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.simulator.elements import (
    FORMATS,
    FP4,
    FP8,
    MX_BLOCK,
    MX_PAIR,
    cast_fp8,
    format_named,
    mx_quantize,
    pack_fp4,
    scale_blocks,
    scale_pairs,
    shared_exponents,
    split_last,
)
from ascend_v4.operators.simulator.expert_activation import (
    DYNAMIC,
    gated,
    halves,
    interleaved,
    rows_of_counts,
)
from ascend_v4.operators.simulator.kernels import A2_A3, ONLY_950, kernel
from ascend_v4.operators.simulator.matmul import require_shape
from ascend_v4.operators.simulator.mx import MX_TYPES, require_mx_rounding
from ascend_v4.operators.simulator.quantize import HALVES, quantize_rows, require_absent
from ascend_v4.operators.simulator.state import SimulatedChip, require, undefined

BLOCK = 128
SMALLEST_AMAX = 1e-4
MOST_GROUPS = 256
CLAMP_OFF = -1.0


def _swiglu_quant_meta(sim: SimulatedChip, *, x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    return x.new_empty(shape, dtype=torch.int8), x.new_empty(shape[:-1], dtype=torch.float32)


@kernel("npu::npu_swiglu_quant", meta=_swiglu_quant_meta, chips=A2_A3)
def npu_swiglu_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    smooth_scales: Tensor | None,
    offsets: Tensor | None,
    group_index: Tensor | None,
    activate_left: bool,
    quant_mode: int,
    group_list_type: int,
    dst_type: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """SwiGLU and int8 per token; group_index is cumulative unless group_list_type is 1."""
    name = "npu_swiglu_quant"
    require(x.dim() == 2, name, f"x with two axes is simulated, this is {tuple(x.shape)}")
    require(x.dtype in (*HALVES, torch.float32), name, f"x must be of a float type, is {x.dtype}")
    require(x.shape[1] % 2 == 0, name, f"the last axis of x is {x.shape[1]}, it must be even")
    require(dst_type in (None, torch.int8), name, f"dst_type is {dst_type}; int8 is simulated")
    require(quant_mode == DYNAMIC, name, f"quant_mode is {quant_mode}; 1, dynamic, is simulated")
    require_absent(name, offsets=offsets)
    require(group_list_type in (0, 1), name, f"group_list_type is {group_list_type}, want 0 or 1")
    counts = rows_of_counts(name, group_index, x.shape[0], cumulative=group_list_type == 0)
    width = x.shape[1] // 2
    if smooth_scales is not None:
        require_shape(name, "smooth_scales", smooth_scales, (len(counts), width))
    codes = undefined(x.shape[0], width, dtype=torch.int8)
    scales = undefined(x.shape[0], dtype=torch.float32)
    start = 0
    for group, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        values = gated(*halves(x[rows].float(), activate_left=activate_left), limit=None)
        if smooth_scales is not None:
            values = values * smooth_scales[group].float()
        codes[rows], scales[rows] = quantize_rows(values)
    return codes, scales


def _swiglu_mx_meta(sim: SimulatedChip, *, x: Tensor, dst_type: int, **_: object) -> tuple[Tensor, Tensor]:
    dtype = format_named(dst_type, "npu_swiglu_mx_quant", MX_TYPES)
    *leading, width = x.shape
    width //= 2
    scale = x.new_empty((*leading, -(-width // MX_PAIR), 2), dtype=torch.uint8)
    if dtype is FP4:
        return x.new_empty((*leading, width // 2), dtype=torch.uint8), scale
    return x.new_empty((*leading, width), dtype=dtype), scale


@kernel("npu::npu_swiglu_mx_quant", meta=_swiglu_mx_meta, chips=ONLY_950)
def npu_swiglu_mx_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    group_index: Tensor | None,
    activate_dim: int,
    activate_left: bool,
    swiglu_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
    group_mode: int,
    axis: int,
    dst_type: int,
    round_mode: str,
    scale_alg: int,
    max_dtype_value: float,
) -> tuple[Tensor, Tensor]:
    """torch_npu's: the activation is rounded to x's type, then MX along the last axis; mode 1 interleaves."""
    name = "npu_swiglu_mx_quant"
    require(x.dim() >= 2, name, f"x needs two axes or more, this is {tuple(x.shape)}")
    require(x.dtype in HALVES, name, f"x must be float16 or bfloat16, is {x.dtype}")
    require(x.numel() > 0, name, "x may not be empty")
    require(x.shape[-1] % 2 == 0, name, f"the last axis of x is {x.shape[-1]}, it must be even")
    require(activate_dim in (-1, x.dim() - 1), name, "activation along the last axis is simulated")
    require(axis in (-1, x.dim() - 1), name, "quantisation along the last axis is simulated")
    require(max_dtype_value == 0, name, "max_dtype_value is reserved")
    require(swiglu_mode in (0, 1), name, f"swiglu_mode is {swiglu_mode}; torch_npu's binding takes 0 and 1")
    dtype = format_named(dst_type, name, MX_TYPES)
    require_mx_rounding(name, dtype, round_mode, scale_alg)
    if swiglu_mode == 1:
        require(clamp_limit > 0, name, f"clamp_limit is {clamp_limit}, it must be positive")
    if group_index is not None:
        require(
            group_index.numel() <= MOST_GROUPS, name, f"{group_index.numel()} groups, {MOST_GROUPS} at most"
        )
        require(group_mode in (0, 1), name, f"group_mode is {group_mode}, want 0 (counts) or 1 (cumulative)")
    rows = x.reshape(-1, x.shape[-1])
    total = sum(rows_of_counts(name, group_index, rows.shape[0], cumulative=group_mode == 1))
    values = rows[:total].float()
    if swiglu_mode == 0:
        activated = gated(*halves(values, activate_left=activate_left), limit=None)
    else:
        activated = gated(*interleaved(values), limit=clamp_limit, alpha=glu_alpha, bias=glu_bias)
    codes, exponents = mx_quantize(activated.to(x.dtype), dtype, scale_alg=scale_alg, round_mode=round_mode)
    like, scale_like = _swiglu_mx_meta(sim, x=x, dst_type=dst_type)
    return (
        _fill(pack_fp4(codes) if dtype is FP4 else codes, like),
        _fill(scale_pairs(exponents), scale_like),
    )


def _fill(rows: Tensor, like: Tensor) -> Tensor:
    """A tensor shaped like another whose first rows are given and the rest poison."""
    result = undefined(*like.shape, dtype=like.dtype)
    result.view(-1, *rows.shape[1:])[: rows.shape[0]] = rows
    return result


def _activated(
    name: str, x: Tensor, weight: Tensor | None, group_index: Tensor | None, *, limit: float | None
) -> Tensor:
    """Float32 rows of SwiGLU of the rows that the groups cover, times a weight per row."""
    require(x.dim() >= 2, name, f"x needs two axes or more, this is {tuple(x.shape)}")
    require(x.dtype in HALVES, name, f"x must be float16 or bfloat16, is {x.dtype}")
    require(x.numel() > 0, name, "x may not be empty")
    require(x.is_contiguous(), name, "x must be contiguous")
    rows = x.reshape(-1, x.shape[-1])
    total = sum(rows_of_counts(name, group_index, rows.shape[0]))
    values = gated(*halves(rows[:total].float(), activate_left=True), limit=limit)
    if weight is None:
        return values
    require(
        weight.dtype is torch.float32 and weight.numel() == rows.shape[0],
        name,
        f"the weight is {weight.dtype} {tuple(weight.shape)}, want float32 with one value per row",
    )
    return values * weight.reshape(-1, 1)[:total]


def _blocks(
    values: Tensor, dtype: torch.dtype, block: int, *, smallest: float, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """FP8 codes and float32 scales amax/largest of blocks, rounded up to powers of two if asked."""
    cut = split_last(values, -1, block)
    amax = cut.abs().amax(-1).clamp(min=smallest)
    if power_of_two:
        exponents = shared_exponents(amax, dtype, 1)
        return scale_blocks(cut, exponents, dtype), exponents
    scale = amax / FORMATS[dtype].largest
    ratio = torch.where(scale.unsqueeze(-1) > 0, cut / scale.unsqueeze(-1), 0.0)
    return cast_fp8(ratio.flatten(-2), dtype), scale


def _group_quant_shapes(
    x: Tensor, dtype: torch.dtype, *, mx: bool, e8m0: bool
) -> tuple[Tensor, Tensor, Tensor]:
    *leading, width = x.shape
    width //= 2
    scale = (-(-width // MX_PAIR), 2) if mx else (-(-width // BLOCK),)
    return (
        x.new_empty((*leading, width), dtype=dtype),
        x.new_empty((*leading, *scale), dtype=torch.float8_e8m0fnu if e8m0 else torch.float32),
        x.new_empty((*leading, width)),
    )


def _e8m0(exponents: Tensor) -> Tensor:
    return exponents.to(torch.uint8).view(torch.float8_e8m0fnu)


VLLM_BLOCKS = 1
VLLM_MX = 2
VLLM_FP8 = 3


def _vllm_group_quant_meta(
    sim: SimulatedChip,
    *,
    x: Tensor,
    dst_type: int | torch.dtype,
    quant_mode: int,
    ue8m0_scale: bool,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = format_named(dst_type, "_C_ascend.npu_swiglu_group_quant", FP8)
    mx = quant_mode == VLLM_MX
    return _group_quant_shapes(x, dtype, mx=mx, e8m0=mx or (quant_mode == VLLM_FP8 and ue8m0_scale))


@kernel("_C_ascend::npu_swiglu_group_quant", meta=_vllm_group_quant_meta, chips=ONLY_950)
def vllm_swiglu_group_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    topk_weight: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | torch.dtype,
    quant_mode: int,
    group_size: int,
    round_scale: bool,
    ue8m0_scale: bool,
    output_origin: bool,
    group_list_type: int,
    clamp_value: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM-Ascend's: 1 blocks of 128, 2 MX of the activation in x's type, 3 blocks with a smallest amax."""
    name = "_C_ascend.npu_swiglu_group_quant"
    dtype = format_named(dst_type, name, FP8)
    require(
        quant_mode in (VLLM_BLOCKS, VLLM_MX, VLLM_FP8),
        name,
        f"quant_mode is {quant_mode}; here 1 is blocks of 128, 2 MX and 3 FP8",
    )
    require(group_list_type == 0, name, f"group_list_type is {group_list_type}; 0, counts, is documented")
    require(group_size == BLOCK, name, f"group_size is {group_size}, want {BLOCK}")
    multiple = 2 * (MX_PAIR if quant_mode == VLLM_MX else BLOCK)
    require(
        x.shape[-1] % multiple == 0,
        name,
        f"the last axis of x is {x.shape[-1]}, it must be a multiple of {multiple}",
    )
    values = _activated(name, x, topk_weight, group_index, limit=clamp_value if clamp_value > 0 else None)
    like = _vllm_group_quant_meta(sim, x=x, dst_type=dst_type, quant_mode=quant_mode, ue8m0_scale=ue8m0_scale)
    origin = undefined(*like[2].shape, dtype=x.dtype)
    if quant_mode == VLLM_MX:
        codes, exponents = mx_quantize(values.to(x.dtype), dtype)
        scales = _e8m0(scale_pairs(exponents))
    elif quant_mode == VLLM_BLOCKS:
        codes, scales = _blocks(values, dtype, BLOCK, smallest=0.0, power_of_two=False)
    else:
        require(round_scale or not ue8m0_scale, name, "ue8m0_scale needs round_scale")
        codes, scales = _blocks(values, dtype, BLOCK, smallest=SMALLEST_AMAX, power_of_two=round_scale)
        if ue8m0_scale:
            scales = _e8m0(scales)
        elif round_scale:
            scales = _e8m0(scales).float()
        if output_origin:
            origin = _fill(values.to(x.dtype), like[2])
    return _fill(codes, like[0]), _fill(scales, like[1]), origin


DOCUMENTED_BLOCKS = 0
DOCUMENTED_MX = 1


def _documented_modes(
    name: str,
    x: Tensor,
    quant_mode: int,
    block_size: int,
    *,
    round_scale: bool,
) -> None:
    require(
        quant_mode in (DOCUMENTED_BLOCKS, DOCUMENTED_MX),
        name,
        f"quant_mode is {quant_mode}; here 0 is blocks of 128 and 1 MX",
    )
    wanted = BLOCK if quant_mode == DOCUMENTED_BLOCKS else MX_BLOCK
    require(block_size in (0, wanted), name, f"block_size is {block_size}, want 0 or {wanted}")
    require(
        quant_mode == DOCUMENTED_BLOCKS or round_scale, name, "MX, quant_mode 1, takes round_scale True only"
    )
    require(
        x.shape[-1] % (2 * BLOCK) == 0,
        name,
        f"the last axis of x is {x.shape[-1]}, it must be a multiple of {2 * BLOCK}",
    )


def _documented_quant(
    values: Tensor, dtype: torch.dtype, quant_mode: int, *, round_scale: bool, smallest: float
) -> tuple[Tensor, Tensor]:
    if quant_mode == DOCUMENTED_MX:
        codes, exponents = _blocks(values, dtype, MX_BLOCK, smallest=SMALLEST_AMAX, power_of_two=True)
        return codes, _e8m0(scale_pairs(exponents))
    codes, scales = _blocks(values, dtype, BLOCK, smallest=smallest, power_of_two=round_scale)
    return codes, _e8m0(scales).float() if round_scale else scales


def _recipes_group_quant_meta(
    sim: SimulatedChip, *, x: Tensor, dst_type: int | torch.dtype, quant_mode: int, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = format_named(dst_type, "custom.npu_swiglu_group_quant", FP8)
    mx = quant_mode == DOCUMENTED_MX
    return _group_quant_shapes(x, dtype, mx=mx, e8m0=mx)


@kernel("custom::npu_swiglu_group_quant", meta=_recipes_group_quant_meta, chips=ONLY_950)
def recipes_swiglu_group_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    weight: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | torch.dtype,
    quant_mode: int,
    block_size: int,
    round_scale: bool,
    clamp_limit: float | None,
    output_origin: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recipes': 0 blocks of 128, 1 MX with scales rounded up; no clamp without clamp_limit."""
    name = "custom.npu_swiglu_group_quant"
    dtype = format_named(dst_type, name, FP8)
    _documented_modes(name, x, quant_mode, block_size, round_scale=round_scale)
    require(
        quant_mode == DOCUMENTED_MX or not round_scale,
        name,
        "blocks, quant_mode 0, take round_scale False only",
    )
    require(clamp_limit is None or clamp_limit >= 0, name, f"clamp_limit is {clamp_limit}, want >= 0 or None")
    values = _activated(name, x, weight, group_index, limit=clamp_limit)
    codes, scales = _documented_quant(values, dtype, quant_mode, round_scale=round_scale, smallest=0.0)
    like = _recipes_group_quant_meta(sim, x=x, dst_type=dst_type, quant_mode=quant_mode)
    origin = undefined(*like[2].shape, dtype=x.dtype)
    if output_origin and quant_mode == DOCUMENTED_MX:
        origin = _fill(values.to(x.dtype), like[2])
    return _fill(codes, like[0]), _fill(scales, like[1]), origin


def _group_quant_meta(
    sim: SimulatedChip, *, x: Tensor, dst_type: int, quant_mode: int, **_: object
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = format_named(dst_type, "npu_swiglu_group_quant", FP8)
    mx = quant_mode == DOCUMENTED_MX
    codes, scales, _origin = _group_quant_shapes(x, dtype, mx=mx, e8m0=mx)
    return codes, scales, x.new_empty((0,))


@kernel("npu::npu_swiglu_group_quant", meta=_group_quant_meta, chips=ONLY_950)
def npu_swiglu_group_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    weight: Tensor | None,
    group_index: Tensor | None,
    scale: Tensor | None,
    dst_type: int,
    quant_mode: int,
    block_size: int,
    round_scale: bool,
    clamp_limit: float,
    dst_type_max: float,
    output_origin: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch_npu's: the recipes' modes, clamp off at -1; the modes of HiFloat8 are not simulated."""
    name = "npu_swiglu_group_quant"
    dtype = format_named(dst_type, name, FP8)
    require_absent(name, scale=scale)
    _documented_modes(name, x, quant_mode, block_size, round_scale=round_scale)
    require(not output_origin, name, "output_origin is for the modes of HiFloat8")
    require(
        clamp_limit == CLAMP_OFF or clamp_limit > 0,
        name,
        f"clamp_limit is {clamp_limit}, want -1 or more than 0",
    )
    values = _activated(name, x, weight, group_index, limit=clamp_limit if clamp_limit > 0 else None)
    codes, scales = _documented_quant(
        values, dtype, quant_mode, round_scale=round_scale, smallest=SMALLEST_AMAX
    )
    like = _group_quant_meta(sim, x=x, dst_type=dst_type, quant_mode=quant_mode)
    return _fill(codes, like[0]), _fill(scales, like[1]), x.new_empty((0,))


@kernel("custom::npu_swiglu_clip_quant", meta=_swiglu_quant_meta, chips=A2_A3)
def npu_swiglu_clip_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    group_index: Tensor,
    group_alpha: Tensor,
    activate_left: bool,
    quant_mode: int,
    clamp_mode: int,
) -> tuple[Tensor, Tensor]:
    """The recipes': int8 of SwiGLU clipped at group_alpha times the row's largest magnitude.

    The clip is of the result, for its outliers; it is not the model's clamp of gate and up.
    """
    name = "npu_swiglu_clip_quant"
    require(x.dim() == 2 and x.dtype in HALVES, name, f"x must be 16-bit with two axes, is {x.dtype}")
    require(quant_mode == 1 and clamp_mode == 1, name, "quant_mode 1 and clamp_mode 1 are documented")
    counts = rows_of_counts(name, group_index, x.shape[0])
    require_shape(name, "group_alpha", group_alpha, (len(counts),))
    codes = undefined(x.shape[0], x.shape[1] // 2, dtype=torch.int8)
    scales = undefined(x.shape[0], dtype=torch.float32)
    start = 0
    for group, count in enumerate(counts):
        rows = slice(start, start + count)
        start += count
        values = gated(*halves(x[rows].float(), activate_left=activate_left), limit=None)
        bound = values.abs().amax(-1, keepdim=True) * group_alpha[group]
        scales[rows] = bound.squeeze(-1) / 127
        clipped = torch.where(bound > 0, values.clamp(-bound, bound) / (bound / 127), 0.0)
        codes[rows] = clipped.round().clamp(-128, 127).to(torch.int8)
    return codes, scales
