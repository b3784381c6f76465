"""Rows of experts on Ascend: sorting, grouped products, the clamped SwiGLU between them, the weighted sum.

Legend: T tokens, K experts per token, R = T * K rows sorted by expert, E experts, D hidden, N outputs, G
groups of 32 channels. Every row belongs to an expert of this device: no row of a result is left over.
Source: ascend-operators.md 12, 13 and 19.4; torch_npu's and the CANN operators' own pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ascend_v4.errors import ContractError
from ascend_v4.operators.contracts.quantize import ActivationFormat, WeightFormat
from ascend_v4.operators.npu.constants import FLOAT4_E2M1FN_X2, FLOAT8_E8M0FNU
from ascend_v4.operators.npu.experts_weights import GroupedExperts, GroupedWeight

GROUP_COUNTS = 1
"""group_list_type of npu_grouped_matmul and [V] grouped_matmul_swiglu_quant_v2: rows per expert."""
GROUP_ROWS = 0
"""group_type: the rows are divided among the experts."""
ONE_OUTPUT = 2
"""split_item: the results of all experts in one tensor."""
COUNTS = 1
"""expert_tokens_num_type: rows per expert. The default is another."""
NOT_QUANTIZED, INT8_DYNAMIC = -1, 1
"""quant_mode of npu_moe_init_routing_v2."""
POSITION_OF_PAIR = 0
"""row_idx_type: for each token and choice, its row."""
CLAMPED = 1
"""swiglu_mode with a limit: interleaved in torch_npu's operators, halves in the vendor packages' own."""
DYNAMIC = 1
"""quant_mode of the dequantise-SwiGLU-quantise operators: a scale per row."""
PLAIN_GLU = {"glu_alpha": 1.0, "glu_bias": 0.0}
"""The defaults are those of another model: 1.702 and 1."""


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Rows [R, K] and their scales: int8 with float32 [R], float8_e4m3fn with bytes [R, K/64, 2]."""

    codes: Tensor
    scale: Tensor


class Activate(Protocol):
    """The first product and the activation: rows of the down projection, quantised."""

    def __call__(
        self, rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight, *, limit: float
    ) -> QuantizedRows:
        """Of rows sorted by expert."""


def run_experts(
    x_TD: Tensor,
    weights_TK: Tensor,
    expert_ids_TK: Tensor,
    experts: object,
    *,
    swiglu_limit: float,
    activation: ActivationFormat,
    activate: Activate,
) -> Tensor:
    """Sum over each token's experts, [T, D] float32. `experts` is what `prepare_grouped_experts` made.

    The routing weight multiplies the result of the down projection, once. Both are float32 there, so that
    the sum is rounded once.
    Raises ContractError for inputs that are not bfloat16.
    """
    assert isinstance(experts, GroupedExperts), type(experts)
    assert activation is experts.activation, (activation, experts.activation)
    if x_TD.dtype is not torch.bfloat16:
        raise ContractError(
            f"routed_experts on npu: x has dtype {x_TD.dtype}, the vendors' operators take torch.bfloat16. "
            "Run the model in bfloat16."
        )
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    rows, counts_E, position_R = sorted_rows(x_TD, expert_ids_TK, experts)
    hidden = activate(rows, counts_E, experts.gate_up, limit=swiglu_limit)
    down_RD = grouped_product(hidden, counts_E, experts.down).float()
    summed_TD: Tensor = torch.ops.npu.npu_moe_token_unpermute(
        down_RD, position_R, probs=weights_TK.contiguous(), padded_mode=False, restore_shape=None
    )
    return summed_TD


def sorted_rows(
    x_TD: Tensor, expert_ids_TK: Tensor, experts: GroupedExperts
) -> tuple[QuantizedRows, Tensor, Tensor]:
    """Quantised copies of the tokens sorted by expert, rows per expert [E] int64, and where each pair of
    token and choice went, [T * K] int32.
    """
    is_int8 = experts.activation is ActivationFormat.INT8_TOKEN
    x_RD, position_R, counts_E, scale_R = torch.ops.npu.npu_moe_init_routing_v2(
        x_TD.contiguous(),
        expert_ids_TK.contiguous(),
        scale=None,
        offset=None,
        active_num=expert_ids_TK.numel(),
        expert_capacity=-1,
        expert_num=experts.num_experts,
        drop_pad_mode=0,
        expert_tokens_num_type=COUNTS,
        expert_tokens_num_flag=True,
        quant_mode=INT8_DYNAMIC if is_int8 else NOT_QUANTIZED,
        active_expert_range=[0, experts.num_experts],
        row_idx_type=POSITION_OF_PAIR,
    )
    rows = QuantizedRows(x_RD, scale_R) if is_int8 else mx_rows(x_RD)
    return rows, counts_E, position_R


def mx_rows(values_RK: Tensor) -> QuantizedRows:
    """Rows in MXFP8 by the OCP rule."""
    codes_RK, scale = torch.ops.npu.npu_dynamic_mx_quant(
        values_RK, axis=-1, round_mode="rint", dst_type=torch.float8_e4m3fn, block_size=32, scale_alg=0
    )
    return QuantizedRows(codes_RK, _paired(scale))


def _paired(scale: Tensor) -> Tensor:
    """E8M0 scales of rows as bytes in pairs, whichever way an operator returns them."""
    return scale.view(torch.uint8).reshape(scale.shape[0], -1, 2)


def grouped_sums(rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight) -> Tensor:
    """Sums of products of int8 codes, [R, N] int32: no scale is applied."""
    assert weight.format is WeightFormat.INT8_CHANNEL, weight.format
    sums_RN: Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows.codes],
        [weight.codes],
        group_list=counts_E,
        group_list_type=GROUP_COUNTS,
        group_type=GROUP_ROWS,
        split_item=ONE_OUTPUT,
        output_dtype=torch.int32,
    )[0]
    return sums_RN


def grouped_product(rows: QuantizedRows, counts_E: Tensor, weight: GroupedWeight) -> Tensor:
    """Each expert's rows times its weight, [R, N] bfloat16.

    For INT4 the kernel multiplies codes less 8, and the bias makes up for it.
    """
    scales: dict[str, object]
    if weight.format is WeightFormat.INT8_CHANNEL:
        scales = {"scale": [weight.scale]}
    elif weight.format is WeightFormat.INT4_CHANNEL:
        scales = {"scale": [weight.scale.unsqueeze(1)], "bias": [weight.bias]}
    elif weight.format is WeightFormat.MXFP8:
        scales = {
            "scale": [weight.scale],
            "scale_dtype": FLOAT8_E8M0FNU,
            "per_token_scale_dtype": FLOAT8_E8M0FNU,
        }
    else:
        assert weight.format is WeightFormat.FP4_GROUP, weight.format
        scales = {
            "antiquant_scale": [weight.scale],
            "weight_dtype": FLOAT4_E2M1FN_X2,
            "per_token_scale_dtype": FLOAT8_E8M0FNU,
        }
    out_RN: Tensor = torch.ops.npu.npu_grouped_matmul(
        [rows.codes],
        [weight.codes],
        per_token_scale=[rows.scale],
        group_list=counts_E,
        group_list_type=GROUP_COUNTS,
        group_type=GROUP_ROWS,
        split_item=ONE_OUTPUT,
        output_dtype=torch.bfloat16,
        **scales,
    )[0]
    return out_RN


def dequant_swiglu(
    call: Callable[..., tuple[Tensor, Tensor]],
    rows: QuantizedRows,
    counts_E: Tensor,
    weight: GroupedWeight,
    *,
    limit: float,
) -> QuantizedRows:
    """The product of integer weights, then one of the dequantise-SwiGLU-quantise operators.

    INT8 products reach it as whole sums with both scales beside them, INT4 products as bfloat16.
    """
    is_int8 = weight.format is WeightFormat.INT8_CHANNEL
    product = grouped_sums if is_int8 else grouped_product
    codes, scale_R = call(
        product(rows, counts_E, weight),
        weight_scale=weight.scale if is_int8 else None,
        activation_scale=rows.scale if is_int8 else None,
        bias=None,
        quant_scale=None,
        quant_offset=None,
        group_index=counts_E,
        activate_left=True,
        quant_mode=DYNAMIC,
        swiglu_mode=CLAMPED,
        clamp_limit=limit,
        **PLAIN_GLU,
    )
    return QuantizedRows(codes, scale_R)


def mx_swiglu_rows(codes: Tensor, scale: Tensor) -> QuantizedRows:
    """What an operator that ends in MXFP8 returned."""
    return QuantizedRows(codes, _paired(scale))
