"""The grouped output projection: one batched product over groups of heads, tokens first on both sides.

Legend: T tokens, G groups, K inputs, N outputs of a group, P pairs of 32 inputs.
Weights stay as their files have them, output-major: both products can transpose them while they read. How
many groups there are shows with the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ascend_v4.operators.contract import Limit, Needs, implements
from ascend_v4.operators.contracts.linear import grouped_linear
from ascend_v4.operators.contracts.quantize import ActivationFormat, StoredWeight, WeightFormat
from ascend_v4.operators.npu.constants import (
    A2_A3,
    MATMUL_AXIS_LIMIT,
    MX_PAIR,
    ONLY_950,
    TORCH_NPU,
    TORCH_NPU_MODULE,
)
from ascend_v4.operators.npu.formats import paired_scale
from ascend_v4.operators.npu.linear import mx_codes, mx_inputs

TOKENS_FIRST = (1, 0, 2)
"""[T, G, ..] taken and given back, multiplied as G batches."""
OUTPUT_MAJOR = (0, 2, 1)
"""[G, N, K] multiplied as [G, K, N]. CANN 8.5 and later."""

BATCH_DOC = "TransposeBatchMatMul: K and N of a group at most 65535 and multiples of 16, at most 65535 groups"
BATCH_LIMITS = (
    Limit(size="o_group_inputs", high=MATMUL_AXIS_LIMIT, multiple=16, source=BATCH_DOC),
    Limit(size="o_lora", high=MATMUL_AXIS_LIMIT, multiple=16, source=BATCH_DOC),
    Limit(size="o_groups", high=MATMUL_AXIS_LIMIT, source=BATCH_DOC),
)
MX_LIMITS = (
    Limit(
        size="o_group_inputs",
        multiple=MX_PAIR,
        source="npu_transpose_quant_batchmatmul: k is a multiple of 64",
    ),
)


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A weight [G * N, K] of bfloat16, float32, or E4M3 codes with scale bytes [G * N, P, 2]."""

    matrix: Tensor
    scale: Tensor | None

    def by_group(self, groups: int) -> Tensor:
        """[G, N, K], the same memory."""
        return self.matrix.view(groups, -1, self.matrix.shape[1])


def prepare_real(weight: StoredWeight, *, copy: bool) -> GroupedWeight:
    """The real numbers, in bfloat16 where that holds them: codes times powers of two, but not integers."""
    if weight.format is WeightFormat.PLAIN:
        return GroupedWeight(weight.codes.contiguous(), None)
    real_NK = weight.to_float32()
    return GroupedWeight(real_NK if weight.is_integer else real_NK.to(torch.bfloat16), None)


def prepare_mx_groups(weight: StoredWeight, *, copy: bool) -> GroupedWeight:
    """E4M3 codes and scale pairs; plain weights as they are. Raises ContractError for integer weights."""
    if weight.format is WeightFormat.PLAIN:
        return GroupedWeight(weight.codes.contiguous(), None)
    codes_NK, scale_NG = mx_codes(weight)
    return GroupedWeight(codes_NK, paired_scale(scale_NG))


@implements(
    grouped_linear,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(
        module=TORCH_NPU_MODULE,
        torch_operators=("npu::npu_transpose_batchmatmul",),
        chips=A2_A3,
    ),
    limits=BATCH_LIMITS,
    prepare=prepare_real,
    capturable=True,
)
def grouped_bf16(x_TGK: Tensor, weight: StoredWeight, *, activation: ActivationFormat) -> Tensor:
    """The batched product of unquantised inputs. Float32 weights are multiplied in float32."""
    prepared = cast("GroupedWeight", weight)
    assert activation is ActivationFormat.NONE, activation
    tokens, groups, _ = x_TGK.shape
    matrix_GNK = prepared.by_group(groups)
    if tokens == 0:
        return x_TGK.new_empty(0, groups, matrix_GNK.shape[1])
    out_TGN: Tensor = torch.ops.npu.npu_transpose_batchmatmul(
        x_TGK.to(matrix_GNK.dtype),
        matrix_GNK,
        perm_x1=TOKENS_FIRST,
        perm_x2=OUTPUT_MAJOR,
        perm_y=TOKENS_FIRST,
        batch_split_factor=1,
    )
    return out_TGN.to(x_TGK.dtype)


@implements(
    grouped_linear,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(
        module=TORCH_NPU_MODULE,
        torch_operators=("npu::npu_dynamic_mx_quant", "npu::npu_transpose_quant_batchmatmul"),
        chips=ONLY_950,
    ),
    limits=MX_LIMITS,
    prepare=prepare_mx_groups,
    capturable=True,
)
def grouped_mx(x_TGK: Tensor, weight: StoredWeight, *, activation: ActivationFormat) -> Tensor:
    """Inputs to E4M3 in groups of 32, then the batched product of scaled groups; plain weights by matmul."""
    prepared = cast("GroupedWeight", weight)
    tokens, groups, _ = x_TGK.shape
    matrix_GNK = prepared.by_group(groups)
    if tokens == 0:
        return x_TGK.new_empty(0, groups, matrix_GNK.shape[1])
    if prepared.scale is None:
        assert activation is ActivationFormat.NONE, activation
        x_GTK = x_TGK.transpose(0, 1).to(matrix_GNK.dtype)
        return torch.matmul(x_GTK, matrix_GNK.transpose(1, 2)).transpose(0, 1).to(x_TGK.dtype)
    assert activation is ActivationFormat.MXFP8, activation
    codes_TGK, scale_TGP2 = mx_inputs(x_TGK)
    # this product takes no dtype numbers for scales: their tensors must be e8m0
    scale_GNP2 = prepared.scale.view(torch.float8_e8m0fnu).view(groups, -1, *prepared.scale.shape[1:])
    out_TGN: Tensor = torch.ops.npu.npu_transpose_quant_batchmatmul(
        codes_TGK,
        matrix_GNK,
        dtype=x_TGK.dtype,
        x1_scale=scale_TGP2.view(torch.float8_e8m0fnu),
        x2_scale=scale_GNP2,
        group_sizes=(0, 0, 32),
        perm_x1=TOKENS_FIRST,
        perm_x2=OUTPUT_MAJOR,
        perm_y=TOKENS_FIRST,
        batch_split_factor=1,
    )
    return out_TGN
