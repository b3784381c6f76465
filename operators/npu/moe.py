"""Routing and routed experts on Ascend, best candidate first.

Legend: T tokens, E experts, K experts per token, D hidden, R = T * K rows sorted by expert, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ascend_v4.operators.contract import Limit, Needs, Tolerance, implements
from ascend_v4.operators.contracts.moe import routed_experts
from ascend_v4.operators.contracts.quantize import ActivationFormat, WeightFormat
from ascend_v4.operators.npu.constants import (
    A2_A3,
    CANN_RECIPES,
    ONLY_950,
    RECIPES_MODULE,
    TORCH_NPU,
    TORCH_NPU_MODULE,
    VLLM_ASCEND,
    VLLM_MODULE,
)
from ascend_v4.operators.npu.experts_products import (
    CLAMPED,
    GROUP_COUNTS,
    PLAIN_GLU,
    QuantizedRows,
    dequant_swiglu,
    grouped_product,
    mx_swiglu_rows,
    run_experts,
)
from ascend_v4.operators.npu.experts_weights import (
    INTEGERS,
    MICROSCALED,
    GateUp,
    GroupedWeight,
    prepare_grouped_experts,
)

AROUND = (
    "npu::npu_format_cast",
    "npu::npu_moe_init_routing_v2",
    "npu::npu_grouped_matmul",
    "npu::npu_moe_token_unpermute",
)
AROUND_MX = (*AROUND, "npu::npu_dynamic_mx_quant")

GROUPED_MATMUL = (
    Limit(size="experts", high=1024, source="aclnnGroupedMatmulV4: at most 1024 groups"),
    Limit(size="hidden", multiple=64, source="FRACTAL_NZ of int4 and pairs of MX scales"),
    Limit(size="intermediate", multiple=64, source="npu_dequant_swiglu_quant; pairs of MX scales"),
)
DEQUANT_SWIGLU = Limit(size="intermediate", high=10496, source="npu_dequant_swiglu_quant")
CLAMP_QUANT = Limit(size="intermediate", high=5120, source="custom.npu_dequant_swiglu_clamp_quant")
FUSED_SWIGLU = Limit(size="intermediate", high=5120, source="grouped_matmul_swiglu_quant: N <= 10240")
GROUP_QUANT = Limit(size="intermediate", multiple=128, source="npu_swiglu_group_quant: last axis % 256")

INT8_FLIPS = Tolerance(128, "as the contract, and int8 codes of hidden rows that tip over to the next")
UNROUNDED = (
    "these kernels keep float32 from the first product to the codes of the hidden rows, where the contract "
    "rounds twice to bfloat16; and the scales of the down projection are bfloat16"
)
ROUNDED_UP = Tolerance(512, "as the contract, and hidden rows whose scales are twice as large")
UNCUT = (
    "the kernel rounds scales up, as the release does, where the contract's OCP rule rounds down and cuts "
    "what is beyond 448 (examples/test_npu_swiglu_group_quant.py); and it quantises from float32"
)


@implements(
    routed_experts,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(
        module=VLLM_MODULE,
        torch_operators=(
            "_C_ascend::grouped_matmul_swiglu_quant_weight_nz",
            "_C_ascend::grouped_matmul_swiglu_quant_v2",
            *AROUND,
        ),
        chips=A2_A3,
    ),
    limits=(*GROUPED_MATMUL, FUSED_SWIGLU),
    prepare=partial(prepare_grouped_experts, order=GateUp.HALVES, formats=INTEGERS),
    tolerance=INT8_FLIPS,
    because=UNROUNDED,
    capturable=True,
)
def integer_experts_fused(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    experts: object,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
) -> Tensor:
    """First product, activation and quantisation in one kernel; W8A8 and W4A8."""
    return run_experts(
        x_TD,
        weights_TK,
        expert_ids_TK,
        experts,
        swiglu_limit=swiglu_limit,
        activation=activation,
        activate=_fused_swiglu,
    )


def _fused_swiglu(
    rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight, *, limit: float
) -> QuantizedRows:
    """A limit of 0 switches the clamp off; the configuration has a positive one."""
    if weight.format is WeightFormat.INT8_CHANNEL:
        # this kernel alone reads running totals instead of counts
        codes, scale_R, _ = torch.ops._C_ascend.grouped_matmul_swiglu_quant_weight_nz(
            rows.codes,
            weight.codes,
            weight.scale,
            rows.scale,
            counts_E.cumsum(0),
            bias=None,
            offset=None,
            swiglu_limit=limit,
        )
        return QuantizedRows(codes, scale_R)
    codes, scale_R = torch.ops._C_ascend.grouped_matmul_swiglu_quant_v2(
        rows.codes,
        [weight.codes],
        [weight.scale],
        rows.scale,
        counts_E,
        weight_assist_matrix=[weight.bias],
        dequant_mode=0,
        group_list_type=GROUP_COUNTS,
        swiglu_limit=limit,
    )
    return QuantizedRows(codes, scale_R)


@implements(
    routed_experts,
    backend="npu",
    provider=CANN_RECIPES,
    needs=Needs(
        module=RECIPES_MODULE,
        torch_operators=("custom::npu_dequant_swiglu_clamp_quant", *AROUND),
        chips=A2_A3,
    ),
    limits=(*GROUPED_MATMUL, CLAMP_QUANT),
    prepare=partial(prepare_grouped_experts, order=GateUp.HALVES, formats=INTEGERS),
    tolerance=INT8_FLIPS,
    because=UNROUNDED,
    capturable=True,
)
def integer_experts_clamp_quant(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    experts: object,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
) -> Tensor:
    """Gates in the first half of the outputs: in this operator a limit does not mean interleaving."""
    return run_experts(
        x_TD,
        weights_TK,
        expert_ids_TK,
        experts,
        swiglu_limit=swiglu_limit,
        activation=activation,
        activate=_clamp_quant,
    )


def _clamp_quant(
    rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight, *, limit: float
) -> QuantizedRows:
    call = torch.ops.custom.npu_dequant_swiglu_clamp_quant
    return dequant_swiglu(call, rows, counts_E, weight, limit=limit)


@implements(
    routed_experts,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(
        module=TORCH_NPU_MODULE,
        torch_operators=("npu::npu_dequant_swiglu_quant", *AROUND),
        chips=A2_A3,
    ),
    limits=(*GROUPED_MATMUL, DEQUANT_SWIGLU),
    prepare=partial(prepare_grouped_experts, order=GateUp.INTERLEAVED, formats=INTEGERS),
    tolerance=INT8_FLIPS,
    because=UNROUNDED,
    capturable=True,
)
def integer_experts_composed(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    experts: object,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
) -> Tensor:
    """With a limit, torch_npu's operator takes the gates from the even outputs; its binding refuses the mode
    that would take halves.
    """
    return run_experts(
        x_TD,
        weights_TK,
        expert_ids_TK,
        experts,
        swiglu_limit=swiglu_limit,
        activation=activation,
        activate=_dequant_swiglu_quant,
    )


def _dequant_swiglu_quant(
    rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight, *, limit: float
) -> QuantizedRows:
    return dequant_swiglu(torch.ops.npu.npu_dequant_swiglu_quant, rows, counts_E, weight, limit=limit)


@implements(
    routed_experts,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(
        module=VLLM_MODULE,
        torch_operators=("_C_ascend::npu_swiglu_group_quant", *AROUND_MX),
        chips=ONLY_950,
    ),
    limits=(*GROUPED_MATMUL, GROUP_QUANT),
    prepare=partial(prepare_grouped_experts, order=GateUp.HALVES, formats=MICROSCALED),
    capturable=True,
)
def mx_experts_vllm(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    experts: object,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
) -> Tensor:
    """MXFP8 activations with FP4 or MXFP8 weights; quant_mode 2 is MX in this package."""
    return run_experts(
        x_TD,
        weights_TK,
        expert_ids_TK,
        experts,
        swiglu_limit=swiglu_limit,
        activation=activation,
        activate=_group_quant_vllm,
    )


def _group_quant_vllm(
    rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight, *, limit: float
) -> QuantizedRows:
    codes, scale, _ = torch.ops._C_ascend.npu_swiglu_group_quant(
        grouped_product(rows, counts_E, weight),
        None,
        counts_E,
        dst_type=torch.float8_e4m3fn,
        quant_mode=2,
        clamp_value=limit,
    )
    return mx_swiglu_rows(codes, scale)


@implements(
    routed_experts,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(
        module=TORCH_NPU_MODULE,
        torch_operators=("npu::npu_swiglu_mx_quant", *AROUND_MX),
        chips=ONLY_950,
    ),
    limits=GROUPED_MATMUL,
    prepare=partial(prepare_grouped_experts, order=GateUp.INTERLEAVED, formats=MICROSCALED),
    capturable=True,
)
def mx_experts_composed(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    experts: object,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
) -> Tensor:
    """Gates in the even outputs, as with torch_npu's operator for integers."""
    return run_experts(
        x_TD,
        weights_TK,
        expert_ids_TK,
        experts,
        swiglu_limit=swiglu_limit,
        activation=activation,
        activate=_swiglu_mx_quant,
    )


def _swiglu_mx_quant(
    rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight, *, limit: float
) -> QuantizedRows:
    """Without groups: there may be 256 at most, Pro has 384 experts, and no row is left over anyway."""
    codes, scale = torch.ops.npu.npu_swiglu_mx_quant(
        grouped_product(rows, counts_E, weight),
        group_index=None,
        activate_dim=-1,
        activate_left=True,
        swiglu_mode=CLAMPED,
        clamp_limit=limit,
        **PLAIN_GLU,
        group_mode=0,
        axis=-1,
        dst_type=torch.float8_e4m3fn,
        round_mode="rint",
        scale_alg=0,
    )
    return mx_swiglu_rows(codes, scale)


@implements(
    routed_experts,
    backend="npu",
    provider=CANN_RECIPES,
    needs=Needs(
        module=RECIPES_MODULE,
        torch_operators=("custom::npu_swiglu_group_quant", *AROUND_MX),
        chips=ONLY_950,
    ),
    limits=(*GROUPED_MATMUL, GROUP_QUANT),
    prepare=partial(prepare_grouped_experts, order=GateUp.HALVES, formats=MICROSCALED),
    tolerance=ROUNDED_UP,
    because=UNCUT,
    capturable=True,
)
def mx_experts_recipes(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    experts: object,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
) -> Tensor:
    """quant_mode 1 is MX in this package, with scales rounded up and no other way: hence behind torch_npu,
    whose scales are those of the pack's numerics.
    """
    return run_experts(
        x_TD,
        weights_TK,
        expert_ids_TK,
        experts,
        swiglu_limit=swiglu_limit,
        activation=activation,
        activate=_group_quant_recipes,
    )


def _group_quant_recipes(
    rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight, *, limit: float
) -> QuantizedRows:
    codes, scale, _ = torch.ops.custom.npu_swiglu_group_quant(
        grouped_product(rows, counts_E, weight),
        weight=None,
        group_index=counts_E,
        dst_type=torch.float8_e4m3fn,
        quant_mode=1,
        block_size=32,
        round_scale=True,
        clamp_limit=limit,
        output_origin=False,
    )
    return mx_swiglu_rows(codes, scale)
