"""Linear layers: int8 products on A2 and A3, MXFP8 products on 950, plain products everywhere.

Legend: T tokens, K inputs, N outputs, P pairs of 32 inputs, G groups of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.errors import ContractError
from ascend_v4.operators.contract import Limit, Needs, implements
from ascend_v4.operators.contracts.linear import float32_linear, linear
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight, WeightFormat
from ascend_v4.operators.npu.constants import (
    A2_A3,
    ATEN,
    FLOAT8_E8M0FNU,
    MATMUL_AXIS_LIMIT,
    ONLY_950,
    TORCH_NPU,
    TORCH_NPU_MODULE,
)
from ascend_v4.operators.npu.formats import (
    blocks_to_mx_scale,
    input_major,
    input_major_view,
    mx_scale_pairs,
    to_nz,
)

AXIS_DOC = "npu_quant_matmul: the last axis of an operand is at most 65535"
AXIS_LIMITS = tuple(
    Limit(size=size, high=MATMUL_AXIS_LIMIT, source=AXIS_DOC) for size in ("hidden", "q_lora", "intermediate")
)
"""Inputs of the layers. Outputs beyond the limit are split instead."""

OUTPUT_SPLIT = 32768
"""Outputs per product where all of them are too many: whole tiles of every format."""


@dataclass(frozen=True, slots=True)
class PlainWeight:
    """A weight that is multiplied as it is, [N, K]."""

    matrix: Tensor


@dataclass(frozen=True, slots=True)
class Int8Part:
    """A run of outputs: codes [K, N] int8, in FRACTAL_NZ where sizes allow, and scales [N] float32."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """An int8 weight in runs of outputs that the product's axis limit allows."""

    parts: tuple[Int8Part, ...]


@dataclass(frozen=True, slots=True)
class MxWeight:
    """E4M3 codes [K, N], a transposed view, and their scale bytes [P, N, 2]."""

    codes: Tensor
    scale: Tensor


def prepare_int8(weight: StoredWeight, *, copy: bool) -> PlainWeight | Int8Weight:
    """The layout of A2 and A3. `copy` does not matter here.

    INT4 weights are widened to int8: no product of torch_npu takes int4 weights with int8 inputs outside of
    grouped products.
    Raises ContractError for formats that the chips do not compute and for too many inputs.
    """
    if weight.format is WeightFormat.PLAIN:
        return PlainWeight(weight.codes)
    if not weight.is_integer:
        raise ContractError(
            f"a linear weight in {weight.format.value}: A2 and A3 multiply plain, int8 and int4 ones. "
            "Repack the checkpoint with --to w8a8 or w4a8."
        )
    if weight.num_inputs > MATMUL_AXIS_LIMIT:
        raise ContractError(
            f"a linear weight has {weight.num_inputs} inputs; npu_quant_matmul takes at most "
            f"{MATMUL_AXIS_LIMIT}. Split the layer over ranks."
        )
    assert weight.scale is not None, weight.format
    codes_NK = weight.codes
    if weight.format is WeightFormat.INT4_CHANNEL:
        codes_NK = weight.whole_numbers().to(torch.int8)
    run = weight.num_outputs if weight.num_outputs <= MATMUL_AXIS_LIMIT else OUTPUT_SPLIT
    scale_N = weight.scale.float().reshape(-1)
    parts = [
        Int8Part(to_nz(input_major(codes_NK[low : low + run])), scale_N[low : low + run].contiguous())
        for low in range(0, weight.num_outputs, run)
    ]
    return Int8Weight(tuple(parts))


def prepare_mx(weight: StoredWeight, *, copy: bool) -> PlainWeight | MxWeight:
    """The layout of 950. `copy` does not matter here.

    Block scales are repeated and FP4 codes widened to the E4M3 codes of the same numbers: neither changes a
    value. Raises ContractError for formats that the chip is not given.
    """
    if weight.format is WeightFormat.PLAIN:
        return PlainWeight(weight.codes)
    codes_NK, scale_NG = mx_codes(weight)
    return MxWeight(input_major_view(codes_NK), mx_scale_pairs(scale_NG))


def mx_codes(weight: StoredWeight) -> tuple[Tensor, Tensor]:
    """E4M3 codes [N, K], contiguous, and one scale byte per output and 32 inputs, [N, K / 32].

    Raises ContractError for integer weights.
    """
    if weight.is_integer:
        raise ContractError(
            f"a weight in {weight.format.value}: 950 multiplies plain, FP8 and FP4 ones. Repack the "
            "checkpoint with --to mx, or load the official files."
        )
    assert weight.scale is not None, weight.format
    if weight.format is WeightFormat.FP8_BLOCK:
        scale_NG = blocks_to_mx_scale(
            weight.scale, num_outputs=weight.num_outputs, num_inputs=weight.num_inputs
        )
        return weight.codes.contiguous(), scale_NG
    if weight.format is WeightFormat.FP4_GROUP:
        unit = torch.full_like(weight.scale.view(torch.uint8), 127)
        codes_NK = StoredWeight(weight.codes, unit, WeightFormat.FP4_GROUP).to_float32()
        return codes_NK.to(torch.float8_e4m3fn), weight.scale.view(torch.uint8)
    return weight.codes.contiguous(), weight.scale.view(torch.uint8)


def mx_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of x's shape and scale bytes [.., P, 2], one per 32 inputs by the OCP rule."""
    codes, scale = torch.ops.npu.npu_dynamic_mx_quant(
        x, axis=-1, round_mode="rint", dst_type=torch.float8_e4m3fn, block_size=32, scale_alg=0
    )
    return codes, scale


def plain_product(x_TK: Tensor, matrix_NK: Tensor) -> Tensor:
    """x times matrix transposed in x's dtype; a float32 matrix is multiplied in float32."""
    if x_TK.dtype is matrix_NK.dtype:
        return functional.linear(x_TK, matrix_NK)
    return functional.linear(x_TK.float(), matrix_NK.float()).to(x_TK.dtype)


@implements(
    linear,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(
        module=TORCH_NPU_MODULE,
        torch_operators=("npu::npu_dynamic_quant", "npu::npu_quant_matmul", "npu::npu_format_cast"),
        chips=A2_A3,
    ),
    limits=AXIS_LIMITS,
    prepare=prepare_int8,
    capturable=True,
)
def linear_int8(x_TK: Tensor, weight: StoredWeight, *, activation: ActivationFormat) -> Tensor:
    """Inputs to int8 per token, then whole-number products, scaled by output and by token.

    A row of zeros has scale 0, so that its result is 0 whatever its codes are.
    """
    prepared = cast("PlainWeight | Int8Weight", weight)
    if isinstance(prepared, PlainWeight):
        assert activation is ActivationFormat.NONE, activation
        return plain_product(x_TK, prepared.matrix)
    assert activation is ActivationFormat.INT8_TOKEN, activation
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, sum(len(part.scale) for part in prepared.parts))
    codes_TK, scale_T = torch.ops.npu.npu_dynamic_quant(x_TK, dst_type=torch.int8, quant_mode="pertoken")
    outputs: list[Tensor] = [
        torch.ops.npu.npu_quant_matmul(
            codes_TK,
            part.codes,
            part.scale,
            pertoken_scale=scale_T,
            output_dtype=x_TK.dtype,
        )
        for part in prepared.parts
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@implements(
    linear,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(
        module=TORCH_NPU_MODULE,
        torch_operators=("npu::npu_dynamic_mx_quant", "npu::npu_quant_matmul"),
        chips=ONLY_950,
    ),
    prepare=prepare_mx,
    capturable=True,
)
def linear_mx(x_TK: Tensor, weight: StoredWeight, *, activation: ActivationFormat) -> Tensor:
    """Inputs to E4M3 in groups of 32, then products of scaled groups."""
    prepared = cast("PlainWeight | MxWeight", weight)
    if isinstance(prepared, PlainWeight):
        assert activation is ActivationFormat.NONE, activation
        return plain_product(x_TK, prepared.matrix)
    assert activation is ActivationFormat.MXFP8, activation
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, prepared.codes.shape[1])
    codes_TK, scale_TP2 = mx_inputs(x_TK)
    out_TN: Tensor = torch.ops.npu.npu_quant_matmul(
        codes_TK,
        prepared.codes,
        prepared.scale,
        pertoken_scale=scale_TP2,
        output_dtype=x_TK.dtype,
        pertoken_scale_dtype=FLOAT8_E8M0FNU,
        scale_dtype=FLOAT8_E8M0FNU,
        group_sizes=[1, 1, 32],
    )
    return out_TN


@dataclass(frozen=True, slots=True)
class WideWeight:
    """A weight whose product is float32: [K, N] bfloat16 where `is_fused`, else [N, K] float32."""

    matrix: Tensor
    is_fused: bool


def prepare_wide(weight: StoredWeight, *, copy: bool) -> WideWeight:
    """Float32: the chips' products of bfloat16 round their result. `copy` does not matter here."""
    return WideWeight(weight.to_float32(), is_fused=False)


def prepare_fused(weight: StoredWeight, *, copy: bool) -> WideWeight:
    """Bfloat16 weights input-major, others in float32. `copy` does not matter here."""
    if weight.format is WeightFormat.PLAIN and weight.codes.dtype is torch.bfloat16:
        return WideWeight(input_major(weight.codes), is_fused=True)
    return prepare_wide(weight, copy=copy)


@implements(
    float32_linear,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(
        module=TORCH_NPU_MODULE,
        torch_operators=("npu::npu_fused_matmul",),
        chips=ONLY_950,
    ),
    prepare=prepare_fused,
    capturable=True,
)
def float32_linear_fused(x_TK: Tensor, weight: StoredWeight) -> Tensor:
    """Bfloat16 operands, float32 sums and result, without a float32 copy of the weight."""
    prepared = cast("WideWeight", weight)
    if not prepared.is_fused or x_TK.dtype is not torch.bfloat16:
        return _float32_product(x_TK, prepared)
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, prepared.matrix.shape[1], dtype=torch.float32)
    out_TN: Tensor = torch.ops.npu.npu_fused_matmul(x_TK, prepared.matrix, fused_op_type="16cast32")
    return out_TN


@implements(float32_linear, backend="npu", provider=ATEN, prepare=prepare_wide, capturable=True)
def float32_linear_plain(x_TK: Tensor, weight: StoredWeight) -> Tensor:
    """A float32 product of a float32 copy of the weight."""
    return _float32_product(x_TK, cast("WideWeight", weight))


def _float32_product(x_TK: Tensor, weight: WideWeight) -> Tensor:
    if weight.is_fused:
        return x_TK.float() @ weight.matrix.float()
    return functional.linear(x_TK.float(), weight.matrix)
