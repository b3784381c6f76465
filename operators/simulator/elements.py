"""Number formats of 8 and 4 bits: values to codes and back, as the chip's casts do it, and MX scales.

Sources: the cast tables of Ascend C; aclnnDynamicMxQuant and its golden code in ops-nn for the MX scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.simulator.dtypes import dtype_of
from ascend_v4.operators.simulator.state import require

MX_BLOCK = 32
"""Values that share one power-of-two scale."""
MX_PAIR = 2 * MX_BLOCK
"""Values that one pair of scales covers; operators store scales in pairs along the quantised axis."""
E8M0_BIAS = 127
E8M0_NAN = 255


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A low-precision float type."""

    largest: float
    top_exponent: int
    """Exponent of the largest number."""
    values_per_byte: int = 1


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FP4 = torch.float4_e2m1fn_x2
FORMATS = {
    torch.float8_e4m3fn: FloatFormat(448.0, 8),
    torch.float8_e5m2: FloatFormat(57344.0, 15),
    FP4: FloatFormat(6.0, 2, 2),
}
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_SIGN = 8
ROUND_MODES = ("rint", "round", "floor")


def format_named(number: int | torch.dtype, operator: str, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    """The element type that a dst_type argument names. Raises SimulatorError for one not allowed there."""
    found = number if number is FP4 else dtype_of(number, operator)
    require(found in allowed, operator, f"dtype {found} is not among {', '.join(map(str, allowed))}")
    assert isinstance(found, torch.dtype)
    return found


def split_last(tensor: Tensor, *sizes: int) -> Tensor:
    """The tensor with its last axis cut into axes of these sizes."""
    return tensor.reshape(*tensor.shape[:-1], *sizes)


def as_bytes(tensor: Tensor) -> Tensor:
    """One-byte elements seen as uint8."""
    return tensor if tensor.dtype is torch.uint8 else tensor.view(torch.uint8)


def cast_fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 to FP8: nearest, ties to even, saturating; NaN stays NaN."""
    largest = FORMATS[dtype].largest
    return values.float().clamp(-largest, largest).to(dtype)


def fp4_codes(values: Tensor, round_mode: str) -> Tensor:
    """Float32 to 4-bit codes E2M1, one uint8 each: saturating; `floor` goes toward minus infinity."""
    grid = torch.tensor(FP4_MAGNITUDES)
    magnitudes = values.float().abs().clamp(max=FP4_MAGNITUDES[-1])
    below = torch.bucketize(magnitudes, grid, right=True).sub(1).clamp(0, len(FP4_MAGNITUDES) - 2)
    part = (magnitudes - grid[below]) / (grid[below + 1] - grid[below])
    negative = torch.signbit(values)
    if round_mode == "floor":
        up = torch.where(negative, part > 0, part >= 1)
    elif round_mode == "round":
        up = part >= 0.5
    else:
        up = (part > 0.5) | ((part == 0.5) & (below % 2 == 1))
    return (below + up).to(torch.uint8) | (negative.to(torch.uint8) * FP4_SIGN)


def pack_fp4(codes: Tensor) -> Tensor:
    """Two codes to a byte along the last axis, the first in the low nibble."""
    pairs = split_last(codes, -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def decode_fp4(packed: Tensor) -> Tensor:
    """Packed FP4 to float32, last axis twice as long."""
    codes = as_bytes(packed)
    values = torch.tensor([*FP4_MAGNITUDES, *(-each for each in FP4_MAGNITUDES)])
    return values[torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).long()]


def decode_scale(scale: Tensor) -> Tensor:
    """E8M0 bytes to float32; 255 is NaN."""
    return as_bytes(scale).view(torch.float8_e8m0fnu).float()


def shared_exponents(amax: Tensor, dtype: torch.dtype, scale_alg: int) -> Tensor:
    """Biased exponent, int32, of the scale that blocks with these largest magnitudes share.

    scale_alg 0 takes the exponent of amax less that of the type's largest number (so values saturate), 1
    rounds amax / largest up to a power of two. A block of zeros gets 0.
    """
    known = FORMATS[dtype]
    amax = amax.float()
    if scale_alg == 0:
        exponents = torch.frexp(amax).exponent - 1 - known.top_exponent + E8M0_BIAS
    else:
        ratio = amax / known.largest
        mantissa, exponent = torch.frexp(ratio)
        exponents = exponent - 1 + (mantissa > 0.5) + E8M0_BIAS
    exponents = torch.where(amax > 0, exponents.int().clamp(0, E8M0_NAN - 1), 0)
    return torch.where(amax.isfinite(), exponents, E8M0_NAN)


def mx_quantize(
    values: Tensor, dtype: torch.dtype, *, scale_alg: int = 0, round_mode: str = "rint", block: int = MX_BLOCK
) -> tuple[Tensor, Tensor]:
    """Codes [..., K], FP8 or one uint8 per 4-bit code, and scales uint8 [..., ceil(K/block)]."""
    width = values.shape[-1]
    num_blocks = -(-width // block)
    padded = torch.nn.functional.pad(values.float(), (0, num_blocks * block - width))
    blocks = split_last(padded, num_blocks, block)
    exponents = shared_exponents(blocks.abs().amax(-1), dtype, scale_alg)
    return scale_blocks(blocks, exponents, dtype, round_mode)[..., :width], exponents.to(torch.uint8)


def scale_blocks(blocks: Tensor, exponents: Tensor, dtype: torch.dtype, round_mode: str = "rint") -> Tensor:
    """Codes [..., n * block] of blocks [..., n, block] divided by 2^(exponents - 127)."""
    scaled = torch.ldexp(blocks, (E8M0_BIAS - exponents).unsqueeze(-1)).flatten(-2)
    return fp4_codes(scaled, round_mode) if dtype is FP4 else cast_fp8(scaled, dtype)


def scale_pairs(scales: Tensor) -> Tensor:
    """[..., G] to [..., ceil(G/2), 2], a missing last scale being 0."""
    return split_last(torch.nn.functional.pad(scales, (0, scales.shape[-1] % 2)), -1, 2)


def mx_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Float32 [..., K] of FP8 codes [..., K] or float values and scale pairs [..., ceil(K/64), 2] (bytes)."""
    factors = decode_scale(scale).flatten(-2).repeat_interleave(MX_BLOCK, dim=-1)
    return codes.float() * factors[..., : codes.shape[-1]]
