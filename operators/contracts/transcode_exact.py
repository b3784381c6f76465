"""Conversions without error: the release's FP4 and FP8 to bfloat16 and MX, and back to the release's bytes.

Legend: N outputs (rows), K inputs, J packed bytes of a row (K/2), G groups of 32 inputs, B bytes of a bitmap
(K/8), R and C blocks of 128 rows and inputs. Every operator writes into given tensors; where a number has no
exact image it raises and what was written is of no use. Runs of rows may be passed alone; where blocks of 128
rows are made, a run starts at one.
Source: issue B 1 and reference/model.md 3: E2M1 times 2^k and E4M3 times 2^k are bfloat16 numbers.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from ascend_v4.errors import CheckpointError, ContractError
from ascend_v4.operators.contract import BITWISE, FLOAT32, INT64, Spec, Where, operator
from ascend_v4.operators.contracts.quantize import FP4_GROUP, WEIGHT_BLOCK
from ascend_v4.operators.contracts.transcode import (
    BF16,
    DOUBLED_E2M1,
    E2M1_BIAS,
    E8M0,
    E8M0_NAN,
    FP8,
    INT8,
    STATS,
    STATS_UNIT,
    block_exponents,
    check_fp4_shapes,
    check_rows,
    power_of_two,
    refuse_nan_scale,
    row_stats,
)

REAL = (torch.bfloat16, torch.float32)
BYTES = (torch.uint8,)
FP8_BYTES = (torch.uint8, torch.float8_e4m3fn)
FP8_BIAS = 127
FP8_MAX = 448.0
GROUPS_PER_BLOCK = WEIGHT_BLOCK // FP4_GROUP
UNIT_SCALE = 127
"""Scale byte of a group or block of zeros whose own scale was not kept: 2^0."""
DOUBLED_MAX = 12.0
NEGATIVE_ZERO = 8
LARGEST_BF16_SCALE = 252
"""Scale byte up to which every FP4 number is a bfloat16 number."""


@operator(source="issue B 1; reference/model.md 3", tolerance=BITWISE, mutates=("out_NK",), where=Where.HOST)
def fp4_to_bf16(
    codes_NJ: Annotated[Tensor, Spec("N J", INT8)],
    scale_NG: Annotated[Tensor, Spec("N G", E8M0)],
    out_NK: Annotated[Tensor, Spec("N K", BF16)],
) -> None:
    """FP4 weights as bfloat16, exact, negative zeros kept.

    Raises CheckpointError for a NaN scale and for scales above 2^125, whose numbers bfloat16 may not have.
    """
    check_fp4_shapes(codes_NJ, scale_NG, out_NK.shape)
    _refuse(scale_NG.view(torch.uint8) > LARGEST_BF16_SCALE, "has a group scale beyond bfloat16")
    real = _fp4_reals(codes_NJ, scale_NG)
    _store_bf16(real, out_NK)


@operator(source="issue B 1; reference/model.md 3", tolerance=BITWISE, mutates=("out_NK",), where=Where.HOST)
def fp8_to_bf16(
    codes_NK: Annotated[Tensor, Spec("N K", FP8)],
    scale_blocks: Annotated[Tensor, Spec("R C", E8M0)],
    out_NK: Annotated[Tensor, Spec("N K", BF16)],
    *,
    first_row: int,
) -> None:
    """FP8 weights as bfloat16, exact, negative zeros kept; scales as in `fp8_to_int8`.

    Raises CheckpointError for a NaN and for a number bfloat16 does not have (scales near the ends of E8M0).
    """
    real = codes_NK.double() * _block_factors(codes_NK, scale_blocks, first_row=first_row)
    _store_bf16(real, out_NK)


@operator(
    source="issue B 1: the block scale repeated per 32 inputs",
    tolerance=BITWISE,
    mutates=("out_NG",),
    where=Where.HOST,
)
def fp8_scale_to_mx(
    scale_blocks: Annotated[Tensor, Spec("R C", E8M0)],
    out_NG: Annotated[Tensor, Spec("N G", BYTES)],
    *,
    first_row: int,
) -> None:
    """Scales of MXFP8 rows from those of 128x128 blocks: the codes stay as they are, and so do the numbers.

    out_NG are the rows from `first_row` on of a tensor whose block scales are given whole; G groups need not
    fill the last block.
    """
    num_rows, groups = out_NG.shape
    if (
        first_row < 0
        or _blocks(first_row + num_rows, WEIGHT_BLOCK) > scale_blocks.shape[0]
        or (_blocks(groups, GROUPS_PER_BLOCK) != scale_blocks.shape[1])
    ):
        raise ContractError(
            f"block scales {list(scale_blocks.shape)} do not reach rows {first_row} to "
            f"{first_row + num_rows} of {groups} groups"
        )
    rows = (torch.arange(num_rows, device=scale_blocks.device) + first_row) // WEIGHT_BLOCK
    wide = scale_blocks.view(torch.uint8).repeat_interleave(GROUPS_PER_BLOCK, 1)[:, :groups]
    out_NG.copy_(wide[rows])


@operator(source="issue B 1: release from mx", tolerance=BITWISE, mutates=("out_blocks",), where=Where.HOST)
def mx_scale_to_fp8(
    scale_NG: Annotated[Tensor, Spec("N G", E8M0)],
    out_blocks: Annotated[Tensor, Spec("R C", BYTES)],
) -> None:
    """Inverse of `fp8_scale_to_mx` for rows that start at a block.

    Raises CheckpointError where scales inside a block differ: such MXFP8 weights were not made from FP8
    blocks.
    """
    num_rows, groups = scale_NG.shape
    wanted = (_blocks(num_rows, WEIGHT_BLOCK), _blocks(groups, GROUPS_PER_BLOCK))
    if tuple(out_blocks.shape) != wanted:
        raise ContractError(
            f"MX scales {list(scale_NG.shape)} make blocks {list(wanted)}, got {list(out_blocks.shape)}"
        )
    scale = scale_NG.view(torch.uint8)
    out_blocks.copy_(scale[::WEIGHT_BLOCK, ::GROUPS_PER_BLOCK])
    again = torch.empty_like(scale)
    fp8_scale_to_mx.reference(out_blocks, again, first_row=0)
    if not torch.equal(again, scale):
        row, group = (again != scale).nonzero()[0].tolist()
        raise CheckpointError(
            f"the scale of row {row}, group {group} is not that of its 128x128 block: these MXFP8 "
            "weights have no FP8 block form"
        )


@operator(
    source="issue B 1: a bitmap of negative zeros", tolerance=BITWISE, mutates=("out_NB",), where=Where.HOST
)
def negative_zeros(
    codes_NJ: Annotated[Tensor, Spec("N J", INT8)], out_NB: Annotated[Tensor, Spec("N B", BYTES)]
) -> Annotated[Tensor, Spec("1", INT64)]:
    """Which FP4 codes are a negative zero: input k is bit k % 8 of byte k / 8. Returns how many there are.

    K must be a multiple of 32.
    """
    check_bitmap(codes_NJ, out_NB)
    num_rows, packed = codes_NJ.shape
    marked = _nibbles(codes_NJ) == NEGATIVE_ZERO
    weights = torch.tensor([1 << bit for bit in range(8)], device=codes_NJ.device)
    out_NB.copy_((marked.view(num_rows, packed // 4, 8) * weights).sum(-1))
    return marked.sum().view(1)


@operator(
    source="issue B 1: release from a reversible pack",
    tolerance=BITWISE,
    mutates=("out_NJ",),
    where=Where.HOST,
)
def int8_to_fp4(
    codes_NK: Annotated[Tensor, Spec("N K", INT8)],
    scale_N: Annotated[Tensor, Spec("N", FLOAT32)],
    release_scale_NG: Annotated[Tensor, Spec("N G", E8M0)],
    negative_zeros_NB: Annotated[Tensor, Spec("N B", BYTES)] | None,
    out_NJ: Annotated[Tensor, Spec("N J", INT8)],
) -> Annotated[Tensor, Spec("6", STATS)]:
    """INT8 weights back to FP4 codes under given group scales: the nearest code, ties to the even one.

    Returns the sums of `RowStats`: an exact row has the INT8 row's own real numbers, so after an exact
    conversion and with the kept scales and bitmap it has the release's bytes. For the sums numbers over the
    row's scale are rounded to multiples of STATS_UNIT; the last is 0. Without a bitmap zeros are positive.

    Raises CheckpointError for a NaN group scale, a row scale that is not a positive number, and for a bitmap
    that marks a number that is not zero.
    """
    check_fp4_shapes(out_NJ, release_scale_NG, codes_NK.shape)
    check_rows(scale_N, len(codes_NK))
    exponents = release_scale_NG.view(torch.uint8).int()
    refuse_nan_scale(exponents == E8M0_NAN)
    _refuse_row_scale(scale_N)
    scale_N1 = scale_N.double().unsqueeze(1)
    real = codes_NK.double() * scale_N1
    unit = power_of_two(exponents - E2M1_BIAS).repeat_interleave(FP4_GROUP, 1)
    magnitude = (real / unit).abs().clamp_max(DOUBLED_MAX)
    doubled = torch.tensor(DOUBLED_E2M1, dtype=torch.float64, device=codes_NK.device)
    # Between two neighbours the even code takes the middle: odd codes end before it, even ones after it.
    middle = (doubled[:-1] + doubled[1:]) / 2
    code = torch.searchsorted(middle, magnitude)
    code += (code % 2 == 1) & (magnitude == middle[code.clamp_max(6)])
    nearest = doubled[code] * unit * real.sign()
    nibble = code + 8 * ((real < 0) & (code > 0))
    if negative_zeros_NB is not None:
        nibble += 8 * _marked(negative_zeros_NB, codes_NK)
    out_NJ.copy_((nibble[:, 0::2] | (nibble[:, 1::2] << 4)).to(torch.uint8).view(torch.int8))
    left = torch.round(nearest / scale_N1 / STATS_UNIT) - codes_NK.double() / STATS_UNIT
    squared_unit = scale_N.double().square()
    error = left.long().square().sum(1).double() * STATS_UNIT**2 * squared_unit
    norm = codes_NK.long().square().sum(1).double() * squared_unit
    return row_stats((nearest != real).sum(1), error, norm, torch.zeros_like(error))


@operator(
    source="issue B 1: release from a bf16 pack", tolerance=BITWISE, mutates=("out_NJ",), where=Where.HOST
)
def bf16_to_fp4(
    weight_NK: Annotated[Tensor, Spec("N K", REAL)],
    scale_NG: Annotated[Tensor, Spec("N G", E8M0)],
    out_NJ: Annotated[Tensor, Spec("N J", INT8)],
) -> None:
    """Real numbers to FP4 codes under given group scales, exact, the sign of zero kept.

    Raises CheckpointError for a NaN scale and for a number that FP4 with its scale does not have.
    """
    check_fp4_shapes(out_NJ, scale_NG, weight_NK.shape)
    exponents = scale_NG.view(torch.uint8).int()
    refuse_nan_scale(exponents == E8M0_NAN)
    scaled = weight_NK.double() * power_of_two(E2M1_BIAS - exponents).repeat_interleave(FP4_GROUP, 1)
    doubled = torch.tensor(DOUBLED_E2M1, dtype=torch.float64, device=weight_NK.device)
    code = torch.searchsorted(doubled, scaled.abs()).clamp_max(7)
    _refuse(doubled[code] != scaled.abs(), "is no FP4 number with the scale of its group")
    nibble = code + 8 * weight_NK.signbit()
    out_NJ.copy_((nibble[:, 0::2] | (nibble[:, 1::2] << 4)).to(torch.uint8).view(torch.int8))


@operator(
    source="issue B 1: release from a bf16 pack", tolerance=BITWISE, mutates=("out_NK",), where=Where.HOST
)
def bf16_to_fp8(
    weight_NK: Annotated[Tensor, Spec("N K", REAL)],
    scale_blocks: Annotated[Tensor, Spec("R C", E8M0)],
    out_NK: Annotated[Tensor, Spec("N K", FP8_BYTES)],
    *,
    first_row: int,
) -> None:
    """Real numbers to FP8 codes under given block scales, exact, the sign of zero kept.

    Raises CheckpointError for a NaN scale and for a number that FP8 with its scale does not have.
    """
    factors = _block_factors(weight_NK, scale_blocks, first_row=first_row)
    scaled = weight_NK.double() / factors
    codes = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    _refuse(codes.double() != scaled, "is no FP8 number with the scale of its block")
    out_NK.view(torch.uint8).copy_(codes.view(torch.uint8))


@operator(
    source="kernel.py: smallest power of two under which all fits",
    tolerance=BITWISE,
    mutates=("out_NG",),
    where=Where.HOST,
)
def derive_fp4_scale(
    weight_NK: Annotated[Tensor, Spec("N K", REAL)],
    out_NG: Annotated[Tensor, Spec("N G", BYTES)],
) -> None:
    """Group scales with which FP4 holds given numbers: the smallest power of two, 2^0 for a group of zeros.

    These need not be the scales the release had: codes 1 1.5 2 3 under 2^k are 2 3 4 6 under 2^(k-1).
    Raises CheckpointError where a number is beyond every scale; whether all of them are FP4 numbers,
    `bf16_to_fp4` and `int8_to_fp4` tell.
    """
    check_groups(weight_NK, out_NG)
    num_rows, inputs = weight_NK.shape
    largest = weight_NK.double().abs().view(num_rows, inputs // FP4_GROUP, FP4_GROUP).amax(-1)
    out_NG.copy_(_scale_byte(largest, 6.0))


@operator(
    source="kernel.py: smallest power of two under which all fits",
    tolerance=BITWISE,
    mutates=("out_blocks",),
    where=Where.HOST,
)
def derive_fp8_scale(
    weight_NK: Annotated[Tensor, Spec("N K", REAL)],
    out_blocks: Annotated[Tensor, Spec("R C", BYTES)],
) -> None:
    """Scales of 128x128 blocks with which FP8 holds given numbers: the smallest power of two, 2^0 for zeros.

    Raises CheckpointError where a number is beyond every scale; whether all of them are FP8 numbers,
    `bf16_to_fp8` tells.
    """
    num_rows, inputs = weight_NK.shape
    rows, columns = _blocks(num_rows, WEIGHT_BLOCK), _blocks(inputs, WEIGHT_BLOCK)
    if tuple(out_blocks.shape) != (rows, columns):
        raise ContractError(f"{list(weight_NK.shape)} weights have {[rows, columns]} block scales")
    padding = (0, columns * WEIGHT_BLOCK - inputs, 0, rows * WEIGHT_BLOCK - num_rows)
    padded = torch.nn.functional.pad(weight_NK.double().abs(), padding)
    largest = padded.view(rows, WEIGHT_BLOCK, columns, WEIGHT_BLOCK).amax((1, 3))
    out_blocks.copy_(_scale_byte(largest, FP8_MAX))


def check_groups(weight_NK: Tensor, out_NG: Tensor) -> None:
    """Raises ContractError unless a scale stands for every 32 inputs."""
    num_rows, inputs = weight_NK.shape
    if inputs % FP4_GROUP or tuple(out_NG.shape) != (num_rows, inputs // FP4_GROUP):
        raise ContractError(
            f"{list(weight_NK.shape)} weights have {[num_rows, inputs // FP4_GROUP]} group scales, "
            f"got {list(out_NG.shape)}"
        )


def check_bitmap(codes_NJ: Tensor, out_NB: Tensor) -> None:
    """Raises ContractError unless a bit stands for every code."""
    num_rows, packed = codes_NJ.shape
    if (2 * packed) % FP4_GROUP or tuple(out_NB.shape) != (num_rows, packed // 4):
        raise ContractError(
            f"FP4 codes {list(codes_NJ.shape)} make a bitmap of {[num_rows, packed // 4]} bytes"
        )


def _fp4_reals(codes_NJ: Tensor, scale_NG: Tensor) -> Tensor:
    exponents = scale_NG.view(torch.uint8).int()
    refuse_nan_scale(exponents == E8M0_NAN)
    nibbles = _nibbles(codes_NJ)
    doubled = torch.tensor(DOUBLED_E2M1, dtype=torch.float64, device=codes_NJ.device)
    signed = torch.cat((doubled, -doubled))
    factors: Tensor = power_of_two(exponents - E2M1_BIAS)
    return signed[nibbles] * factors.repeat_interleave(FP4_GROUP, 1)


def _nibbles(codes_NJ: Tensor) -> Tensor:
    packed = codes_NJ.view(torch.uint8).long()
    return torch.stack((packed & 15, packed >> 4), -1).flatten(1)


def _marked(negative_zeros_NB: Tensor, codes_NK: Tensor) -> Tensor:
    num_rows, inputs = codes_NK.shape
    if tuple(negative_zeros_NB.shape) != (num_rows, inputs // 8):
        raise ContractError(
            f"a bitmap of {list(negative_zeros_NB.shape)} bytes does not fit {list(codes_NK.shape)}"
        )
    bits = torch.arange(8, device=codes_NK.device)
    marked = ((negative_zeros_NB.long().unsqueeze(-1) >> bits) & 1).view(num_rows, inputs)
    _refuse((marked == 1) & (codes_NK != 0), "is not zero, but marked as a negative zero")
    return marked


def _block_factors(values_NK: Tensor, scale_blocks: Tensor, *, first_row: int) -> Tensor:
    shift = block_exponents(values_NK, scale_blocks, first_row=first_row)
    factors: Tensor = power_of_two(shift)
    return factors.repeat_interleave(WEIGHT_BLOCK, 1)[:, : values_NK.shape[1]]


def _store_bf16(real_NK: Tensor, out_NK: Tensor) -> None:
    check_rows(None, len(real_NK), out_NK, real_NK)
    rounded = real_NK.to(torch.bfloat16)
    _refuse(rounded.double() != real_NK, "has no bfloat16 form: its scale lies at an end of the range")
    out_NK.copy_(rounded)


def _scale_byte(largest: Tensor, code_max: float) -> Tensor:
    # 448 and 6 are 0.875 and 0.75 times a power of two.
    mantissa, exponent = torch.frexp(largest)
    max_mantissa, max_exponent = torch.frexp(torch.tensor(code_max))
    above = mantissa > max_mantissa.double()
    byte = (exponent - int(max_exponent) + above + FP8_BIAS).clamp_min(0)
    byte = byte.masked_fill(largest == 0, UNIT_SCALE)
    _refuse(~(largest.isfinite() & (byte < E8M0_NAN)), "group holds numbers beyond every scale")
    return byte


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _refuse_row_scale(scale_N: Tensor) -> None:
    wrong = ~(scale_N.isfinite() & (scale_N > 0))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise CheckpointError(
            f"the scale of row {row} is {float(scale_N[row])}, not a positive number; the file is damaged"
        )


def _refuse(wrong_NK: Tensor, complaint: str) -> None:
    if bool(wrong_NK.any()):
        row, column = wrong_NK.nonzero()[0].tolist()
        raise CheckpointError(f"the weight at row {row}, column {column} {complaint}")
