"""Number formats of the release and of packs: quantise, dequantise, and the fake quantisation of activations.

Legend: N outputs, K inputs, T rows, H pairs of outputs. E8M0 scales are powers of two, so a code times one is
exact in bfloat16. Source of the release's rules: its kernel.py, later revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.errors import ContractError
from ascend_v4.operators.contract import BITWISE, FLOAT32, FLOATS, Spec, Where, operator

FP8_MAX = 448.0
FP4_MAX = 6.0
FP8_AMAX_FLOOR = 1e-4
FP4_AMAX_FLOOR = 6.0 * 2.0**-126
ACTIVATION_GROUP = 128
"""Input channels that share one activation scale in front of FP8 and FP4 weights."""
KV_GROUP = 64
"""Key-value channels that share one scale."""
FP4_GROUP = 32
WEIGHT_BLOCK = 128
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_GROUP = 32
"""Inputs that share one scale in the OCP microscaling formats."""
E4M3_EXPONENT = 8
"""Of the largest E4M3 number, 448 = 1.75 * 2^8."""
INT8_MAX = 127.0
LARGEST_FLOAT16 = 65504.0


class WeightFormat(Enum):
    """How a weight is stored."""

    PLAIN = "plain"
    FP8_BLOCK = "fp8 e4m3, one e8m0 scale per 128x128"
    FP4_GROUP = "fp4 e2m1, two per byte low nibble first, one e8m0 scale per row and 32 inputs"
    MXFP8 = "fp8 e4m3, one e8m0 scale per row and 32 inputs"
    INT8_CHANNEL = "int8, one float32 scale per output"
    INT4_CHANNEL = "int4, two outputs per byte low nibble first, one float32 scale per output"


class ActivationFormat(Enum):
    """What a linear layer does to its input."""

    NONE = "none"
    FP8_GROUP = "fp8 e4m3 per 128 inputs, power-of-two scale"
    INT8_TOKEN = "int8 per token, float32 scale"
    MXFP8 = "fp8 e4m3 per 32 inputs, power-of-two scale by the OCP rule"


class KvFormat(Enum):
    """What a key-value row goes through before it is cached."""

    PLAIN = "plain"
    FP8_GROUP = "fp8 e4m3 per 64 non-rope channels, power-of-two scale; rope channels untouched"


class IndexFormat(Enum):
    """What indexer queries and keys go through."""

    PLAIN = "plain"
    FP4_GROUP = "Hadamard rotation, then fp4 e2m1 per 32 channels"
    INT8 = "Hadamard rotation, then int8 per query head or key, float16 scale"
    FP8 = "Hadamard rotation, then fp8 e4m3 per query head or key, float32 scale"


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as its file has it.

    codes: [N, K] in a plain dtype, float8_e4m3fn or int8; [N, K/2] int8 for FP4; [N/2, K] int8 for INT4. INT8
    codes may be whole numbers in float32. scale: uint8 or float8_e8m0fnu; float32 [N] for INT8 and INT4; or
    None.
    """

    codes: Tensor
    scale: Tensor | None
    format: WeightFormat

    @property
    def num_outputs(self) -> int:
        """Rows, N."""
        return self.codes.shape[0] * (2 if self.format is WeightFormat.INT4_CHANNEL else 1)

    @property
    def num_inputs(self) -> int:
        """Logical columns, K."""
        return self.codes.shape[1] * (2 if self.format is WeightFormat.FP4_GROUP else 1)

    @property
    def is_integer(self) -> bool:
        """Whether the numbers are whole ones times a scale per output."""
        return self.format in (WeightFormat.INT8_CHANNEL, WeightFormat.INT4_CHANNEL)

    def whole_numbers(self) -> Tensor:
        """Codes of an integer weight, [N, K] float32; their own memory where they are that already."""
        assert self.is_integer, self.format
        codes = unpack_int4(self.codes) if self.format is WeightFormat.INT4_CHANNEL else self.codes
        return codes.float()

    def rows(self, low: int, high: int) -> StoredWeight:
        """Rows low to high as a weight of their own; `low` is a multiple of 128 for FP8, even for INT4."""
        if self.scale is None or self.format is WeightFormat.PLAIN:
            return StoredWeight(self.codes[low:high], None, self.format)
        if self.format is WeightFormat.INT4_CHANNEL:
            assert low % 2 == 0, low
            return StoredWeight(self.codes[low // 2 : -(-high // 2)], self.scale[low:high], self.format)
        if self.format is not WeightFormat.FP8_BLOCK:
            return StoredWeight(self.codes[low:high], self.scale[low:high], self.format)
        assert low % WEIGHT_BLOCK == 0, low
        blocks = self.scale[low // WEIGHT_BLOCK : -(-high // WEIGHT_BLOCK)]
        return StoredWeight(self.codes[low:high], blocks, self.format)

    def to_float32(self) -> Tensor:
        """The real numbers, [N, K] float32, exact; the weight's own memory where it is float32 already."""
        if self.format is WeightFormat.PLAIN:
            return self.codes.float()
        if self.scale is None:
            raise ContractError(f"a weight in {self.format.value} needs a scale")
        if self.format is WeightFormat.FP8_BLOCK:
            return dequantize_fp8_block(self.codes, self.scale)
        if self.format is WeightFormat.MXFP8:
            return dequantize_mxfp8(self.codes, self.scale)
        if self.is_integer:
            return self.whole_numbers() * self.scale.view(-1, 1)
        return dequantize_fp4_group(self.codes, self.scale)


def scale_to_float32(scale: Tensor) -> Tensor:
    """E8M0 bytes as float32: 2^(byte - 127). 255 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def power_of_two_at_least(values: Tensor) -> Tensor:
    """Smallest power of two that is not below each value. Normal positive float32 only."""
    bits = values.view(torch.int32)
    return ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def divided(values: Tensor, divisor: float) -> Tensor:
    """Floats over a number, rounded once on every device.

    CUDA computes `values / divisor` as a product with the reciprocal, which may be a rounding step off. It
    divides by a tensor.
    """
    return values / values.new_full((), divisor)


def _grouped(values: Tensor, group: int) -> tuple[Tensor, int]:
    width = values.shape[-1]
    missing = -width % group
    padded = functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // group, group), width


@operator(source="kernel.py act_quant; reference/model.md 2.1 and 2.4", tolerance=BITWISE, where=Where.PART)
def fake_quantize_fp8(
    values: Annotated[Tensor, Spec("T K", FLOATS)], *, group: int
) -> Annotated[Tensor, Spec("T K", FLOATS)]:
    """Values after a trip through E4M3 with one power-of-two scale per `group` channels.

    A last group may be shorter. The scale is the smallest power of two that keeps the group's largest
    magnitude (at least 1e-4) within +-448. The result has the input's dtype, in which it is exact.
    """
    grouped, width = _grouped(values.float(), group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp_min(FP8_AMAX_FLOOR)
    scale = power_of_two_at_least(divided(amax, FP8_MAX))
    codes = (grouped / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2)[..., :width].to(values.dtype)


@operator(source="kernel.py fp4_act_quant; reference/model.md 2.6", tolerance=BITWISE, where=Where.PART)
def fake_quantize_fp4(
    values: Annotated[Tensor, Spec("T K", FLOATS)], *, group: int
) -> Annotated[Tensor, Spec("T K", FLOATS)]:
    """Values after a trip through E2M1 (round to nearest, ties to even) with one power-of-two scale per
    group.
    """
    grouped, width = _grouped(values.float(), group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp_min(FP4_AMAX_FLOOR)
    scale = power_of_two_at_least(divided(amax, FP4_MAX))
    rounded = round_to_e2m1((grouped / scale).clamp(-FP4_MAX, FP4_MAX))
    return (rounded * scale).flatten(-2)[..., :width].to(values.dtype)


def round_to_e2m1(values: Tensor) -> Tensor:
    """Nearest E2M1 number of values within +-6, ties to the even code."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.round(values / step) * step


@operator(source="reference/model.md 3: FP8 blocks of 128x128", tolerance=BITWISE, where=Where.PART)
def dequantize_fp8_block(
    codes: Annotated[Tensor, Spec("N K", (torch.float8_e4m3fn,))], scale: Tensor
) -> Annotated[Tensor, Spec("N K", FLOAT32)]:
    """Real numbers of an FP8 weight; scale is [ceil(N/128), ceil(K/128)]."""
    rows, columns = codes.shape
    factors = scale_to_float32(scale)
    wide = factors.repeat_interleave(WEIGHT_BLOCK, 1)[:, :columns]
    values = codes.float()
    for block in range(factors.shape[0]):
        values[block * WEIGHT_BLOCK : min((block + 1) * WEIGHT_BLOCK, rows)] *= wide[block]
    return values


@operator(source="reference/model.md 3: FP4 packing", tolerance=BITWISE, where=Where.PART)
def dequantize_fp4_group(
    codes: Annotated[Tensor, Spec("N J", (torch.int8,))], scale: Tensor
) -> Annotated[Tensor, Spec("N K", FLOAT32)]:
    """Real numbers of an FP4 weight: byte k holds input 2k in its low nibble; scale is [N, K/32]."""
    rows, packed = codes.shape
    pairs = _pair_table(codes.device)[codes.view(torch.uint8).to(torch.int32)]
    grouped = pairs.view(rows, packed * 2 // FP4_GROUP, FP4_GROUP)
    return (grouped * scale_to_float32(scale).unsqueeze(-1)).view(rows, packed * 2)


def dequantize_mxfp8(codes_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """Real numbers of an MXFP8 weight, [N, K] float32; scale is [N, K/32]."""
    rows, columns = codes_NK.shape
    grouped = codes_NK.float().view(rows, columns // MX_GROUP, MX_GROUP)
    return (grouped * scale_to_float32(scale_NG).unsqueeze(-1)).view(rows, columns)


def unpack_int4(codes_HK: Tensor) -> Tensor:
    """Codes of an INT4 weight, [N, K] int8 in [-8, 7]: a byte has the even output in its low nibble."""
    low = codes_HK & 15
    low = low - ((low & 8) << 1)
    return torch.stack((low, codes_HK >> 4), dim=1).flatten(0, 1)


def _pair_table(device: torch.device) -> Tensor:
    """The two E2M1 numbers of every byte, [256, 2] float32."""
    one_nibble = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=device)
    low = one_nibble.repeat(16)
    high = one_nibble.repeat_interleave(16)
    return torch.stack((low, high), dim=1)


def hadamard_matrix(width: int, *, device: torch.device | None = None) -> Tensor:
    """Walsh-Hadamard matrix in Sylvester order times width^-0.5, [width, width] float32. width is a power of
    two.
    """
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return torch.mul(matrix, width**-0.5)


@operator(source="ascend-operators.md 4.1 and 19.4: npu_dynamic_quant", tolerance=BITWISE, where=Where.PART)
def quantize_int8_token(values: Annotated[Tensor, Spec("T K", FLOATS)]) -> tuple[Tensor, Tensor]:
    """Int8 codes [T, K] and float32 scales [T] of rows: scale is amax / 127, codes round to nearest even.

    A row of zeros has scale 0 and codes 0; the vendor leaves that case open.
    """
    wide = values.float()
    # a row without columns has no largest magnitude
    amax = wide.abs().amax(-1, keepdim=True) if wide.shape[-1] else wide.new_zeros(len(wide), 1)
    scale = divided(amax, INT8_MAX)
    codes = torch.where(scale > 0, wide / scale, 0.0).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale.squeeze(-1)


@operator(
    source="OCP microscaling 1.0; ascend-operators.md 4.2: npu_dynamic_mx_quant",
    tolerance=BITWISE,
    where=Where.PART,
)
def fake_quantize_mxfp8(
    values: Annotated[Tensor, Spec("T K", FLOATS)],
) -> Annotated[Tensor, Spec("T K", FLOATS)]:
    """Values after a trip through E4M3 with one power-of-two scale per 32 channels by the OCP rule.

    The scale is 2^(floor(log2(amax)) - 8), at least 2^-126; codes beyond 448 are cut, so that the largest
    magnitude of a group may lose up to an eighth. The release's own rule rounds the scale up instead. The
    result has the input's dtype, in which it is exact.
    """
    grouped, width = _grouped(values.float(), MX_GROUP)
    exponent = grouped.abs().amax(-1, keepdim=True).view(torch.int32) >> 23
    scale = ((exponent - E4M3_EXPONENT).clamp_min(1) << 23).view(torch.float32)
    codes = (grouped / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2)[..., :width].to(values.dtype)


@operator(source="reference/model.md 2.6; ascend-operators.md 8", tolerance=BITWISE, where=Where.PART)
def quantize_index(
    values: Annotated[Tensor, Spec("T K", FLOATS)], *, format: IndexFormat
) -> Annotated[Tensor, Spec("T K", FLOATS)]:
    """Indexer queries (heads as rows) or keys as the scores will see them. PLAIN returns the input.

    INT8 and FP8 give float32, which holds a code times its scale; the others keep the dtype. For these two
    the rotation's matrix has the dtype of the values, as on the chips, where no operator rotates better.
    """
    if format is IndexFormat.PLAIN:
        return values
    matrix = hadamard_matrix(values.shape[-1], device=values.device)
    if format in (IndexFormat.INT8, IndexFormat.FP8):
        matrix = matrix.to(values.dtype).float()
    rotated = (values.float() @ matrix).to(values.dtype)
    if format is IndexFormat.INT8:
        codes, scale = quantize_int8_token.reference(rotated)
        return codes.float() * scale.clamp_max(LARGEST_FLOAT16).half().float().unsqueeze(-1)
    if format is IndexFormat.FP8:
        return _fp8_rows(rotated.float())
    return fake_quantize_fp4.reference(rotated, group=FP4_GROUP)


def _fp8_rows(rows: Tensor) -> Tensor:
    scale = divided(rows.abs().amax(-1, keepdim=True), FP8_MAX)
    codes = torch.where(scale > 0, rows / scale, 0.0).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.float() * scale
