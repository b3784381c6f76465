"""Weights of routed experts as grouped products read them: one tensor per projection, for all experts.

Legend: E experts, D hidden, I intermediate, K inputs and N outputs of a projection, H pairs of outputs, G
groups of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ascend_v4.errors import CheckpointError
from ascend_v4.operators.contracts.moe import ExpertWeights
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight, WeightFormat, unpack_int4
from ascend_v4.operators.npu.constants import ACL_FORMAT_NZ, FLOAT4_E2M1FN_X2
from ascend_v4.operators.npu.formats import blocks_to_mx_scale, input_major_view, mx_scale_pairs, to_nz

INT4_SHIFT = 8
"""The W4A8 kernel subtracts this from every activation code; the bias adds its share back."""


INTEGERS = (WeightFormat.INT8_CHANNEL, WeightFormat.INT4_CHANNEL)
"""What Atlas A2 and A3 multiply by int8 rows."""
MICROSCALED = (WeightFormat.FP4_GROUP, WeightFormat.MXFP8, WeightFormat.FP8_BLOCK)
"""What Ascend 950 multiplies by MXFP8 rows; scales of blocks are repeated for groups of 32."""


class GateUp(Enum):
    """Where the gate and up channels of an expert lie among the outputs of its first product."""

    HALVES = "all gates, then all ups"
    INTERLEAVED = "gate and up of a channel side by side"


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """One projection of all experts.

    codes: INT8 [E, K, N] int8 and INT4 [E, K, N/8] int32, both FRACTAL_NZ; MXFP8 [E, K, N] float8_e4m3fn and
    FP4 [E, K/2, N] uint8, both transposed views. scale: INT8 [E, N] float32 or bfloat16; INT4 [E, N] int64,
    the bits of a float32; else [E, K/64, N, 2] uint8. bias: [E, N] float32 for INT4, else None.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    format: WeightFormat


@dataclass(frozen=True, slots=True)
class GroupedExperts:
    """Both products of a layer's experts."""

    gate_up: GroupedWeight
    down: GroupedWeight

    @property
    def num_experts(self) -> int:
        """E."""
        return self.down.codes.shape[0]

    @property
    def activation(self) -> ActivationFormat:
        """What the inputs of both products are quantised to."""
        is_integer = self.down.format in INTEGERS
        return ActivationFormat.INT8_TOKEN if is_integer else ActivationFormat.MXFP8


def prepare_grouped_experts(
    weights: ExpertWeights, *, copy: bool, order: GateUp, formats: tuple[WeightFormat, ...]
) -> GroupedExperts:
    """A layer's experts side by side, copied one expert at a time; `copy` changes nothing.

    The scales of the down projection become bfloat16 where its codes are int8: the grouped product has no
    bfloat16 result with float32 scales (aclnnGroupedMatmulV4, Atlas A2 and A3).
    Raises CheckpointError where a projection is in none of `formats`, or in several.
    """
    pairs = [_gate_and_up(parts) for parts in weights.gate_up]
    gate_up_format = _one_format([part for pair in pairs for part in pair], "gate and up", formats)
    down_format = _one_format(weights.down, "down", formats)
    return GroupedExperts(
        _grouped([_joined(pair, order) for pair in pairs], gate_up_format, int8_scale=torch.float32),
        _grouped([_single(weight) for weight in weights.down], down_format, int8_scale=torch.bfloat16),
    )


Lazy = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class _Rows:
    """One expert's projection: its codes as the file packs them, made when asked for, and its scales."""

    codes: Lazy
    scale: Tensor


def _gate_and_up(parts: tuple[StoredWeight, ...]) -> tuple[StoredWeight, StoredWeight]:
    if len(parts) == 1:
        outputs = parts[0].num_outputs
        return parts[0].rows(0, outputs // 2), parts[0].rows(outputs // 2, outputs)
    gate, up = parts
    return gate, up


def _one_format(
    weights: Iterable[StoredWeight], projection: str, formats: tuple[WeightFormat, ...]
) -> WeightFormat:
    found = {weight.format for weight in weights}
    names = ", ".join(sorted(each.name for each in found))
    taken = ", ".join(each.name for each in formats)
    if found - set(formats):
        raise CheckpointError(
            f"the {projection} projections of a layer's routed experts are stored in {names}; the grouped "
            f"products of this chip take {taken}. Repack for this chip, without --keep for routed experts."
        )
    if len(found) > 1:
        raise CheckpointError(
            f"the {projection} projections of a layer's routed experts are stored in {names}; one grouped "
            "product takes one format. Repack the checkpoint so that a layer's experts are stored alike."
        )
    return found.pop()


def _codes_of(weight: StoredWeight) -> Tensor:
    """Codes in the file's packing; integer codes that were widened to float32 become int8 again."""
    return weight.codes.to(torch.int8) if weight.codes.dtype is torch.float32 else weight.codes


def _scale_of(weight: StoredWeight) -> Tensor:
    """Scales as products see them, one row per output: float32 [N], or bytes [N, G]."""
    assert weight.scale is not None, weight.format
    if weight.is_integer:
        return weight.scale.view(-1)
    if weight.format is WeightFormat.FP8_BLOCK:
        return blocks_to_mx_scale(weight.scale, num_outputs=weight.num_outputs, num_inputs=weight.num_inputs)
    return weight.scale.view(torch.uint8)


def _single(weight: StoredWeight) -> _Rows:
    return _Rows(lambda: _codes_of(weight), _scale_of(weight))


def _joined(pair: tuple[StoredWeight, StoredWeight], order: GateUp) -> _Rows:
    gate, up = pair

    def codes() -> Tensor:
        if order is GateUp.INTERLEAVED and gate.format is WeightFormat.INT4_CHANNEL:
            return interleaved_int4(gate.codes, up.codes)
        return _side_by_side(_codes_of(gate), _codes_of(up), order)

    return _Rows(codes, _side_by_side(_scale_of(gate), _scale_of(up), order))


def _side_by_side(gate: Tensor, up: Tensor, order: GateUp) -> Tensor:
    if order is GateUp.HALVES:
        return torch.cat((gate, up))
    return torch.stack((gate, up), dim=1).flatten(0, 1)


def interleaved_int4(gate_HK: Tensor, up_HK: Tensor) -> Tensor:
    """Pairs of outputs, low nibble first, of two weights as pairs of (gate, up): [2H, K] int8."""
    low_nibble, high_nibble = 15, -16
    even_HK = (gate_HK & low_nibble) | (up_HK << 4)
    odd_HK = ((gate_HK >> 4) & low_nibble) | (up_HK & high_nibble)
    return torch.stack((even_HK, odd_HK), dim=1).flatten(0, 1)


def _grouped(experts: list[_Rows], format: WeightFormat, *, int8_scale: torch.dtype) -> GroupedWeight:
    scale_EN = torch.stack([rows.scale for rows in experts])
    codes = (rows.codes() for rows in experts)
    if format is WeightFormat.INT8_CHANNEL:
        codes_EKN = _stacked((each.t() for each in codes), len(experts))
        return GroupedWeight(to_nz(codes_EKN), scale_EN.to(int8_scale), None, format)
    if format is WeightFormat.INT4_CHANNEL:
        return _grouped_int4(codes, scale_EN.float())
    codes_ENK = _stacked((each.view(torch.uint8) for each in codes), len(experts))
    pairs = mx_scale_pairs(scale_EN)
    if format is WeightFormat.FP4_GROUP:
        return GroupedWeight(input_major_view(_fp4_nz(codes_ENK)), pairs, None, format)
    codes_EKN = input_major_view(codes_ENK.view(torch.float8_e4m3fn))
    return GroupedWeight(codes_EKN, pairs, None, WeightFormat.MXFP8)


def _grouped_int4(codes: Iterable[Tensor], scale_EN: Tensor) -> GroupedWeight:
    """The int4 view comes after the cast to FRACTAL_NZ, which has to see bytes."""
    sums: list[Tensor] = []

    def summed(codes_HK: Tensor) -> Tensor:
        sums.append(unpack_int4(codes_HK).float().sum(1))
        return codes_HK.t()

    codes_EKH = to_nz(_stacked((summed(each) for each in codes), scale_EN.shape[0]))
    bias_EN = torch.stack(sums) * scale_EN * INT4_SHIFT
    bits_EN = scale_EN.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return GroupedWeight(codes_EKH.view(torch.int32), bits_EN, bias_EN, WeightFormat.INT4_CHANNEL)


def _fp4_nz(codes_ENJ: Tensor) -> Tensor:
    cast: Tensor = torch.ops.npu.npu_format_cast(
        codes_ENJ, ACL_FORMAT_NZ, customize_dtype=torch.float8_e4m3fn, input_dtype=FLOAT4_E2M1FN_X2
    )
    return cast


def _stacked(matrices: Iterable[Tensor], num_experts: int) -> Tensor:
    """Contiguous [E, ..] of one expert's matrix after the other."""
    stacked: Tensor | None = None
    for index, matrix in enumerate(matrices):
        if stacked is None:
            stacked = matrix.new_empty(num_experts, *matrix.shape)
        stacked[index].copy_(matrix)
    assert stacked is not None, "a layer without experts"
    return stacked
