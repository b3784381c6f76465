"""Rotary position embedding: whole rows, slices in place, interleaved and half layouts.

r1 is the cosine, r2 the sine; both are given per channel, so an interleaved table repeats every value twice.
Products and sums are float32, rounded once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.state import SimulatedChip, require

MODES = ("half", "interleave", "quarter", "interleave-half")
"""What the bindings know; any other string makes them return without doing anything."""
SLICE_DTYPES = (
    (torch.float16, torch.float16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
)
MAX_WIDTH = 1024
ROTARY_MUL_WIDTH = 896
ROTARY_MUL_ROWS = 1000
"""npu_rotary_mul takes fewer than these: of channels, and of batch times heads in interleave mode."""
INTERLEAVE_ROPE_WIDTH = 64


def _turned(x: Tensor, mode: str) -> Tensor:
    """What the sine multiplies: pairs (a, b) become (-b, a), neighbours or halves."""
    if mode == "interleave":
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotated(x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> Tensor:
    wide = x.float()
    return wide * r1.float() + _turned(wide, mode) * r2.float()


def _require_tables(operator: str, x: Tensor, r1: Tensor, r2: Tensor, width: int) -> None:
    require(
        r1.shape == r2.shape and r1.dtype is r2.dtype, operator, "r1 and r2 must have one shape and one dtype"
    )
    fits = r1.dim() == 4 and all(
        have in (1, want) for have, want in zip(r1.shape[:3], x.shape[:3], strict=True)
    )
    require(
        fits and r1.shape[-1] == width,
        operator,
        f"r1 {tuple(r1.shape)} must be {width} wide and broadcast over the other axes of x {tuple(x.shape)}",
    )


def _slice_meta(sim: SimulatedChip, *, x: Tensor, **_: object) -> None:
    require(x.dim() == 4, "inplace_partial_rotary_mul", f"x must have four axes, this is {tuple(x.shape)}")


@kernel("_C_ascend::inplace_partial_rotary_mul", meta=_slice_meta)
@kernel("custom::inplace_partial_rotary_mul", meta=_slice_meta)
def inplace_partial_rotary_mul(
    sim: SimulatedChip, *, x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str, partial_slice: list[int]
) -> None:
    """Rotates channels [start, end) of x in place. An unknown mode does nothing and says nothing."""
    name = "inplace_partial_rotary_mul"
    if rotary_mode not in MODES:
        return
    require(x.dim() == 4, name, f"x must have four axes, this is {tuple(x.shape)}")
    require(
        rotary_mode == "interleave", name, f"only the mode interleave is supported, this is {rotary_mode}"
    )
    require(len(partial_slice) == 2, name, f"partial_slice must be (start, end), is {partial_slice}")
    start, end = partial_slice
    width = x.shape[-1]
    require(width <= MAX_WIDTH and width % 2 == 0, name, f"the last axis must be even, at most 1024: {width}")
    require(
        0 <= start <= end <= width and (end - start) % 2 == 0,
        name,
        f"partial_slice {partial_slice} must be an even range inside [0, {width}]",
    )
    require(
        (x.dtype, r1.dtype) in SLICE_DTYPES,
        name,
        f"x {x.dtype} with tables {r1.dtype} is not supported; tables are of x's dtype or float32",
    )
    if start == end:
        return
    _require_tables(name, x, r1, r2, end - start)
    part = x[..., start:end]
    part.copy_(_rotated(part, r1, r2, rotary_mode))


def _like_input(sim: SimulatedChip, *, input: Tensor, **_: object) -> Tensor:
    return torch.empty_like(input)


@kernel("npu::npu_rotary_mul", meta=_like_input)
def npu_rotary_mul(
    sim: SimulatedChip,
    *,
    input: Tensor,
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str,
    rotate: Tensor | None,
) -> Tensor:
    """input * r1 + turned(input) * r2 over four axes; interleave tables vary along one axis only."""
    name = "npu_rotary_mul"
    require(rotary_mode in ("half", "interleave"), name, f"rotary_mode {rotary_mode!r} is not supported")
    require(rotate is None, name, "rotate is not simulated")
    require(input.dim() == 4, name, f"input must have four axes, this is {tuple(input.shape)}")
    width = input.shape[-1]
    require(
        width < ROTARY_MUL_WIDTH and width % 2 == 0,
        name,
        f"the last axis must be even and below {ROTARY_MUL_WIDTH}, is {width}",
    )
    require(
        input.dtype is r1.dtype and input.dtype in (torch.float16, torch.bfloat16, torch.float32),
        name,
        f"input {input.dtype} and tables {r1.dtype} must be one of float16, bfloat16, float32",
    )
    _require_tables(name, input, r1, r2, width)
    if rotary_mode == "interleave":
        rows = input.shape[:3]
        fits = any(
            r1.shape[axis] == rows[axis]
            and all(r1.shape[other] == 1 for other in range(3) if other != axis)
            and math.prod(rows) // max(rows[axis], 1) < ROTARY_MUL_ROWS
            for axis in range(3)
        )
        require(
            fits,
            name,
            f"interleave tables {tuple(r1.shape)} must vary along the sequence axis of input "
            f"{tuple(input.shape)} only, and batch times heads must stay below {ROTARY_MUL_ROWS}",
        )
    return _rotated(input, r1, r2, rotary_mode).to(input.dtype)


def _like_x(sim: SimulatedChip, *, x: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x)


@kernel("npu::npu_interleave_rope", meta=_like_x, chips=A2_A3)
def npu_interleave_rope(sim: SimulatedChip, *, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Takes pairs of neighbours apart into halves, then rotates the halves; the result stays in halves."""
    name = "npu_interleave_rope"
    require(x.dim() == 4, name, f"x must have four axes (B, N, S, D), this is {tuple(x.shape)}")
    require(x.shape[-1] == INTERLEAVE_ROPE_WIDTH, name, f"D must be 64, is {x.shape[-1]}")
    require(x.dtype in (torch.float16, torch.bfloat16), name, f"x must be float16 or bfloat16, is {x.dtype}")
    require(
        x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous(), name, "views are not supported"
    )
    require(cos.dtype is x.dtype and sin.dtype is x.dtype, name, f"cos and sin must be {x.dtype} like x")
    batch, _, steps, width = x.shape
    require(
        cos.shape == sin.shape and tuple(cos.shape) in ((batch, 1, steps, width), (batch, 1, 1, width)),
        name,
        f"cos and sin must be [{batch}, 1, 1 or {steps}, {width}], are {tuple(cos.shape)}",
    )
    halves = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)
    return _rotated(halves, cos, sin, "half").to(x.dtype)
