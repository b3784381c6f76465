"""Simulated grouped products fused with SwiGLU and quantisation of the result.

torch_npu's own have no clamp; vLLM-Ascend's copies clamp where swiglu_limit is positive. Group lists are
cumulative unless the second version is told otherwise. Sources: aclnnGroupedMatmulSwigluQuant (V1, V2 and
WeightNz) in ops-transformer, csrc/gmm and the operator tests of vLLM-Ascend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.simulator.dtypes import dtype_of
from ascend_v4.operators.simulator.elements import FP8, MX_PAIR, mx_quantize, scale_pairs
from ascend_v4.operators.simulator.expert_activation import gated
from ascend_v4.operators.simulator.formats import is_nz, to_nd
from ascend_v4.operators.simulator.grouped_matmul import (
    CUMULATIVE,
    Group,
    GroupedCall,
    groups_of,
    int4_rows,
    mx_product,
    require_operands,
)
from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.matmul import integer_matmul, require_shape
from ascend_v4.operators.simulator.quantize import HALVES, quantize_rows, require_absent
from ascend_v4.operators.simulator.state import SimulatedChip, require, undefined

INT4_INNER_LIMIT = 20000
WIDTH_LIMIT = 10240
SCALE_TYPES = (torch.float32, *HALVES)
MX_MODE = 2


def _meta(sim: SimulatedChip, *, x: Tensor, weight_scale: Tensor, **_: object) -> tuple[Tensor, ...]:
    return (
        x.new_empty((x.shape[0], weight_scale.shape[-1] // 2), dtype=torch.int8),
        x.new_empty((x.shape[0],), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
    )


def _list_meta(
    sim: SimulatedChip, *, x: Tensor, weight_scale: Sequence[Tensor], **rest: object
) -> tuple[Tensor, ...]:
    return _meta(sim, x=x, weight_scale=weight_scale[0])


def fused_rows(
    call: GroupedCall, groups: list[Group], *, limit: float, nd_int4: bool = False
) -> tuple[Tensor, Tensor]:
    """int8 [M, N/2] and float32 scales [M] of SwiGLU of the product; a limit of 0 means no clamp.

    Weights are FRACTAL_NZ, but for int4 ones where nd_int4 is set.
    """
    name = call.name
    require_operands(call)
    require(
        call.x.dtype is torch.int8 and call.weights[0].dtype in (torch.int8, torch.int32),
        name,
        f"x is {call.x.dtype} and weights {call.weights[0].dtype}; int8 with int8 or int4 is simulated",
    )
    require(
        all(is_nz(weight) or (nd_int4 and weight.dtype is torch.int32) for weight in call.weights),
        name,
        "weights must be FRACTAL_NZ: npu_format_cast(weight, 29) before the call",
    )
    require(call.width <= WIDTH_LIMIT, name, f"N is {call.width}, at most {WIDTH_LIMIT} is taken")
    if call.weights[0].dtype is torch.int32:
        require(
            call.x.shape[1] < INT4_INNER_LIMIT, name, f"K is {call.x.shape[1]}, want < {INT4_INNER_LIMIT}"
        )
        scale = call.only("weight_scale", call.scale)
        require(
            scale is not None and scale.dtype is torch.int64,
            name,
            "int4 weights need weight_scale as int64, float32 bits widened",
        )
        assert scale is not None
        product = int4_rows(call, groups, scale=scale if scale.dim() == 3 else scale.unsqueeze(1))
    else:
        product = _int8_rows(call, groups)
    codes = undefined(call.x.shape[0], call.width // 2, dtype=torch.int8)
    scales = undefined(call.x.shape[0], dtype=torch.float32)
    for group in groups:
        rows = slice(group.start, group.end)
        gate, up = product[rows].chunk(2, dim=-1)
        codes[rows], scales[rows] = quantize_rows(gated(gate, up, limit=limit if limit > 0 else None))
    return codes, scales


def _int8_rows(call: GroupedCall, groups: list[Group]) -> Tensor:
    name = call.name
    require_absent(name, bias=call.bias)
    scales = call.table("weight_scale", call.scale, call.width)
    per_token = call.only("x_scale", call.per_token_scale)
    require(scales is not None and per_token is not None, name, "weight_scale and x_scale are needed")
    assert scales is not None
    assert per_token is not None
    require(scales[0].dtype in SCALE_TYPES, name, f"weight_scale is {scales[0].dtype}, want a float type")
    require_shape(name, "x_scale", per_token, (call.x.shape[0],))
    require(per_token.dtype is torch.float32, name, f"x_scale must be float32, is {per_token.dtype}")
    stacked = to_nd(call.weights[0], name) if call.stacked else None
    result = undefined(call.x.shape[0], call.width, dtype=torch.float32)
    for group in groups:
        rows = slice(group.start, group.end)
        matrix = stacked[group.index] if stacked is not None else to_nd(call.weights[group.index], name)
        total = integer_matmul(call.x[rows], matrix).float()
        result[rows] = total * scales[group.index].float() * per_token[rows].unsqueeze(-1)
    return result


def _first_version(
    sim: SimulatedChip,
    name: str,
    *,
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    bias: Tensor | None,
    offset: Tensor | None,
    swiglu_limit: float = 0.0,
    nd_int4: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    require_absent(name, offset=offset)
    require(swiglu_limit >= 0, name, f"swiglu_limit is {swiglu_limit}; 0 switches the clamp off")
    call = GroupedCall(
        name=name,
        sim=sim,
        x=x,
        weights=weight,
        bias=None if bias is None else [bias],
        scale=weight_scale,
        per_token_scale=[x_scale],
    )
    groups = groups_of(name, group_list, CUMULATIVE, num_rows=x.shape[0], num_groups=call.num_groups)
    codes, scales = fused_rows(call, groups, limit=swiglu_limit, nd_int4=nd_int4)
    return codes, scales, undefined(dtype=torch.float32)


@kernel("npu::npu_grouped_matmul_swiglu_quant", meta=_meta, chips=A2_A3)
def npu_grouped_matmul_swiglu_quant(
    sim: SimulatedChip,
    *,
    weight: Tensor,
    weight_scale: Tensor,
    **rest: Any,  # noqa: ANN401 -- passed on by name
) -> tuple[Tensor, Tensor, Tensor]:
    """torch_npu's: NZ weights [E, K, N], cumulative groups, no clamp."""
    return _first_version(
        sim, "npu_grouped_matmul_swiglu_quant", weight=[weight], weight_scale=[weight_scale], **rest
    )


@kernel("_C_ascend::grouped_matmul_swiglu_quant", meta=_meta, chips=A2_A3)
def grouped_matmul_swiglu_quant(
    sim: SimulatedChip,
    *,
    weight: Tensor,
    weight_scale: Tensor,
    **rest: Any,  # noqa: ANN401 -- passed on by name
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM-Ascend's, with a clamp; int4 weights, NZ or not, take their 8 * sum(w * scale) as bias."""
    return _first_version(
        sim,
        "grouped_matmul_swiglu_quant",
        weight=[weight],
        weight_scale=[weight_scale],
        nd_int4=True,
        **rest,
    )


@kernel("_C_ascend::grouped_matmul_swiglu_quant_weight_nz", meta=_meta, chips=A2_A3)
def grouped_matmul_swiglu_quant_weight_nz(
    sim: SimulatedChip,
    *,
    weight: Tensor,
    weight_scale: Tensor,
    **rest: Any,  # noqa: ANN401 -- passed on by name
) -> tuple[Tensor, Tensor, Tensor]:
    """The same under the name that binds weights as NZ."""
    return _first_version(
        sim, "grouped_matmul_swiglu_quant_weight_nz", weight=[weight], weight_scale=[weight_scale], **rest
    )


@kernel("_C_ascend::grouped_matmul_swiglu_quant_weight_nz_tensor_list", meta=_list_meta, chips=A2_A3)
def grouped_matmul_swiglu_quant_weight_nz_tensor_list(
    sim: SimulatedChip,
    *,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    **rest: Any,  # noqa: ANN401 -- passed on by name
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with one weight [K, N] and one scale [N] per expert."""
    return _first_version(
        sim,
        "grouped_matmul_swiglu_quant_weight_nz_tensor_list",
        weight=weight,
        weight_scale=weight_scale,
        **rest,
    )


def _vllm_second_meta(
    sim: SimulatedChip, *, x: Tensor, weight_scale: Sequence[Tensor], **_: object
) -> tuple[Tensor, Tensor]:
    codes, scales, _offset = _meta(sim, x=x, weight_scale=weight_scale[0])
    return codes, scales


def _second_version(
    sim: SimulatedChip,
    name: str,
    *,
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    weight_assist_matrix: Sequence[Tensor] | None,
    group_list_type: int | None,
    limit: float,
) -> tuple[Tensor, Tensor]:
    require(len(weight) == 1, name, f"weight has {len(weight)} tensors; one [E, K, N] is simulated")
    assert group_list_type is not None
    call = GroupedCall(
        name=name,
        sim=sim,
        x=x,
        weights=weight,
        bias=weight_assist_matrix,
        scale=weight_scale,
        per_token_scale=[x_scale],
        group_list_type=group_list_type,
    )
    groups = groups_of(name, group_list, group_list_type, num_rows=x.shape[0], num_groups=call.num_groups)
    return fused_rows(call, groups, limit=limit)


@kernel("_C_ascend::grouped_matmul_swiglu_quant_v2", meta=_vllm_second_meta, chips=A2_A3)
def grouped_matmul_swiglu_quant_v2(
    sim: SimulatedChip,
    *,
    smooth_scale: Tensor | None,
    bias: Tensor | None,
    dequant_mode: int | None,
    dequant_dtype: int | None,
    quant_mode: int | None,
    quant_dtype: int | None,
    transpose_weight: bool,
    tuning_config: Sequence[int] | None,
    swiglu_limit: float,
    **rest: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor]:
    """vLLM-Ascend's second version: int8 or packed int4 weights, the latter with weight_assist_matrix."""
    name = "grouped_matmul_swiglu_quant_v2"
    require_absent(name, smooth_scale=smooth_scale, bias=bias)
    require(dequant_mode == 0 and quant_mode == 0, name, "dequant_mode and quant_mode 0 are simulated")
    require(not dequant_dtype and not quant_dtype, name, "dequant_dtype and quant_dtype are not simulated")
    require(not transpose_weight, name, "transpose_weight is not simulated")
    require(swiglu_limit >= 0, name, f"swiglu_limit is {swiglu_limit}; 0 switches the clamp off")
    return _second_version(sim, name, limit=swiglu_limit, **rest)


def _torch_npu_second_meta(
    sim: SimulatedChip,
    *,
    x: Tensor,
    weight_scale: Sequence[Tensor],
    dequant_mode: int | None,
    quant_dtype: int | None,
    **_: object,
) -> tuple[Tensor, Tensor]:
    if dequant_mode != MX_MODE:
        codes, scales, _offset = _meta(sim, x=x, weight_scale=weight_scale[0])
        return codes, scales
    width = weight_scale[0].shape[2] // 2
    assert quant_dtype is not None
    return (
        x.new_empty((x.shape[0], width), dtype=dtype_of(quant_dtype, "npu_grouped_matmul_swiglu_quant_v2")),
        x.new_empty((x.shape[0], -(-width // MX_PAIR), 2), dtype=torch.uint8),
    )


@kernel("npu::npu_grouped_matmul_swiglu_quant_v2", meta=_torch_npu_second_meta)
def npu_grouped_matmul_swiglu_quant_v2(
    sim: SimulatedChip,
    *,
    x: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    x_scale: Tensor,
    group_list: Tensor,
    smooth_scale: Tensor | None,
    weight_assist_matrix: Sequence[Tensor] | None,
    bias: Tensor | None,
    dequant_mode: int | None,
    dequant_dtype: int | None,
    quant_mode: int | None,
    quant_dtype: int | None,
    group_list_type: int | None,
    tuning_config: Sequence[int] | None,
    x_dtype: int | None,
    weight_dtype: int | None,
    weight_scale_dtype: int | None,
    x_scale_dtype: int | None,
) -> tuple[Tensor, Tensor]:
    """torch_npu's second version, without a clamp: integers on A2 and A3, MX (both modes 2) on Ascend 950."""
    name = "npu_grouped_matmul_swiglu_quant_v2"
    require_absent(name, smooth_scale=smooth_scale, bias=bias, x_dtype=x_dtype, weight_dtype=weight_dtype)
    assert group_list_type is not None
    if not sim.is_950:
        require(dequant_mode == 0 and quant_mode == 0, name, "A2 and A3 take dequant_mode and quant_mode 0")
        require_absent(name, weight_scale_dtype=weight_scale_dtype, x_scale_dtype=x_scale_dtype)
        return _second_version(
            sim,
            name,
            x=x,
            weight=weight,
            weight_scale=weight_scale,
            x_scale=x_scale,
            group_list=group_list,
            weight_assist_matrix=weight_assist_matrix,
            group_list_type=group_list_type,
            limit=0.0,
        )
    require(
        dequant_mode == quant_mode == MX_MODE, name, "MX, dequant_mode and quant_mode 2, is simulated on 950"
    )
    require_absent(name, weight_assist_matrix=weight_assist_matrix)
    assert quant_dtype is not None
    kind = dtype_of(quant_dtype, name)
    require(kind in FP8, name, f"quant_dtype is {kind}, FP8 is simulated")
    call = GroupedCall(
        name=name,
        sim=sim,
        x=x,
        weights=weight,
        scale=weight_scale,
        per_token_scale=[x_scale],
        output_dtype=torch.float32,
        scale_dtype=weight_scale_dtype,
        per_token_scale_dtype=x_scale_dtype,
    )
    require_operands(call)
    groups = groups_of(name, group_list, group_list_type, num_rows=x.shape[0], num_groups=call.num_groups)
    product = mx_product(call, groups)
    codes = undefined(x.shape[0], call.width // 2, dtype=kind)
    pairs = undefined(x.shape[0], -(-call.width // (2 * MX_PAIR)), 2, dtype=torch.uint8)
    for group in groups:
        rows = slice(group.start, group.end)
        gate, up = product[rows].chunk(2, dim=-1)
        quantized, exponents = mx_quantize(gated(gate, up, limit=None), kind)
        codes[rows], pairs[rows] = quantized, scale_pairs(exponents)
    return codes, pairs
