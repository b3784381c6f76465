"""Conversions between weight formats on a CPU, a row at a time: one thread per call, without Python's lock.

Callers that want several threads pass each a run of rows of its own. Kernels on the way back to the release
stop at what has no exact image; the reference then says what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ascend_v4.errors import CheckpointError
from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.quantize import FP4_GROUP
from ascend_v4.operators.contracts.transcode import (
    NUM_STATS,
    Rounding,
    bf16_to_int8,
    check_block_scales,
    check_fp4_shapes,
    check_pairs,
    check_rows,
    fp4_to_int4,
    fp4_to_int8,
    fp8_to_int8,
)
from ascend_v4.operators.contracts.transcode_exact import (
    bf16_to_fp4,
    bf16_to_fp8,
    check_bitmap,
    check_groups,
    derive_fp4_scale,
    fp4_to_bf16,
    fp8_to_bf16,
    int8_to_fp4,
    negative_zeros,
)
from ascend_v4.operators.native import NEEDS, cpu_kernels, cpu_unusable

PROBLEMS = (
    "has a scale of NaN (byte 255)",
    "holds a number that is not finite",
    "needs a scale beyond float32",
    "holds numbers that bfloat16 does not have: a scale lies at an end of the range",
)
"""What kernels report as 4 * row + index."""


@implements(fp4_to_int8, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def fp4_to_int8_native(
    codes_NJ: Tensor, scale_NG: Tensor, out_NK: Tensor, out_scale_N: Tensor, *, rounding: Rounding
) -> Tensor:
    """Counts every row's numbers, chooses its scale from the counts, then looks its codes up."""
    check_fp4_shapes(codes_NJ, scale_NG, out_NK.shape)
    check_rows(out_scale_N, len(codes_NJ))
    codes, scale = codes_NJ.contiguous(), scale_NG.contiguous()
    stats, problem = _stats(), _problem()
    with _packed(out_NK) as out, _packed(out_scale_N) as out_scale:
        cpu_kernels().ascend_v4_fp4_to_int8(
            codes.data_ptr(),
            scale.data_ptr(),
            *out.shape,
            int(rounding is Rounding.EXACT),
            out.data_ptr(),
            out_scale.data_ptr(),
            stats.data_ptr(),
            problem.data_ptr(),
        )
        _refuse_group(problem, scale)
    return stats


@implements(fp4_to_int4, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def fp4_to_int4_native(
    codes_NJ: Tensor, scale_NG: Tensor, out_HK: Tensor, out_scale_N: Tensor, out_bias_NS: Tensor
) -> Tensor:
    """As `fp4_to_int8_native`, two rows at a time."""
    num_rows, parts = out_bias_NS.shape
    check_pairs(out_HK, num_rows=num_rows, parts=parts)
    inputs = out_HK.shape[1]
    check_fp4_shapes(codes_NJ, scale_NG, (num_rows, inputs))
    check_rows(out_scale_N, num_rows)
    codes, scale = codes_NJ.contiguous(), scale_NG.contiguous()
    stats, problem = _stats(), _problem()
    sums = torch.empty(2, inputs // FP4_GROUP, dtype=torch.int32)
    with _packed(out_HK) as out, _packed(out_scale_N) as out_scale, _packed(out_bias_NS) as out_bias:
        cpu_kernels().ascend_v4_fp4_to_int4(
            codes.data_ptr(),
            scale.data_ptr(),
            num_rows,
            inputs,
            parts,
            out.data_ptr(),
            out_scale.data_ptr(),
            out_bias.data_ptr(),
            sums.data_ptr(),
            stats.data_ptr(),
            problem.data_ptr(),
        )
        _refuse_group(problem, scale)
    return stats


@implements(fp8_to_int8, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def fp8_to_int8_native(
    codes_NK: Tensor, scale_blocks: Tensor, out_NK: Tensor, out_scale_N: Tensor, *, first_row: int
) -> Tensor:
    """The row's largest number from the largest code of each block or scale, then its codes."""
    check_block_scales(codes_NK, scale_blocks, first_row=first_row)
    check_rows(out_scale_N, len(codes_NK), out_NK, codes_NK)
    codes, scale = codes_NK.contiguous(), scale_blocks.contiguous()
    stats, problem = _stats(), _problem()
    with _packed(out_NK) as out, _packed(out_scale_N) as out_scale:
        cpu_kernels().ascend_v4_fp8_to_int8(
            codes.data_ptr(),
            scale.data_ptr(),
            *codes.shape,
            first_row,
            out.data_ptr(),
            out_scale.data_ptr(),
            stats.data_ptr(),
            problem.data_ptr(),
        )
        _refuse_row(problem)
    return stats


@implements(bf16_to_int8, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def bf16_to_int8_native(weight_NK: Tensor, out_NK: Tensor, out_scale_N: Tensor) -> Tensor:
    """The row's largest number, then the quotients."""
    check_rows(out_scale_N, len(weight_NK), out_NK, weight_NK)
    weight = weight_NK.contiguous()
    stats, problem = _stats(), _problem()
    with _packed(out_NK) as out, _packed(out_scale_N) as out_scale:
        cpu_kernels().ascend_v4_bf16_to_int8(
            weight.data_ptr(),
            *weight.shape,
            out.data_ptr(),
            out_scale.data_ptr(),
            stats.data_ptr(),
            problem.data_ptr(),
        )
        _refuse_row(problem)
    return stats


@implements(fp4_to_bf16, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def fp4_to_bf16_native(codes_NJ: Tensor, scale_NG: Tensor, out_NK: Tensor) -> None:
    """Both bytes of every number from a table of the scale."""
    check_fp4_shapes(codes_NJ, scale_NG, out_NK.shape)
    codes, scale, problem = codes_NJ.contiguous(), scale_NG.contiguous(), _problem()
    with _packed(out_NK) as out:
        cpu_kernels().ascend_v4_fp4_to_bf16(
            codes.data_ptr(), scale.data_ptr(), *out.shape, out.data_ptr(), problem.data_ptr()
        )
        _refuse_group(problem, scale)


@implements(fp8_to_bf16, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def fp8_to_bf16_native(codes_NK: Tensor, scale_blocks: Tensor, out_NK: Tensor, *, first_row: int) -> None:
    """Float32 products, whose upper half is the number."""
    check_block_scales(codes_NK, scale_blocks, first_row=first_row)
    check_rows(None, len(codes_NK), out_NK, codes_NK)
    codes, scale, problem = codes_NK.contiguous(), scale_blocks.contiguous(), _problem()
    with _packed(out_NK) as out:
        cpu_kernels().ascend_v4_fp8_to_bf16(
            codes.data_ptr(), scale.data_ptr(), *out.shape, first_row, out.data_ptr(), problem.data_ptr()
        )
        _refuse_row(problem)


@implements(negative_zeros, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def negative_zeros_native(codes_NJ: Tensor, out_NB: Tensor) -> Tensor:
    """Compares 32 codes at a time."""
    check_bitmap(codes_NJ, out_NB)
    codes, found = codes_NJ.contiguous(), torch.zeros(1, dtype=torch.int64)
    with _packed(out_NB) as out:
        cpu_kernels().ascend_v4_negative_zeros(
            codes.data_ptr(), len(codes), 2 * codes.shape[1], out.data_ptr(), found.data_ptr()
        )
    return found


@implements(int8_to_fp4, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def int8_to_fp4_native(
    codes_NK: Tensor,
    scale_N: Tensor,
    release_scale_NG: Tensor,
    negative_zeros_NB: Tensor | None,
    out_NJ: Tensor,
) -> Tensor:
    """Per row and group scale, the magnitudes from which on a code is larger."""
    check_fp4_shapes(out_NJ, release_scale_NG, codes_NK.shape)
    check_rows(scale_N, len(codes_NK))
    if negative_zeros_NB is not None:
        check_bitmap(out_NJ, negative_zeros_NB)
    codes, scale, release_scale = (each.contiguous() for each in (codes_NK, scale_N, release_scale_NG))
    marked = None if negative_zeros_NB is None else negative_zeros_NB.contiguous()
    stats, problem = _stats(), _problem()
    with _packed(out_NJ) as out:
        cpu_kernels().ascend_v4_int8_to_fp4(
            codes.data_ptr(),
            scale.data_ptr(),
            release_scale.data_ptr(),
            None if marked is None else marked.data_ptr(),
            *codes.shape,
            out.data_ptr(),
            stats.data_ptr(),
            problem.data_ptr(),
        )
    if int(problem) < 0:
        return stats
    return int8_to_fp4.reference(codes_NK, scale_N, release_scale_NG, negative_zeros_NB, out_NJ)


@implements(bf16_to_fp4, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def bf16_to_fp4_native(weight_NK: Tensor, scale_NG: Tensor, out_NJ: Tensor) -> None:
    """Codes by comparing numbers over their group's unit with the seven that FP4 has."""
    check_fp4_shapes(out_NJ, scale_NG, weight_NK.shape)
    weight, scale, problem = weight_NK.contiguous(), scale_NG.contiguous(), _problem()
    with _packed(out_NJ) as out:
        cpu_kernels().ascend_v4_real_to_fp4(
            weight.data_ptr(),
            int(weight.dtype is torch.float32),
            scale.data_ptr(),
            *weight.shape,
            out.data_ptr(),
            problem.data_ptr(),
        )
    if int(problem) >= 0:
        bf16_to_fp4.reference(weight_NK, scale_NG, out_NJ)


@implements(bf16_to_fp8, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def bf16_to_fp8_native(weight_NK: Tensor, scale_blocks: Tensor, out_NK: Tensor, *, first_row: int) -> None:
    """Codes from the bits of numbers over their block's unit."""
    check_block_scales(weight_NK, scale_blocks, first_row=first_row)
    check_rows(None, len(weight_NK), out_NK, weight_NK)
    weight, scale, problem = weight_NK.contiguous(), scale_blocks.contiguous(), _problem()
    with _packed(out_NK) as out:
        cpu_kernels().ascend_v4_real_to_fp8(
            weight.data_ptr(),
            int(weight.dtype is torch.float32),
            scale.data_ptr(),
            *weight.shape,
            first_row,
            out.data_ptr(),
            problem.data_ptr(),
        )
    if int(problem) >= 0:
        bf16_to_fp8.reference(weight_NK, scale_blocks, out_NK, first_row=first_row)


@implements(derive_fp4_scale, backend="cpu", provider="native", unusable=cpu_unusable, needs=NEEDS)
def derive_fp4_scale_native(weight_NK: Tensor, out_NG: Tensor) -> None:
    """The exponent of a group's largest bits."""
    check_groups(weight_NK, out_NG)
    weight, problem = weight_NK.contiguous(), _problem()
    with _packed(out_NG) as out:
        cpu_kernels().ascend_v4_derive_fp4_scale(
            weight.data_ptr(),
            int(weight.dtype is torch.float32),
            *weight.shape,
            out.data_ptr(),
            problem.data_ptr(),
        )
    if int(problem) >= 0:
        derive_fp4_scale.reference(weight_NK, out_NG)


def _stats() -> Tensor:
    return torch.zeros(NUM_STATS, dtype=torch.float64)


def _problem() -> Tensor:
    return torch.full((1,), -1, dtype=torch.int64)


@contextmanager
def _packed(out: Tensor) -> Iterator[Tensor]:
    """The tensor itself, or where rows are not packed a copy that is written back."""
    if out.is_contiguous():
        yield out
        return
    copy = torch.empty_like(out, memory_format=torch.contiguous_format)
    yield copy
    out.copy_(copy)


def _refuse_group(problem: Tensor, scale_NG: Tensor) -> None:
    index = int(problem)
    if index >= 0:
        row, group = divmod(index, scale_NG.shape[1])
        byte = int(scale_NG.view(torch.uint8)[row, group])
        raise CheckpointError(
            f"the scale of row {row}, group {group} is byte {byte}: NaN or beyond the new format; "
            "the file is damaged"
        )


def _refuse_row(problem: Tensor) -> None:
    index = int(problem)
    if index >= 0:
        row, what = divmod(index, len(PROBLEMS))
        raise CheckpointError(f"row {row} {PROBLEMS[what]}; the file is damaged")
