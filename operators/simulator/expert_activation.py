"""Simulated activations between the two products of an expert: dequantise, SwiGLU, quantise.

Three packages ship operators of nearly the same names whose modes differ: swiglu_mode 1 of torch_npu's takes
gate and up from even and odd columns (the GPT-OSS layout), that of vLLM-Ascend and of the recipes from the
halves.
Sources: aclnnDequantSwigluQuantV2 of ops-nn with its kernel and golden code, csrc/moe of vLLM-Ascend, the
documents and tests of the recipes' custom operators.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.simulator.dtypes import dtype_of
from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.matmul import require_shape
from ascend_v4.operators.simulator.quantize import HALVES, quantize_rows, require_absent
from ascend_v4.operators.simulator.state import SimulatedChip, require, undefined

STATIC = 0
DYNAMIC = 1
WIDTH_ALIGNMENT = 64
WIDTH_LIMIT = 10496
"""Columns of the result that torch_npu's operator takes with groups."""


def gated(gate: Tensor, up: Tensor, *, limit: float | None, alpha: float = 1.0, bias: float = 0.0) -> Tensor:
    """gate * sigmoid(alpha * gate) * (up + bias); a limit first caps gate from above and up on both sides."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + bias)


def halves(values: Tensor, *, activate_left: bool) -> tuple[Tensor, Tensor]:
    """Gate and up halves of the last axis."""
    left, right = values.chunk(2, dim=-1)
    return (left, right) if activate_left else (right, left)


def interleaved(values: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up from even and odd columns."""
    return values[..., 0::2], values[..., 1::2]


def rows_of_counts(
    operator: str, group_index: Tensor | None, num_rows: int, *, cumulative: bool = False
) -> list[int]:
    """Rows of each group, all rows as one group without a list. Raises SimulatorError beyond the rows."""
    if group_index is None:
        return [num_rows]
    require(
        group_index.dtype is torch.int64 and group_index.dim() == 1,
        operator,
        f"group_index must be int64 with one axis, is {group_index.dtype} {tuple(group_index.shape)}",
    )
    require(group_index.numel() > 0, operator, "group_index is empty")
    counts = group_index
    if cumulative:
        counts = group_index.diff(prepend=group_index.new_zeros(1))
    found = counts.tolist()
    require(min(found) >= 0, operator, f"group_index {group_index.tolist()} has a group of negative size")
    require(sum(found) <= num_rows, operator, f"group_index covers {sum(found)} rows, x has {num_rows}")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class DequantSwiglu:
    """One call of the family, and the rules in which its members differ."""

    name: str
    x: Tensor
    weight_scale: Tensor | None
    activation_scale: Tensor | None
    bias: Tensor | None
    quant_scale: Tensor | None
    quant_offset: Tensor | None
    group_index: Tensor | None
    activate_left: bool
    quant_mode: int
    swiglu_mode: int
    limit: float | None
    """Clamp of mode 1; None: no clamp."""
    alpha: float
    glu_bias: float
    interleave: bool
    """Whether mode 1 reads even and odd columns."""

    def run(self) -> tuple[Tensor, Tensor]:
        """int8 [T, H] and float32 scales [T]: poison beyond the groups, and scales of the static mode."""
        self._check()
        num_rows, width = self.x.shape
        counts = rows_of_counts(self.name, self.group_index, num_rows)
        codes = undefined(num_rows, width // 2, dtype=torch.int8)
        scales = undefined(num_rows, dtype=torch.float32)
        start = 0
        for group, count in enumerate(counts):
            rows = slice(start, start + count)
            start += count
            if not count:
                continue
            values = self._activated(self._dequantized(rows, group))
            smooth = self._row(self.quant_scale, group)
            if self.quant_mode == DYNAMIC:
                codes[rows], scales[rows] = quantize_rows(values if smooth is None else values * smooth)
                continue
            offset = self._row(self.quant_offset, group)
            assert smooth is not None
            assert offset is not None
            codes[rows] = (values / smooth + offset).round().clamp(-128, 127).to(torch.int8)
        return codes, scales

    def _check(self) -> None:
        name, x = self.name, self.x
        require(x.dim() == 2, name, f"x must have two axes, this is {tuple(x.shape)}")
        require(x.numel() > 0, name, "x may not be empty")
        require(x.is_contiguous(), name, "x must be contiguous")
        require(x.shape[1] % 2 == 0, name, f"the last axis of x is {x.shape[1]}, it must be even")
        integer = x.dtype is torch.int32
        require(integer or x.dtype in HALVES, name, f"x must be int32, bfloat16 or float16, is {x.dtype}")
        require(
            (self.weight_scale is not None) == integer,
            name,
            "weight_scale goes with int32 x and only with it",
        )
        require(
            integer or (self.activation_scale is None and self.bias is None),
            name,
            "activation_scale and bias go with int32 x only",
        )
        groups = 1 if self.group_index is None else self.group_index.numel()
        width = x.shape[1]
        if self.weight_scale is not None:
            whole = (width,) if self.group_index is None else (groups, width)
            require_shape(name, "weight_scale", self.weight_scale, (groups, width), whole)
            require(self.weight_scale.dtype is torch.float32, name, "weight_scale must be float32")
        if self.activation_scale is not None:
            require_shape(name, "activation_scale", self.activation_scale, (x.shape[0],), (x.shape[0], 1))
            require(self.activation_scale.dtype is torch.float32, name, "activation_scale must be float32")
        if self.quant_scale is not None:
            whole = (width // 2,) if self.group_index is None else (groups,)
            require_shape(name, "quant_scale", self.quant_scale, (groups, width // 2), whole)
        require(self.quant_mode in (STATIC, DYNAMIC), name, f"quant_mode is {self.quant_mode}, want 0 or 1")
        if self.quant_mode == DYNAMIC:
            require_absent(name, quant_offset=self.quant_offset)
        else:
            require(
                self.quant_scale is not None and self.quant_offset is not None,
                name,
                "static quantisation, quant_mode 0, needs quant_scale and quant_offset",
            )
        require(self.swiglu_mode in (0, 1), name, f"swiglu_mode is {self.swiglu_mode}, want 0 or 1")

    def _row(self, table: Tensor | None, group: int) -> Tensor | None:
        if table is None:
            return None
        return (table if self.group_index is None and table.dim() == 1 else table[group]).float()

    def _dequantized(self, rows: slice, group: int) -> Tensor:
        part = self.x[rows]
        if self.weight_scale is None:
            return part.float()
        table = self.weight_scale.reshape(-1, part.shape[1])
        bias = None if self.bias is None else self.bias.reshape(-1, part.shape[1])[group]
        if bias is not None and not bias.is_floating_point():
            part = part + bias
        values = part.float() * table[group]
        if self.activation_scale is not None:
            values = values * self.activation_scale.reshape(-1, 1)[rows]
        if bias is not None and bias.is_floating_point():
            values = values + bias.float()
        return values

    def _activated(self, values: Tensor) -> Tensor:
        if self.swiglu_mode == 0:
            return gated(*halves(values, activate_left=self.activate_left), limit=None)
        split = interleaved(values) if self.interleave else halves(values, activate_left=self.activate_left)
        return gated(*split, limit=self.limit, alpha=self.alpha, bias=self.glu_bias)


def _dequant_swiglu_meta(sim: SimulatedChip, *, x: Tensor, **_: object) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    return x.new_empty((rows, width // 2), dtype=torch.int8), x.new_empty((rows,), dtype=torch.float32)


def _require_int8_rint(
    name: str, dst_type: int | None, round_mode: int | None, activate_dim: int | None
) -> None:
    require(
        dst_type is None or dtype_of(dst_type, name) is torch.int8,
        name,
        "int8 results are simulated (dst_type 1)",
    )
    require(round_mode in (None, 0), name, f"round_mode is {round_mode}; int8 takes 0, to nearest")
    require(activate_dim in (None, -1), name, f"activate_dim is {activate_dim}; -1 is simulated")


@kernel("npu::npu_dequant_swiglu_quant", meta=_dequant_swiglu_meta)
def npu_dequant_swiglu_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    group_index: Tensor | None,
    activate_left: bool,
    quant_mode: int,
    dst_type: int | None,
    round_mode: int | None,
    activate_dim: int | None,
    swiglu_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
) -> tuple[Tensor, Tensor]:
    """torch_npu's: mode 1 interleaves gate and up, and clamps."""
    name = "npu_dequant_swiglu_quant"
    _require_int8_rint(name, dst_type, round_mode, activate_dim)
    require(
        swiglu_mode == 0 or not sim.is_950, name, "Ascend 950 takes swiglu_mode 0 with the other defaults"
    )
    if swiglu_mode == 1:
        require(activate_left, name, "swiglu_mode 1 needs activate_left: its gate is the even columns")
        require(group_index is not None, name, "swiglu_mode 1 needs group_index")
        require(
            0 < clamp_limit < math.inf, name, f"clamp_limit is {clamp_limit}, it must be positive and finite"
        )
    require(
        sim.is_950 or x.dtype in (torch.int32, torch.bfloat16),
        name,
        f"x must be int32 or bfloat16, is {x.dtype}",
    )
    if x.dtype is torch.int32:
        require(activation_scale is not None, name, "int32 x needs activation_scale")
    if group_index is not None:
        width = x.shape[-1] // 2
        require(quant_mode == DYNAMIC, name, "with group_index only quant_mode 1, dynamic, is taken")
        require_absent(name, bias=bias)
        require(
            width <= WIDTH_LIMIT and width % WIDTH_ALIGNMENT == 0,
            name,
            f"the result has {width} columns; a multiple of {WIDTH_ALIGNMENT} up to {WIDTH_LIMIT} is needed",
        )
    return DequantSwiglu(
        name=name,
        x=x,
        weight_scale=weight_scale,
        activation_scale=activation_scale,
        bias=bias,
        quant_scale=quant_scale,
        quant_offset=quant_offset,
        group_index=group_index,
        activate_left=activate_left,
        quant_mode=quant_mode,
        swiglu_mode=swiglu_mode,
        limit=clamp_limit,
        alpha=glu_alpha,
        glu_bias=glu_bias,
        interleave=True,
    ).run()


@kernel("_C_ascend::npu_dequant_swiglu_quant", meta=_dequant_swiglu_meta, chips=A2_A3)
def vllm_dequant_swiglu_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    group_index: Tensor | None,
    activate_left: bool,
    quant_mode: int,
    swiglu_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
) -> tuple[Tensor, Tensor]:
    """vLLM-Ascend's: mode 1 takes halves and clamps where clamp_limit is positive."""
    name = "_C_ascend.npu_dequant_swiglu_quant"
    require(x.dtype in (torch.int32, torch.bfloat16), name, f"x must be int32 or bfloat16, is {x.dtype}")
    return DequantSwiglu(
        name=name,
        x=x,
        weight_scale=weight_scale,
        activation_scale=activation_scale,
        bias=bias,
        quant_scale=quant_scale,
        quant_offset=quant_offset,
        group_index=group_index,
        activate_left=activate_left,
        quant_mode=quant_mode,
        swiglu_mode=swiglu_mode,
        limit=clamp_limit if clamp_limit > 0 else None,
        alpha=glu_alpha,
        glu_bias=glu_bias,
        interleave=False,
    ).run()


@kernel("custom::npu_dequant_swiglu_clamp_quant", meta=_dequant_swiglu_meta, chips=A2_A3)
def npu_dequant_swiglu_clamp_quant(
    sim: SimulatedChip,
    *,
    x: Tensor,
    weight_scale: Tensor | None,
    activation_scale: Tensor | None,
    bias: Tensor | None,
    quant_scale: Tensor | None,
    quant_offset: Tensor | None,
    group_index: Tensor | None,
    activate_left: bool,
    quant_mode: int,
    dst_type: int | None,
    round_mode: int | None,
    activate_dim: int | None,
    swiglu_mode: int,
    clamp_limit: float,
    glu_alpha: float,
    glu_bias: float,
) -> tuple[Tensor, Tensor]:
    """The recipes': mode 1 takes halves and always clamps."""
    name = "npu_dequant_swiglu_clamp_quant"
    _require_int8_rint(name, dst_type, round_mode, activate_dim)
    require(swiglu_mode == 0 or clamp_limit > 0, name, f"clamp_limit is {clamp_limit}, it must be positive")
    return DequantSwiglu(
        name=name,
        x=x,
        weight_scale=weight_scale,
        activation_scale=activation_scale,
        bias=bias,
        quant_scale=quant_scale,
        quant_offset=quant_offset,
        group_index=group_index,
        activate_left=activate_left,
        quant_mode=quant_mode,
        swiglu_mode=swiglu_mode,
        limit=clamp_limit,
        alpha=glu_alpha,
        glu_bias=glu_bias,
        interleave=False,
    ).run()
