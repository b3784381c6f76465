"""Partial interleaved rotation, in place.

Legend: T tokens, H heads, D channels, the last R of them rotated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.contract import Limit, Needs, implements
from ascend_v4.operators.contracts.batch import Plan
from ascend_v4.operators.contracts.rope import RopeFrequencies, rotate
from ascend_v4.operators.npu.constants import (
    CANN_RECIPES,
    RECIPES_MODULE,
    TORCH_NPU,
    TORCH_NPU_MODULE,
    VLLM_ASCEND,
    VLLM_MODULE,
)

INTERLEAVED = "interleave"
"""Pairs (2i, 2i + 1). vLLM-Ascend's binding does nothing, silently, for a mode that it does not know."""

ROTARY_DEF = "inplace_partial_rotary_mul: channels at most 1024 and even"
FUSED_LIMITS = tuple(
    Limit(size=size, high=1024, multiple=2, source=ROTARY_DEF)
    for size in ("head_dim", "index_head_dim", "rope_dim")
)
ROTARY_MUL_DOC = "npu_rotary_mul, interleave: batch * heads below 1000, channels below 896 and even"
COMPOSED_LIMITS = (
    Limit(size="heads", high=999, source=ROTARY_MUL_DOC),
    Limit(size="index_heads", high=999, source=ROTARY_MUL_DOC),
    Limit(size="rope_dim", high=894, multiple=2, source=ROTARY_MUL_DOC),
)


@dataclass(frozen=True, slots=True)
class NpuRope(Plan):
    """Cosines and sines of T positions, float32 [T, 1, 1, R], each number twice in a row."""

    cos: Tensor
    sin: Tensor
    inverse_sin: Tensor
    """Negated sines, which turn back."""


def rope_rows(positions_T: Tensor, frequencies: RopeFrequencies) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions (int64), float32 [T, R], each number twice in a row: c0 c0 c1 c1 ..."""
    angles = torch.outer(positions_T.float(), frequencies.frequencies.to(positions_T.device))
    twice = angles.repeat_interleave(2, dim=-1)
    return twice.cos(), twice.sin()


def plan_rope(positions_T: Tensor, frequencies: RopeFrequencies) -> NpuRope:
    """Tables of the given positions (int64), once per step for all layers of a kind."""
    cos_TR, sin_TR = rope_rows(positions_T, frequencies)
    sin = sin_TR[:, None, None]
    return NpuRope(cos_TR[:, None, None], sin, -sin)


@implements(
    rotate,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(module=VLLM_MODULE, torch_operators=("_C_ascend::inplace_partial_rotary_mul",)),
    limits=FUSED_LIMITS,
    plan=plan_rope,
    capturable=True,
)
def rotate_by_vllm(x_THD: Tensor, rows: Plan, *, inverse: bool = False) -> None:
    """One kernel over all heads of a token."""
    _rotate_fused(torch.ops._C_ascend.inplace_partial_rotary_mul, x_THD, rows, inverse=inverse)


@implements(
    rotate,
    backend="npu",
    provider=CANN_RECIPES,
    needs=Needs(module=RECIPES_MODULE, torch_operators=("custom::inplace_partial_rotary_mul",)),
    limits=FUSED_LIMITS,
    plan=plan_rope,
    capturable=True,
)
def rotate_by_recipes(x_THD: Tensor, rows: Plan, *, inverse: bool = False) -> None:
    """The same kernel under another name."""
    _rotate_fused(torch.ops.custom.inplace_partial_rotary_mul, x_THD, rows, inverse=inverse)


@implements(
    rotate,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(module=TORCH_NPU_MODULE, torch_operators=("npu::npu_rotary_mul",)),
    limits=COMPOSED_LIMITS,
    plan=plan_rope,
    capturable=True,
)
def rotate_composed(x_THD: Tensor, rows: Plan, *, inverse: bool = False) -> None:
    """npu_rotary_mul over the rotated channels alone, in float32, with tokens as its sequence axis."""
    assert isinstance(rows, NpuRope), type(rows)
    if x_THD.numel() == 0:
        return
    tail_THR = x_THD[..., x_THD.shape[-1] - rows.cos.shape[-1] :]
    # tables may only differ along the sequence: [1, T, 1, R] for inputs [1, T, H, R]
    cos, sin = (table.squeeze(1).unsqueeze(0) for table in _tables(rows, inverse=inverse))
    wide = tail_THR.float().contiguous().unsqueeze(0)
    turned = torch.ops.npu.npu_rotary_mul(wide, cos, sin, rotary_mode=INTERLEAVED)
    tail_THR.copy_(turned.squeeze(0))


def _tables(rows: NpuRope, *, inverse: bool) -> tuple[Tensor, Tensor]:
    return rows.cos, rows.inverse_sin if inverse else rows.sin


def _rotate_fused(kernel: torch._ops.OpOverloadPacket, x_THD: Tensor, rows: Plan, *, inverse: bool) -> None:
    """The kernel takes four axes and writes to memory without gaps: other layouts go through a copy."""
    assert isinstance(rows, NpuRope), type(rows)
    if x_THD.numel() == 0:
        return
    width = x_THD.shape[-1]
    cos, sin = _tables(rows, inverse=inverse)
    packed_THD = x_THD.contiguous()
    kernel(
        packed_THD.unsqueeze(1),
        cos,
        sin,
        rotary_mode=INTERLEAVED,
        partial_slice=[width - cos.shape[-1], width],
    )
    if packed_THD is not x_THD:
        x_THD.copy_(packed_THD)
