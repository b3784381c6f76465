"""The compressor in plain torch on the device, without asking it for a value.

Legend: T new tokens, K hidden, D entry width, N entries completed by this step, M older state rows read, G
tokens pooled into an entry, R rope channels, C pages, S rows per page, W state row width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of
from ascend_v4.operators.contracts.compressor import CompressorWeights, compress
from ascend_v4.operators.contracts.norm import rms_norm
from ascend_v4.operators.contracts.rope import RopeFrequencies
from ascend_v4.operators.npu.compressor import new_entries
from ascend_v4.operators.npu.constants import ATEN
from ascend_v4.operators.npu.rope import rope_rows


@dataclass(frozen=True, slots=True)
class AtenCompressor:
    """projection: [K, W] float32, values before scores. ape: float32 [ratio, W/2]. norm: [D]."""

    projection: Tensor
    ape: Tensor
    norm: Tensor


@dataclass(frozen=True)
class AtenCompressionPlan(Plan):
    """Which rows make which entry, for all layers of a kind."""

    entry_slots: Tensor
    """Physical rows of the N entries in the compressed cache, int64."""
    cos: Tensor
    sin: Tensor
    """Rotations at each entry's first position, float32 [N, R]."""
    ape_rows_T: Tensor
    """Position within its run of every new token."""
    state_rows_T: Tensor
    """Physical state row of every new token; within page 0 where none is kept."""
    old_rows_M: Tensor
    member_NG: Tensor
    """Rows to pool, counted through new tokens, then old rows, then one empty row."""


def prepare_aten(weights: CompressorWeights, *, copy: bool) -> AtenCompressor:
    """One float32 product for both halves."""
    joined = torch.cat([projection.to_float32() for projection in weights.projections])
    return AtenCompressor(joined.t().contiguous(), weights.ape.float(), weights.norm)


def plan_aten(
    batch: TokenBatch,
    *,
    ratio: int,
    overlap: bool,
    state_table: Tensor,
    state_page_tokens: int,
    entry_table: Tensor,
    entries_per_page: int,
    frequencies: RopeFrequencies,
) -> AtenCompressionPlan:
    """Row numbers from the host's counts and the page tables."""
    device = batch.device
    reach = ratio if overlap else 0
    entries, sequences = new_entries(batch, ratio)
    olds = [
        (position, index)
        for index, (_, count, start) in enumerate(batch.spans)
        if (start + count) // ratio > start // ratio
        for position in range(max(0, start - start % ratio - reach), start)
    ]
    positions, owners = torch.tensor(olds, dtype=torch.int64).view(-1, 2).unbind(1)
    members = _members(batch, entries, sequences, owners, ratio=ratio, reach=reach)
    entries, sequences = entries.to(device), sequences.to(device)
    cos, sin = rope_rows(entries * ratio, frequencies)
    return AtenCompressionPlan(
        entry_slots=rows_of(entry_table, sequences, entries, per_page=entries_per_page),
        cos=cos,
        sin=sin,
        ape_rows_T=batch.positions_T % ratio,
        state_rows_T=rows_of(state_table, batch.sequence_T, batch.positions_T, per_page=state_page_tokens),
        old_rows_M=rows_of(state_table, owners.to(device), positions.to(device), per_page=state_page_tokens),
        member_NG=members.to(device),
    )


def _members(
    batch: TokenBatch, entries_N: Tensor, sequences_N: Tensor, owners_M: Tensor, *, ratio: int, reach: int
) -> Tensor:
    """A new token's row is its number in the batch; old rows follow, each sequence's ending at its start."""
    num_old = len(owners_M)
    starts = torch.tensor(batch.starts, dtype=torch.int64)
    firsts = torch.tensor([first for first, _, _ in batch.spans], dtype=torch.int64)
    old_ends = torch.bincount(owners_M, minlength=len(starts)).cumsum(0)
    positions_NG = entries_N[:, None] * ratio + torch.arange(-reach, ratio)
    offset_NG = positions_NG - starts[sequences_N, None]
    new_NG = firsts[sequences_N, None] + offset_NG
    old_NG = batch.num_tokens + old_ends[sequences_N, None] + offset_NG
    rows_NG = torch.where(offset_NG >= 0, new_NG, old_NG)
    return torch.where(positions_NG < 0, batch.num_tokens + num_old, rows_NG)


@implements(compress, backend="npu", provider=ATEN, plan=plan_aten, prepare=prepare_aten)
def compress_composed(
    x_TK: Tensor,
    weights: CompressorWeights | AtenCompressor,
    state_cache_CSW: Tensor,
    plan: Plan,
    *,
    overlap: bool,
    eps: float,
    rounded_once: bool,
) -> Tensor:
    """As the reference computes it.

    Not to be captured: how many older rows a step reads depends on its positions.
    """
    assert isinstance(plan, AtenCompressionPlan), type(plan)
    assert isinstance(weights, AtenCompressor), type(weights)
    if x_TK.shape[0] == 0:
        return x_TK.new_empty(0, weights.norm.shape[0])
    rows_TW = torch.matmul(x_TK.float(), weights.projection)
    half = rows_TW.shape[1] // 2
    rows_TW[:, half:] += weights.ape[plan.ape_rows_T]
    state_NW = state_cache_CSW.view(-1, rows_TW.shape[1])
    old_MW = state_NW[plan.old_rows_M]
    _keep(state_NW, rows_TW, plan.state_rows_T, rows_per_page=state_cache_CSW.shape[1])
    if plan.entry_slots.shape[0] == 0:
        return x_TK.new_empty(0, weights.norm.shape[0])
    pooled_ND = _pool(torch.cat((rows_TW, old_MW)), plan.member_NG, overlap=overlap)
    entries_ND = rms_norm.reference(
        pooled_ND if rounded_once else pooled_ND.to(x_TK.dtype), weights.norm, eps=eps
    )
    return _rotated(entries_ND, plan.cos, plan.sin).to(x_TK.dtype)


def _keep(state_NW: Tensor, rows_TW: Tensor, state_rows_T: Tensor, *, rows_per_page: int) -> None:
    """Rows of page 0 are not kept: those tokens write what row 0 holds onto row 0."""
    dropped_T = state_rows_T < rows_per_page
    kept_TW = torch.where(dropped_T.unsqueeze(1), state_NW[:1], rows_TW)
    state_NW.index_copy_(0, state_rows_T.masked_fill(dropped_T, 0), kept_TW)


def _pool(rows_RW: Tensor, member_NG: Tensor, *, overlap: bool) -> Tensor:
    """Softmax over an entry's tokens, channel by channel, times their values, [N, D] float32."""
    half = rows_RW.shape[1] // 2
    empty = rows_RW.new_zeros(1, 2 * half)
    empty[:, half:] = -torch.inf
    picked = torch.cat((rows_RW, empty))[member_NG]
    values, scores = picked[..., :half], picked[..., half:]
    if overlap:
        # the previous run gives the first half of a projection's channels, an entry's own run the second
        run, width = member_NG.shape[1] // 2, half // 2
        values = torch.cat((values[:, :run, :width], values[:, run:, width:]), dim=1)
        scores = torch.cat((scores[:, :run, :width], scores[:, run:, width:]), dim=1)
    return torch.sum(torch.softmax(scores, dim=1) * values, dim=1)


def _rotated(entries_ND: Tensor, cos_NR: Tensor, sin_NR: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of the last R channels turned by their angles, in float32."""
    fixed = entries_ND.shape[1] - cos_NR.shape[1]
    tail_NR = entries_ND[:, fixed:].float()
    even, odd = tail_NR[:, ::2], tail_NR[:, 1::2]
    crossed_NR = torch.stack((-odd, even), dim=-1).flatten(1)
    turned_NR = tail_NR * cos_NR + crossed_NR * sin_NR
    return torch.cat((entries_ND[:, :fixed], turned_NR.to(entries_ND.dtype)), dim=1)
