"""Simulated routing: rows sorted by expert, and their way back.

The sort is stable. What a call leaves unwritten is poison. Sources: npu_moe_init_routing_v2 and its golden
code, npu_moe_token_permute and unpermute, npu_moe_finalize_routing and npu_moe_re_routing in op-plugin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.simulator.elements import MX_PAIR, mx_quantize, scale_pairs
from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.matmul import require_shape
from ascend_v4.operators.simulator.quantize import HALVES, quantize_rows, require_absent
from ascend_v4.operators.simulator.state import SimulatedChip, require, undefined

FLOATS = (*HALVES, torch.float32)
CUMULATIVE = 0
COUNTS = 1
PAIRS = 2
GATHER = 0
SCATTER = 1
PLAIN = -1
STATIC = 0
DYNAMIC = 1
MX_MODES = {2: torch.float8_e5m2, 3: torch.float8_e4m3fn}
MOST_EXPERTS = 10240
MOST_CHOSEN = 512
EXPERT_MAJOR = 0
"""drop_pad_mode of npu_moe_finalize_routing whose index runs over the k-th choices of all tokens first."""
TOKEN_MAJOR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class InitRouting:
    """One call of npu_moe_init_routing_v2 or of vLLM-Ascend's copy."""

    name: str
    sim: SimulatedChip
    x: Tensor
    expert_idx: Tensor
    scale: Tensor | None
    offset: Tensor | None
    active_num: int
    expert_num: int
    drop_pad_mode: int
    expert_tokens_num_type: int
    expert_tokens_num_flag: bool
    quant_mode: int
    active_expert_range: Sequence[int]
    row_idx_type: int

    @property
    def experts(self) -> tuple[int, int]:
        """First expert of this rank and the one after its last."""
        given = tuple(self.active_expert_range)
        return (given[0], given[1]) if len(given) == 2 and given != (0, 0) else (0, self.expert_num)

    @property
    def num_out(self) -> int:
        """Rows of the expanded result."""
        rows = self.expert_idx.numel()
        return rows if self.active_num <= 0 else min(self.active_num, rows)

    def shapes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Empty results."""
        x, first_last = self.x, self.experts
        width = x.shape[1]
        kind = torch.int8 if self.quant_mode in (STATIC, DYNAMIC) else MX_MODES.get(self.quant_mode, x.dtype)
        counts: tuple[int, ...] = (first_last[1] - first_last[0],)
        if not self.expert_tokens_num_flag:
            counts = ()
        elif self.expert_tokens_num_type == PAIRS:
            counts = (self.expert_num, 2)
        scales: tuple[int, ...] = () if self.quant_mode == STATIC else (self.num_out,)
        scale_type = torch.float32
        if self.quant_mode in MX_MODES:
            scales, scale_type = (self.num_out, -(-width // MX_PAIR) * 2), torch.float8_e8m0fnu
        return (
            x.new_empty((self.num_out, width), dtype=kind),
            x.new_empty((self.expert_idx.numel(),), dtype=torch.int32),
            x.new_empty(counts, dtype=torch.int64),
            x.new_empty(scales, dtype=scale_type),
        )

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Expanded rows, row index, tokens per expert, scales."""
        self._check()
        first, last = self.experts
        flat = self.expert_idx.reshape(-1).long()
        active = (flat >= first) & (flat < last)
        order = torch.where(active, flat, last).argsort(stable=True)
        num_active = int(active.sum())
        taken = order[: min(num_active, self.num_out)]
        rows, index, counts, scales = (undefined(*each.shape, dtype=each.dtype) for each in self.shapes())
        source = taken // self.expert_idx.shape[1]
        values, given = self._quantized(self.x[source], source, flat[taken] - first)
        rows[: len(taken)] = values
        if given is not None:
            scales[: len(taken)] = given
        if self.row_idx_type == SCATTER:
            index[:num_active] = order[:num_active].to(torch.int32)
        else:
            index.fill_(-1)
            index[taken] = torch.arange(len(taken), dtype=torch.int32)
        self._count(counts, flat[active], first, last)
        return rows, index, counts, scales

    def _check(self) -> None:
        name, x, idx = self.name, self.x, self.expert_idx
        require(x.dim() == 2 and idx.dim() == 2, name, "x and expert_idx need two axes each")
        require(x.shape[0] == idx.shape[0], name, f"x has {x.shape[0]} rows and expert_idx {idx.shape[0]}")
        require(x.numel() > 0 and idx.numel() > 0, name, "x and expert_idx may not be empty")
        require(idx.dtype is torch.int32, name, f"expert_idx must be int32, is {idx.dtype}")
        require(
            x.dtype in FLOATS or (x.dtype is torch.int8 and self.quant_mode == PLAIN),
            name,
            f"x is {x.dtype} with quant_mode {self.quant_mode}; int8 rows cannot be quantised again",
        )
        require(0 < self.expert_num <= MOST_EXPERTS, name, f"expert_num is {self.expert_num}")
        first, last = self.experts
        require(
            0 <= first < last <= self.expert_num,
            name,
            f"active_expert_range {(first, last)} is outside the {self.expert_num} experts",
        )
        require(
            bool(((idx >= 0) & (idx < self.expert_num)).all()),
            name,
            f"expert_idx goes from {int(idx.min())} to {int(idx.max())}, there are {self.expert_num} experts",
        )
        require(self.drop_pad_mode == 0, name, f"drop_pad_mode is {self.drop_pad_mode}; 0 is simulated")
        require(
            self.expert_tokens_num_type in (CUMULATIVE, COUNTS, PAIRS),
            name,
            f"expert_tokens_num_type is {self.expert_tokens_num_type}, want 0, 1 or 2",
        )
        require(
            self.row_idx_type in (GATHER, SCATTER), name, f"row_idx_type is {self.row_idx_type}, want 0 or 1"
        )
        modes = (PLAIN, STATIC, DYNAMIC, *(MX_MODES if self.sim.is_950 else ()))
        require(self.quant_mode in modes, name, f"quant_mode is {self.quant_mode}; {modes} are simulated")
        if self.quant_mode == STATIC:
            require(
                self.scale is not None and self.offset is not None,
                name,
                "quant_mode 0 needs scale and offset",
            )
        else:
            require_absent(name, offset=self.offset)
        if self.scale is not None:
            shapes: dict[int, tuple[tuple[int, ...], ...]] = {
                PLAIN: ((x.shape[0],),),
                STATIC: ((1,),),
                DYNAMIC: ((last - first, x.shape[1]), (1, x.shape[1])),
            }
            require(self.quant_mode in shapes, name, f"quant_mode {self.quant_mode} takes no scale")
            require_shape(name, "scale", self.scale, *shapes[self.quant_mode])
            require(self.scale.dtype is torch.float32, name, f"scale must be float32, is {self.scale.dtype}")

    def _quantized(self, rows: Tensor, source: Tensor, experts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Values and scales of expanded rows; source is their token, experts their expert from 0."""
        scale = self.scale
        if self.quant_mode == PLAIN:
            return rows, None if scale is None else scale[source]
        if self.quant_mode == STATIC:
            assert scale is not None
            assert self.offset is not None
            codes = (rows.float() * scale + self.offset).round().clamp(-128, 127)
            return codes.to(torch.int8), None
        if self.quant_mode == DYNAMIC:
            smooth = 1.0 if scale is None else (scale if scale.shape[0] == 1 else scale[experts])
            return quantize_rows(rows.float() * smooth)
        codes, exponents = mx_quantize(rows, MX_MODES[self.quant_mode])
        return codes, scale_pairs(exponents).flatten(-2).view(torch.float8_e8m0fnu)

    def _count(self, counts: Tensor, active: Tensor, first: int, last: int) -> None:
        if not self.expert_tokens_num_flag:
            return
        per_expert = torch.bincount(active - first, minlength=last - first)
        if self.expert_tokens_num_type == COUNTS:
            counts.copy_(per_expert)
        elif self.expert_tokens_num_type == CUMULATIVE:
            counts.copy_(per_expert.cumsum(0))
        else:
            used = per_expert.nonzero().flatten()
            counts[: len(used), 0] = used + first
            counts[: len(used), 1] = per_expert[used]
            counts[len(used) : len(used) + 1] = 0


def _init_routing(
    name: str,
    sim: SimulatedChip,
    *,
    expert_capacity: int,
    x_dtype: int | None = None,
    **arguments: object,
) -> InitRouting:
    require_absent(name, x_dtype=x_dtype)
    return InitRouting(name=name, sim=sim, **arguments)  # type: ignore[arg-type]


def _init_routing_meta(sim: SimulatedChip, **arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _init_routing("npu_moe_init_routing_v2", sim, **arguments).shapes()  # type: ignore[arg-type]


@kernel("npu::npu_moe_init_routing_v2", meta=_init_routing_meta)
def npu_moe_init_routing_v2(sim: SimulatedChip, **arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torch_npu's."""
    return _init_routing("npu_moe_init_routing_v2", sim, **arguments).run()  # type: ignore[arg-type]


@kernel("_C_ascend::npu_moe_init_routing_custom", meta=_init_routing_meta, chips=A2_A3)
def npu_moe_init_routing_custom(
    sim: SimulatedChip, **arguments: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """vLLM-Ascend's of release 0.23, whose quant_mode is 0 unless given."""
    return _init_routing("npu_moe_init_routing_custom", sim, **arguments).run()  # type: ignore[arg-type]


def _permute_meta(
    sim: SimulatedChip, *, tokens: Tensor, indices: Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[Tensor, Tensor]:
    total, asked = indices.numel(), num_out_tokens or 0
    rows = min(asked, total) if asked > 0 else total + asked
    return tokens.new_empty((rows, tokens.shape[1])), indices.new_empty((total,), dtype=torch.int32)


@kernel("npu::npu_moe_token_permute", meta=_permute_meta)
def npu_moe_token_permute(
    sim: SimulatedChip, *, tokens: Tensor, indices: Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, and for each (token, choice) the row it went to."""
    name = "npu_moe_token_permute"
    require(not padded_mode, name, "padded_mode is not supported by the operator")
    require(
        tokens.dim() == 2 and tokens.dtype in FLOATS, name, f"tokens must be float rows, are {tokens.dtype}"
    )
    require(
        indices.dim() in (1, 2) and indices.dtype in (torch.int32, torch.int64),
        name,
        f"indices must be int32 or int64 with one or two axes, are {indices.dtype} {tuple(indices.shape)}",
    )
    require(
        indices.shape[0] == tokens.shape[0], name, f"{indices.shape[0]} indices, {tokens.shape[0]} tokens"
    )
    require(bool((indices >= 0).all()), name, "indices may not be negative")
    chosen = 1 if indices.dim() == 1 else indices.shape[1]
    require(chosen <= MOST_CHOSEN, name, f"{chosen} experts per token, at most {MOST_CHOSEN} are taken")
    order = indices.reshape(-1).argsort(stable=True)
    empty, _index = _permute_meta(
        sim, tokens=tokens, indices=indices, num_out_tokens=num_out_tokens, padded_mode=padded_mode
    )
    return tokens[order[: empty.shape[0]] // chosen], order.argsort().to(torch.int32)


def _unpermute_meta(
    sim: SimulatedChip, *, permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None, **_: object
) -> Tensor:
    chosen = 1 if probs is None else probs.shape[1]
    return permuted_tokens.new_empty((sorted_indices.shape[0] // chosen, permuted_tokens.shape[1]))


@kernel("npu::npu_moe_token_unpermute", meta=_unpermute_meta)
def npu_moe_token_unpermute(
    sim: SimulatedChip,
    *,
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None,
    padded_mode: bool,
    restore_shape: Sequence[int] | None,
) -> Tensor:
    """out[t] = sum over k of probs[t, k] * rows[index[t * K + k]]; index -1 needs a probability of 0."""
    name = "npu_moe_token_unpermute"
    require(not padded_mode, name, "padded_mode is not supported by the operator")
    require_absent(name, restore_shape=restore_shape)
    rows, index = permuted_tokens, sorted_indices
    require(
        rows.dim() == 2 and rows.dtype in FLOATS,
        name,
        f"permuted_tokens must be float rows, are {rows.dtype}",
    )
    require(
        index.dim() == 1 and index.dtype is torch.int32,
        name,
        f"sorted_indices must be int32 with one axis, is {index.dtype} {tuple(index.shape)}",
    )
    if probs is None:
        weights = torch.ones(index.numel(), 1)
    else:
        require(
            probs.dim() == 2 and probs.dtype in FLOATS, name, f"probs is {probs.dtype} {tuple(probs.shape)}"
        )
        require(
            probs.numel() == index.numel(),
            name,
            f"probs {tuple(probs.shape)} does not fit {index.numel()} sorted_indices",
        )
        require(
            not sim.is_950 or probs.dtype is rows.dtype,
            name,
            f"probs is {probs.dtype} and the rows {rows.dtype}; Ascend 950 wants one type",
        )
        require(
            probs.shape[1] <= MOST_CHOSEN, name, f"{probs.shape[1]} experts per token, want <= {MOST_CHOSEN}"
        )
        weights = probs.float()
    chosen = index.view(weights.shape).long()
    require(
        bool(((chosen >= 0) & (chosen < rows.shape[0]) | ((chosen == -1) & (weights == 0))).all()),
        name,
        f"sorted_indices go from {int(index.min())} to {int(index.max())}, there are {rows.shape[0]} rows "
        "(-1 is taken where the probability is 0)",
    )
    result = rows.new_zeros((chosen.shape[0], rows.shape[1]), dtype=torch.float32)
    for place in range(chosen.shape[1]):
        part = rows[chosen[:, place].clamp(min=0)].float() * weights[:, place : place + 1]
        result = result + torch.where(chosen[:, place : place + 1] >= 0, part, 0.0)
    return result.to(rows.dtype)


def _finalize_meta(
    sim: SimulatedChip,
    *,
    expanded_permuted_rows: Tensor,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    k: int | None,
    **_: object,
) -> Tensor:
    rows = scales.shape[0] if scales is not None else expanded_src_to_dst_row.shape[0] // (k or 1)
    return expanded_permuted_rows.new_empty((rows, expanded_permuted_rows.shape[-1]))


@kernel("npu::npu_moe_finalize_routing", meta=_finalize_meta)
def npu_moe_finalize_routing(
    sim: SimulatedChip,
    *,
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None,
    k: int | None,
) -> Tensor:
    """skip1 + skip2 + sum over k of scales[t, k] * (rows[index] + bias[expert]); mode 0 is k-major."""
    name = "npu_moe_finalize_routing"
    rows, index = expanded_permuted_rows, expanded_src_to_dst_row
    require(
        drop_pad_mode in (EXPERT_MAJOR, TOKEN_MAJOR),
        name,
        f"drop_pad_mode is {drop_pad_mode}; 0 (index k * T + t) and 2 (t * K + k) are simulated",
    )
    require(
        rows.dim() == 2 and rows.dtype in FLOATS, name, f"rows must be float with two axes, are {rows.dtype}"
    )
    require(
        index.dim() == 1 and index.dtype is torch.int32,
        name,
        f"the row index must be int32, is {index.dtype}",
    )
    require(skip2 is None or skip1 is not None, name, "skip2 needs skip1")
    require(
        (bias is None) == (export_for_source_row is None) or bias is None,
        name,
        "bias needs export_for_source_row",
    )
    for what, each in (("skip1", skip1), ("skip2", skip2), ("bias", bias), ("scales", scales)):
        require(
            each is None or each.dtype is rows.dtype,
            name,
            f"{what} must have the rows' type {rows.dtype}, not {None if each is None else each.dtype}",
        )
    chosen = scales.shape[1] if scales is not None else (k or 1)
    require(index.numel() % chosen == 0, name, f"{index.numel()} indices are no multiple of K {chosen}")
    num_rows = index.numel() // chosen
    if scales is not None:
        require_shape(name, "scales", scales, (num_rows, chosen))
    require(
        bool(((index >= 0) & (index < rows.shape[0])).all()),
        name,
        f"the row index goes from {int(index.min())} to {int(index.max())}, there are {rows.shape[0]} rows",
    )
    places = index.long()
    table = (
        places.view(chosen, num_rows).T if drop_pad_mode == EXPERT_MAJOR else places.view(num_rows, chosen)
    )
    result = torch.zeros(num_rows, rows.shape[1])
    for each in (skip1, skip2):
        if each is not None:
            require_shape(name, "skip", each, (num_rows, rows.shape[1]))
            result = result + each.float()
    for place in range(chosen):
        part = rows[table[:, place]].float()
        if bias is not None:
            assert export_for_source_row is not None
            part = part + bias[export_for_source_row[:, place].long()].float()
        weight = 1.0 if scales is None else scales[:, place : place + 1].float()
        result = result + weight * part
    return result.to(rows.dtype)


def _re_routing_meta(
    sim: SimulatedChip,
    *,
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    per_token_scales: Tensor | None,
    **_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = tokens.shape[0]
    scales = tokens.new_empty((rows,), dtype=torch.float32)
    return (
        torch.empty_like(tokens),
        scales if per_token_scales is None else torch.empty_like(per_token_scales),
        tokens.new_empty((rows,), dtype=torch.int32),
        expert_token_num_per_rank.new_empty((expert_token_num_per_rank.shape[1],)),
    )


@kernel("npu::npu_moe_re_routing", meta=_re_routing_meta)
def npu_moe_re_routing(
    sim: SimulatedChip,
    *,
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    per_token_scales: Tensor | None,
    expert_token_num_type: int,
    idx_type: int,
    tokens_dtype: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that came rank after rank, put expert after expert, with the place that each had before."""
    name = "npu_moe_re_routing"
    require_absent(name, tokens_dtype=tokens_dtype)
    counts = expert_token_num_per_rank
    require(
        expert_token_num_type == 1 and idx_type == 0, name, "expert_token_num_type 1 and idx_type 0 are taken"
    )
    require(tokens.dim() == 2 and counts.dim() == 2, name, "tokens and the counts need two axes each")
    require(counts.dtype in (torch.int32, torch.int64), name, f"the counts are {counts.dtype}")
    require(
        bool((counts >= 0).all()) and int(counts.sum()) == tokens.shape[0],
        name,
        f"the counts sum to {int(counts.sum())}, there are {tokens.shape[0]} tokens",
    )
    experts = torch.arange(counts.shape[1]).repeat(counts.shape[0]).repeat_interleave(counts.reshape(-1))
    order = experts.argsort(stable=True)
    scales = undefined(tokens.shape[0], dtype=torch.float32)
    if per_token_scales is not None:
        require(
            per_token_scales.shape[0] == tokens.shape[0], name, "per_token_scales and tokens differ in length"
        )
        scales = per_token_scales[order]
    return tokens[order], scales, order.to(torch.int32), counts.sum(0).to(counts.dtype)
