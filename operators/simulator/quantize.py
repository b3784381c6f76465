"""Simulated quantisers to int8, int4 and FP8 with float32 scales, and the casts around them.

Sources: the documents of npu_dynamic_quant, npu_quantize, npu_trans_quant_param, npu_dtype_cast and
npu_dynamic_block_quant in op-plugin and ops-nn, and torch_npu's Meta kernels for result shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.simulator.dtypes import dtype_of
from ascend_v4.operators.simulator.elements import (
    FORMATS,
    FP4,
    FP8,
    cast_fp8,
    decode_fp4,
    format_named,
    fp4_codes,
    pack_fp4,
)
from ascend_v4.operators.simulator.formats import pack_int4
from ascend_v4.operators.simulator.kernels import ONLY_950, kernel
from ascend_v4.operators.simulator.state import HF32_MASK, SimulatedChip, require

INT8_LARGEST = 127.0
INT4_LARGEST = 7.0
INT4_PER_INT32 = 8
HALVES = (torch.float16, torch.bfloat16)
OUTPUT_OFFSET_BIT = 46
OFFSET_SHIFT = 37
OFFSET_MASK = 0x1FF


def require_absent(operator: str, **arguments: object) -> None:
    """Refuses arguments that the operator declares and does not take."""
    for name, value in arguments.items():
        require(value is None, operator, f"{name} is not supported there; pass None")


def quantize_rows(values: Tensor, largest: float = INT8_LARGEST) -> tuple[Tensor, Tensor]:
    """int8 codes and float32 scales amax/largest of rows along the last axis; rows of zeros get scale 0.

    No document says what the chip returns for a row of zeros: callers may not rely on it.
    """
    values = values.float()
    scales = values.abs().amax(-1) / largest if values.shape[-1] else values.new_zeros(values.shape[:-1])
    codes = torch.where(scales.unsqueeze(-1) > 0, values / scales.unsqueeze(-1), 0.0)
    return codes.round().clamp(-largest - 1, largest).to(torch.int8), scales


def _quantized(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    ratio = torch.where(scales > 0, values / scales, 0.0)
    if dtype in FP8:
        return cast_fp8(ratio, dtype)
    largest = INT4_LARGEST if dtype is torch.quint4x2 else INT8_LARGEST
    codes = ratio.round().clamp(-largest - 1, largest).to(torch.int8)
    return pack_int4(codes) if dtype is torch.quint4x2 else codes


def _dynamic_quant_type(sim: SimulatedChip, dst_type: int | None, width: int) -> torch.dtype:
    name = "npu_dynamic_quant"
    allowed = (torch.int8, torch.quint4x2, *(FP8 if sim.is_950 else ()))
    dtype = torch.int8 if dst_type is None else format_named(dst_type, name, allowed)
    require(
        dtype is not torch.quint4x2 or width % INT4_PER_INT32 == 0,
        name,
        f"int4 needs a last axis that is a multiple of {INT4_PER_INT32}, this is {width}",
    )
    return dtype


def _dynamic_quant_meta(
    sim: SimulatedChip,
    *,
    input: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    *leading, width = input.shape
    dtype = _dynamic_quant_type(sim, dst_type, width)
    shape = {"pertensor": [1], "perchannel": [*leading[:-1], width]}.get(quant_mode, leading)
    scale = input.new_empty(shape, dtype=torch.float32)
    if dtype is torch.quint4x2:
        return input.new_empty((*leading, width // INT4_PER_INT32), dtype=torch.int32), scale
    return torch.empty_like(input, dtype=dtype), scale


def _smoothed(operator: str, values: Tensor, smooth: Tensor | None, group_index: Tensor | None) -> Tensor:
    """Float32 values times smooth scales; group_index holds cumulative row counts."""
    width = values.shape[-1]
    if smooth is None:
        require(group_index is None, operator, "group_index needs smooth_scales")
        return values.float()
    require(
        smooth.dtype is values.dtype,
        operator,
        f"smooth_scales is {smooth.dtype} and the input {values.dtype}; they must be alike",
    )
    if group_index is None:
        require(
            smooth.shape == (width,), operator, f"smooth_scales is {tuple(smooth.shape)}, want ({width},)"
        )
        return values.float() * smooth.float()
    rows = values.numel() // width
    require(group_index.dtype is torch.int32, operator, f"group_index must be int32, is {group_index.dtype}")
    require(
        smooth.dim() == 2 and smooth.shape == (group_index.numel(), width),
        operator,
        f"smooth_scales is {tuple(smooth.shape)}, want ({group_index.numel()}, {width})",
    )
    counts = group_index.diff(prepend=group_index.new_zeros(1))
    require(
        bool((counts >= 0).all()) and int(group_index[-1]) == rows,
        operator,
        f"group_index {group_index.tolist()} must rise to the {rows} rows",
    )
    return values.float() * smooth.float().repeat_interleave(counts, dim=0).view(values.shape)


@kernel("npu::npu_dynamic_quant", meta=_dynamic_quant_meta)
def npu_dynamic_quant(
    sim: SimulatedChip,
    *,
    input: Tensor,
    smooth_scales: Tensor | None,
    group_index: Tensor | None,
    dst_type: int | None,
    quant_mode: str,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    """Codes and float32 scales amax/largest per token; per tensor or channel on Ascend 950."""
    name = "npu_dynamic_quant"
    require(input.dim() > 1, name, f"the input needs two axes or more, this is {tuple(input.shape)}")
    require(input.dtype in HALVES, name, f"the input must be float16 or bfloat16, is {input.dtype}")
    modes = ("pertoken", "perchannel", "pertensor") if sim.is_950 else ("pertoken",)
    require(quant_mode in modes, name, f"quant_mode is {quant_mode!r}; {sim.chip.value} takes {modes}")
    require(dst_type_max == 0, name, "dst_type_max is for HiFloat8, which is not simulated")
    dtype = _dynamic_quant_type(sim, dst_type, input.shape[-1])
    values = _smoothed(name, input, smooth_scales, group_index)
    largest = FORMATS[dtype].largest if dtype in FP8 else INT8_LARGEST
    largest = INT4_LARGEST if dtype is torch.quint4x2 else largest
    if quant_mode == "pertensor":
        scale = values.abs().amax().view(1) / largest
        return _quantized(values, scale, dtype), scale
    axis = -1 if quant_mode == "pertoken" else -2
    if values.shape[axis] == 0 or values.numel() == 0:
        return _dynamic_quant_meta(
            sim,
            input=input,
            smooth_scales=None,
            group_index=None,
            dst_type=dst_type,
            quant_mode=quant_mode,
            dst_type_max=0.0,
        )
    scale = values.abs().amax(axis) / largest
    return _quantized(values, scale.unsqueeze(axis), dtype), scale


def _quantize_meta(
    sim: SimulatedChip,
    *,
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int,
    div_mode: bool,
) -> Tensor:
    kind = dtype_of(dtype, "npu_quantize")
    if kind is torch.quint4x2:
        return input.new_empty((*input.shape[:-1], input.shape[-1] // INT4_PER_INT32), dtype=torch.int32)
    return torch.empty_like(input, dtype=kind)


@kernel("npu::npu_quantize", meta=_quantize_meta)
def npu_quantize(
    sim: SimulatedChip,
    *,
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    dtype: int,
    axis: int,
    div_mode: bool,
) -> Tensor:
    """Static quantisation along an axis: input / scales + zero points, or input * scales without div_mode."""
    name = "npu_quantize"
    kind = dtype_of(dtype, name)
    allowed = (torch.int8, torch.uint8, torch.int32, torch.quint4x2, *(FP8 if sim.is_950 else ()))
    require(kind in allowed, name, f"dtype {kind} is not simulated")
    size = input.shape[axis]
    require(
        scales.dim() == 1 and scales.numel() in (1, size),
        name,
        f"scales is {tuple(scales.shape)}, want (1,) or ({size},)",
    )
    shape = [1] * input.dim()
    shape[axis] = scales.numel()
    factors = scales.float().view(shape)
    values = input.float() / factors if div_mode else input.float() * factors
    if zero_points is not None:
        values = values + zero_points.float().view(shape)
    if kind in FP8:
        return cast_fp8(values, kind)
    if kind is torch.quint4x2:
        require(
            input.shape[-1] % INT4_PER_INT32 == 0,
            name,
            f"int4 needs a last axis that is a multiple of {INT4_PER_INT32}, this is {input.shape[-1]}",
        )
        return pack_int4(values.round().clamp(-INT4_LARGEST - 1, INT4_LARGEST).to(torch.int8))
    limits = torch.iinfo(kind)
    return values.double().round().clamp(limits.min, limits.max).to(kind)


def _trans_quant_param_meta(
    sim: SimulatedChip, *, scale: Tensor, offset: Tensor | None, round_mode: int | None
) -> Tensor:
    width = scale.shape[-1] if offset is None else max(scale.shape[-1], offset.shape[-1])
    return scale.new_empty((*scale.shape[:-1], width), dtype=torch.int64)


@kernel("npu::npu_trans_quant_param", meta=_trans_quant_param_meta)
def npu_trans_quant_param(
    sim: SimulatedChip, *, scale: Tensor, offset: Tensor | None, round_mode: int | None
) -> Tensor:
    """int64 words of the fixed-point unit: float32 bits cut to 19, an int9 offset from bit 37, bit 46 set."""
    name = "npu_trans_quant_param"
    require(scale.dtype is torch.float32, name, f"scale must be float32, is {scale.dtype}")
    require(
        scale.dim() == 1 or (scale.dim() == 2 and scale.shape[0] == 1),
        name,
        f"scale is {tuple(scale.shape)}, want (n,) or (1, n)",
    )
    require(round_mode in (0, 1), name, f"round_mode is {round_mode}, want 0 or 1")
    bits = scale.contiguous().view(torch.int32)
    if round_mode == 1:
        bits = bits + 0xFFF + ((bits >> 13) & 1)
    words = (bits & HF32_MASK).to(torch.int64) & 0xFFFFFFFF | (1 << OUTPUT_OFFSET_BIT)
    if offset is None:
        return words
    steps = offset.float().round().clamp(-256, 255).to(torch.int64) & OFFSET_MASK
    return words | (steps << OFFSET_SHIFT)


def scale_of_words(words: Tensor) -> Tensor:
    """Float32 scales in the low halves of int64 words, made by npu_trans_quant_param or by widening bits."""
    return words.to(torch.int32).view(torch.float32)


def offset_of_words(words: Tensor) -> Tensor:
    """Float32 offsets of int64 words."""
    steps = (words >> OFFSET_SHIFT) & OFFSET_MASK
    return torch.where(steps > 255, steps - 512, steps).float()


def _dtype_cast_meta(
    sim: SimulatedChip,
    *,
    input: Tensor,
    dtype: int,
    input_dtype: int | None,
) -> Tensor:
    name = "npu_dtype_cast"
    shape = list(input.shape)
    if input_dtype is not None and dtype_of(input_dtype, name) is FP4:
        shape[-1] *= 2
    kind = dtype_of(dtype, name)
    if kind is FP4:
        require(shape and shape[-1] % 2 == 0, name, f"FP4 needs an even last axis, this is {shape}")
        shape[-1] //= 2
        return input.new_empty(shape, dtype=torch.uint8)
    return input.new_empty(shape, dtype=kind)


@kernel("npu::npu_dtype_cast", meta=_dtype_cast_meta)
def npu_dtype_cast(
    sim: SimulatedChip,
    *,
    input: Tensor,
    dtype: int,
    input_dtype: int | None,
) -> Tensor:
    """A cast that also knows FP8 and packed FP4, on Ascend 950."""
    name = "npu_dtype_cast"
    kind = dtype_of(dtype, name)
    source = input.dtype if input_dtype is None else dtype_of(input_dtype, name)
    require(
        sim.is_950 or not ({kind, source} & {*FP8, FP4}), name, f"{sim.chip.value} has no {kind} or {source}"
    )
    values = decode_fp4(input) if source is FP4 else input
    if kind is FP4:
        return pack_fp4(fp4_codes(values, "rint"))
    return cast_fp8(values, kind) if kind in FP8 else values.to(kind)


def _block_quant_meta(
    sim: SimulatedChip,
    *,
    x: Tensor,
    min_scale: float,
    round_mode: str,
    dst_type: int,
    row_block_size: int,
    col_block_size: int,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    *leading, rows, columns = x.shape
    shape = (*leading, -(-rows // row_block_size), -(-columns // col_block_size))
    kind = dtype_of(dst_type, "npu_dynamic_block_quant")
    return torch.empty_like(x, dtype=kind), x.new_empty(shape, dtype=torch.float32)


@kernel("npu::npu_dynamic_block_quant", meta=_block_quant_meta, chips=ONLY_950)
def npu_dynamic_block_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    min_scale: float,
    round_mode: str,
    dst_type: int,
    row_block_size: int,
    col_block_size: int,
    dst_type_max: float,
) -> tuple[Tensor, Tensor]:
    """FP8 codes and float32 scales max(amax/largest, min_scale) of blocks of rows and columns."""
    name = "npu_dynamic_block_quant"
    require(x.dim() in (2, 3), name, f"x must have two or three axes, this is {tuple(x.shape)}")
    require(x.dtype in HALVES, name, f"x must be float16 or bfloat16, is {x.dtype}")
    require(round_mode == "rint", name, f"round_mode is {round_mode!r}; FP8 takes 'rint' only")
    require(dst_type_max == 0, name, "dst_type_max is for HiFloat8, which is not simulated")
    for size, allowed, what in ((row_block_size, (1, 128), "row"), (col_block_size, (128,), "col")):
        require(size in allowed, name, f"{what}_block_size is {size}, want one of {allowed}")
    kind = format_named(dst_type, name, FP8)
    *_, rows, columns = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -columns % col_block_size, 0, -rows % row_block_size))
    num_rows, num_columns = padded.shape[-2] // row_block_size, padded.shape[-1] // col_block_size
    blocks = padded.reshape(*padded.shape[:-2], num_rows, row_block_size, num_columns, col_block_size)
    scale = (blocks.abs().amax((-1, -3)) / FORMATS[kind].largest).clamp(min=min_scale)
    full = scale.repeat_interleave(row_block_size, -2).repeat_interleave(col_block_size, -1)
    return _quantized(x.float(), full[..., :rows, :columns], kind), scale
