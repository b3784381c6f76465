"""Simulated MX quantisers of Ascend 950: FP8 and FP4 values with a power-of-two scale per 32.

Sources: aclnnDynamicMxQuant (V1 to V3), aclnnGroupedDynamicMxQuant (V1, V2, and its golden code for where a
group's scales lie) and aclnnAntiMxQuant of ops-nn, and torch_npu's Meta kernels, where scales are uint8.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ascend_v4.operators.simulator.dtypes import dtype_of
from ascend_v4.operators.simulator.elements import (
    FP4,
    FP8,
    MX_BLOCK,
    MX_PAIR,
    ROUND_MODES,
    decode_fp4,
    decode_scale,
    format_named,
    mx_quantize,
    pack_fp4,
    scale_pairs,
)
from ascend_v4.operators.simulator.kernels import ONLY_950, kernel
from ascend_v4.operators.simulator.quantize import HALVES
from ascend_v4.operators.simulator.state import SimulatedChip, require, undefined

MX_TYPES = (*FP8, FP4)
LARGEST_BLOCK = 1024


def require_mx_rounding(operator: str, dtype: torch.dtype, round_mode: str, scale_alg: int | None) -> None:
    """Refuses combinations of type, rounding and scale algorithm that are not documented."""
    modes = ROUND_MODES if dtype is FP4 else ("rint",)
    require(round_mode in modes, operator, f"round_mode is {round_mode!r}; {dtype} takes {modes}")
    algorithms = (0,) if dtype is FP4 else (0, 1)
    require(
        scale_alg in algorithms,
        operator,
        f"scale_alg is {scale_alg}; {algorithms} are simulated for {dtype}",
    )


def _dynamic_mx_meta(
    sim: SimulatedChip,
    *,
    input: Tensor,
    axis: int,
    round_mode: str,
    dst_type: int,
    block_size: int,
    scale_alg: int | None,
    dst_type_max: float,
    max_low_bound: float,
) -> tuple[Tensor, Tensor]:
    name = "npu_dynamic_mx_quant"
    dtype = format_named(dst_type, name, MX_TYPES)
    require(-input.dim() <= axis < input.dim(), name, f"axis {axis} is outside the {input.dim()} axes")
    require(
        block_size % MX_BLOCK == 0 and 0 < block_size <= LARGEST_BLOCK,
        name,
        f"block_size is {block_size}; a multiple of {MX_BLOCK} up to {LARGEST_BLOCK} is needed",
    )
    require(
        dtype is not FP4 or input.shape[-1] % 2 == 0,
        name,
        f"FP4 needs an even last axis, this is {input.shape[-1]}",
    )
    shape = list(input.shape)
    shape[axis] = -(-shape[axis] // (2 * block_size))
    scale = input.new_empty((*shape, 2), dtype=torch.uint8)
    if dtype is FP4:
        return input.new_empty((*input.shape[:-1], input.shape[-1] // 2), dtype=torch.uint8), scale
    return torch.empty_like(input, dtype=dtype), scale


@kernel("npu::npu_dynamic_mx_quant", meta=_dynamic_mx_meta, chips=ONLY_950)
def npu_dynamic_mx_quant(
    sim: SimulatedChip,
    *,
    input: Tensor,
    axis: int,
    round_mode: str,
    dst_type: int,
    block_size: int,
    scale_alg: int | None,
    dst_type_max: float,
    max_low_bound: float,
) -> tuple[Tensor, Tensor]:
    """FP8 of the input's shape, or packed FP4, and uint8 scales in pairs, [..., ceil(K/64), 2]."""
    name = "npu_dynamic_mx_quant"
    require(input.dtype in HALVES, name, f"the input must be float16 or bfloat16, is {input.dtype}")
    require(dst_type_max == 0 and max_low_bound == 0, name, "dst_type_max and max_low_bound are reserved")
    codes, scale = _dynamic_mx_meta(
        sim,
        input=input,
        axis=axis,
        round_mode=round_mode,
        dst_type=dst_type,
        block_size=block_size,
        scale_alg=scale_alg,
        dst_type_max=0.0,
        max_low_bound=0.0,
    )
    if input.numel() == 0:
        return codes, scale
    dtype = format_named(dst_type, name, MX_TYPES)
    require_mx_rounding(name, dtype, round_mode, scale_alg)
    codes, exponents = mx_quantize(
        input.movedim(axis, -1), dtype, scale_alg=scale_alg or 0, round_mode=round_mode, block=block_size
    )
    codes = codes.movedim(-1, axis).contiguous()
    pairs = scale_pairs(exponents)
    pairs = pairs.movedim(-2, axis if axis >= 0 else axis - 1).contiguous()
    return (pack_fp4(codes) if dtype is FP4 else codes), pairs


def _grouped_mx_meta(
    sim: SimulatedChip, *, x: Tensor, group_index: Tensor, dst_type: int, **_: object
) -> tuple[Tensor, Tensor]:
    dtype = format_named(dst_type, "npu_grouped_dynamic_mx_quant", FP8)
    shape = (x.shape[0] // MX_PAIR + group_index.shape[0], x.shape[1], 2)
    return torch.empty_like(x, dtype=dtype), x.new_empty(shape, dtype=torch.uint8)


@kernel("npu::npu_grouped_dynamic_mx_quant", meta=_grouped_mx_meta, chips=ONLY_950)
def npu_grouped_dynamic_mx_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    group_index: Tensor,
    round_mode: str,
    dst_type: int,
    blocksize: int,
    scale_alg: int | None,
    dst_type_max: float | None,
) -> tuple[Tensor, Tensor]:
    """FP8 [M, N] quantised down the rows of each group; scales in pairs [M // 64 + G, N, 2].

    group_index holds cumulative ends. The pairs of group g begin at its first row // 64 + g; pairs that no
    group fills are left undefined.
    """
    name = "npu_grouped_dynamic_mx_quant"
    require(x.dtype in HALVES and x.dim() == 2, name, f"x must be float16 or bfloat16 [M, N], is {x.dtype}")
    require(
        group_index.dtype is torch.int32 and group_index.dim() == 1,
        name,
        f"group_index must be int32 with one axis, is {group_index.dtype} with {group_index.dim()}",
    )
    require(blocksize == MX_BLOCK, name, f"blocksize is {blocksize}, only {MX_BLOCK} is taken")
    require(not dst_type_max, name, "dst_type_max goes with scale_alg 2, which is not simulated")
    dtype = format_named(dst_type, name, FP8)
    require_mx_rounding(name, dtype, round_mode, scale_alg)
    bounds = [0, *group_index.tolist()]
    require(bounds == sorted(bounds), name, f"group_index {bounds[1:]} does not rise")
    require(bounds[-1] == x.shape[0], name, f"group_index ends at {bounds[-1]}, x has {x.shape[0]} rows")
    codes = torch.empty_like(x, dtype=dtype)
    pairs = undefined(x.shape[0] // MX_PAIR + len(bounds) - 1, x.shape[1], 2, dtype=torch.uint8)
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        columns, exponents = mx_quantize(x[start:end].T, dtype, scale_alg=scale_alg or 0)
        codes[start:end] = columns.T
        found = scale_pairs(exponents).movedim(-2, 0)
        first = start // MX_PAIR + index
        pairs[first : first + len(found)] = found
    return codes, pairs


def _anti_mx_meta(
    sim: SimulatedChip,
    *,
    x: Tensor,
    mxscale: Tensor,
    axis: int | None,
    dst_type: int | None,
    src_type: int | None,
) -> Tensor:
    kind = dtype_of(15 if dst_type is None else dst_type, "npu_anti_mx_quant")
    if x.dtype in FP8:
        return torch.empty_like(x, dtype=kind)
    return x.new_empty((*x.shape[:-1], x.shape[-1] * 2), dtype=kind)


@kernel("npu::npu_anti_mx_quant", meta=_anti_mx_meta, chips=ONLY_950)
def npu_anti_mx_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    mxscale: Tensor,
    axis: int | None,
    dst_type: int | None,
    src_type: int | None,
) -> Tensor:
    """Values of MX codes in a 16-bit or 32-bit float type, along the axis they were quantised on."""
    name = "npu_anti_mx_quant"
    kind = dtype_of(15 if dst_type is None else dst_type, name)
    require(kind in (*HALVES, torch.float32), name, f"dst_type {kind} is not a float type of 16 or 32 bits")
    source = x.dtype if x.dtype in FP8 else dtype_of(292 if src_type is None else src_type, name)
    require(source in MX_TYPES, name, f"src_type {source} is not an MX type")
    require(
        x.dtype in FP8 or source is FP4,
        name,
        f"x is {x.dtype} and src_type {source}; packed FP4 comes as uint8",
    )
    values = (decode_fp4(x) if source is FP4 else x.float()).movedim(-1 if axis is None else axis, -1)
    wanted = (*values.shape[:-1], -(-values.shape[-1] // (2 * MX_BLOCK)), 2)
    place = -2 if axis is None else (axis if axis >= 0 else axis - 1)
    scale = mxscale.movedim(place, -2)
    require(
        scale.shape == wanted,
        name,
        f"mxscale is {tuple(mxscale.shape)}, which does not fit x {tuple(x.shape)}",
    )
    factors = decode_scale(scale.contiguous()).flatten(-2).repeat_interleave(MX_BLOCK, -1)
    result = values * factors[..., : values.shape[-1]]
    return result.movedim(-1, -1 if axis is None else axis).to(kind)
