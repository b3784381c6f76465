"""The release's number formats: quantise, dequantise, and the fake quantisation its kernels apply to
activations.

Legend: N outputs, K inputs, T rows. Scales are powers of two (E8M0), so a scaled code is exact in bfloat16.
Source of every rule: the release's kernel.py, later revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.errors import ContractError
from ascend_v4.operators.contract import BITWISE, FLOAT32, FLOATS, Spec, operator

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


class WeightFormat(Enum):
    """How a weight is stored."""

    PLAIN = "plain"
    FP8_BLOCK = "fp8 e4m3, one e8m0 scale per 128x128"
    FP4_GROUP = "fp4 e2m1, two per byte low nibble first, one e8m0 scale per row and 32 inputs"


class ActivationFormat(Enum):
    """What a linear layer does to its input."""

    NONE = "none"
    FP8_GROUP = "fp8 e4m3 per 128 inputs, power-of-two scale"


class KvFormat(Enum):
    """What a key-value row goes through before it is cached."""

    PLAIN = "plain"
    FP8_GROUP = "fp8 e4m3 per 64 non-rope channels, power-of-two scale; rope channels untouched"


class IndexFormat(Enum):
    """What indexer queries and keys go through."""

    PLAIN = "plain"
    FP4_GROUP = "Hadamard rotation, then fp4 e2m1 per 32 channels"


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as its file has it.

    codes: [N, K] in a plain dtype or float8_e4m3fn, or [N, K/2] int8 for FP4. scale: uint8 or float8_e8m0fnu,
    or None.
    """

    codes: Tensor
    scale: Tensor | None
    format: WeightFormat

    @property
    def num_outputs(self) -> int:
        """Rows, N."""
        return self.codes.shape[0]

    @property
    def num_inputs(self) -> int:
        """Logical columns, K."""
        return self.codes.shape[1] * (2 if self.format is WeightFormat.FP4_GROUP else 1)

    def rows(self, low: int, high: int) -> StoredWeight:
        """Rows low to high as a weight of their own; `low` must be a multiple of 128 for FP8 blocks."""
        if self.scale is None or self.format is WeightFormat.PLAIN:
            return StoredWeight(self.codes[low:high], None, self.format)
        if self.format is WeightFormat.FP4_GROUP:
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
        return dequantize_fp4_group(self.codes, self.scale)


def scale_to_float32(scale: Tensor) -> Tensor:
    """E8M0 bytes as float32: 2^(byte - 127). 255 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def power_of_two_at_least(values: Tensor) -> Tensor:
    """Smallest power of two that is not below each value. Normal positive float32 only."""
    bits = values.view(torch.int32)
    return ((bits + 0x7FFFFF) & ~0x7FFFFF).view(torch.float32)


def _grouped(values: Tensor, group: int) -> tuple[Tensor, int]:
    width = values.shape[-1]
    missing = -width % group
    padded = functional.pad(values, (0, missing)) if missing else values
    return padded.reshape(*padded.shape[:-1], padded.shape[-1] // group, group), width


@operator(source="kernel.py act_quant; reference/model.md 2.1 and 2.4", tolerance=BITWISE)
def fake_quantize_fp8(
    values: Annotated[Tensor, Spec("T K", FLOATS)], *, group: int
) -> Annotated[Tensor, Spec("T K", FLOATS)]:
    """Values after a trip through E4M3 with one power-of-two scale per `group` channels.

    A last group may be shorter. The scale is the smallest power of two that keeps the group's largest
    magnitude (at least 1e-4) within +-448. The result has the input's dtype, in which it is exact.
    """
    grouped, width = _grouped(values.float(), group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp_min(FP8_AMAX_FLOOR)
    scale = power_of_two_at_least(amax / FP8_MAX)
    codes = (grouped / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten(-2)[..., :width].to(values.dtype)


@operator(source="kernel.py fp4_act_quant; reference/model.md 2.6", tolerance=BITWISE)
def fake_quantize_fp4(
    values: Annotated[Tensor, Spec("T K", FLOATS)], *, group: int
) -> Annotated[Tensor, Spec("T K", FLOATS)]:
    """Values after a trip through E2M1 (round to nearest, ties to even) with one power-of-two scale per
    group.
    """
    grouped, width = _grouped(values.float(), group)
    amax = grouped.abs().amax(-1, keepdim=True).clamp_min(FP4_AMAX_FLOOR)
    scale = power_of_two_at_least(amax / FP4_MAX)
    rounded = round_to_e2m1((grouped / scale).clamp(-FP4_MAX, FP4_MAX))
    return (rounded * scale).flatten(-2)[..., :width].to(values.dtype)


def round_to_e2m1(values: Tensor) -> Tensor:
    """Nearest E2M1 number of values within +-6, ties to the even code."""
    magnitude = values.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.round(values / step) * step


@operator(source="reference/model.md 3: FP8 blocks of 128x128", tolerance=BITWISE)
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


@operator(source="reference/model.md 3: FP4 packing", tolerance=BITWISE)
def dequantize_fp4_group(
    codes: Annotated[Tensor, Spec("N J", (torch.int8,))], scale: Tensor
) -> Annotated[Tensor, Spec("N K", FLOAT32)]:
    """Real numbers of an FP4 weight: byte k holds input 2k in its low nibble; scale is [N, K/32]."""
    rows, packed = codes.shape
    pairs = _pair_table(codes.device)[codes.view(torch.uint8).to(torch.int32)]
    grouped = pairs.view(rows, packed * 2 // FP4_GROUP, FP4_GROUP)
    return (grouped * scale_to_float32(scale).unsqueeze(-1)).view(rows, packed * 2)


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


@operator(source="reference/model.md 2.6", tolerance=BITWISE)
def quantize_index(
    values: Annotated[Tensor, Spec("T K", FLOATS)], *, format: IndexFormat
) -> Annotated[Tensor, Spec("T K", FLOATS)]:
    """Indexer queries (heads as rows) or keys as the scores will see them. PLAIN returns the input."""
    if format is IndexFormat.PLAIN:
        return values
    rotated = (values.float() @ hadamard_matrix(values.shape[-1], device=values.device)).to(values.dtype)
    return fake_quantize_fp4.reference(rotated, group=FP4_GROUP)
