"""The compressor: runs of tokens pooled, channel by channel, into one cached entry.

Legend: T new tokens, K hidden, D entry width, N entries completed by this step, G tokens pooled into an
entry, W = state row width (kv and score side by side), M older state rows read.
With overlap (CSA) a projection has 2D channels: an entry takes the first half from the previous run of tokens
and the second half from its own. The stored score already contains the positional bias (ape).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ascend_v4.operators.contract import FLOAT32, FLOATS, Spec, Tolerance, operator
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of
from ascend_v4.operators.contracts.linear import float32_linear
from ascend_v4.operators.contracts.norm import rms_norm
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat
from ascend_v4.operators.contracts.rope import RopeFrequencies, RopeRows, plan_rope, rotate


@dataclass(frozen=True, slots=True)
class CompressorWeights:
    """projections: one [W, K] weight, or the kv and score halves apart. ape: [ratio, W/2] float32. norm:
    [D].
    """

    projections: tuple[StoredWeight, ...]
    ape: Tensor
    norm: Tensor


@dataclass(frozen=True)
class CompressionPlan(Plan):
    """Where a step's entries come from and go to; shared by all layers of a kind."""

    entry_slots: Tensor
    """Physical rows of the N entries in the compressed cache, int64."""
    rope: RopeRows
    """Rotations at each entry's first position."""
    ape_rows_T: Tensor
    """Position within its run of every new token."""
    written_tokens: Tensor
    written_slots: Tensor
    """New tokens whose state a later step needs, and their physical state rows."""
    old_slots_M: Tensor
    member_NG: Tensor
    """Rows to pool, counted through new tokens, then old rows, then one empty row."""


def prepare_compressor(weights: CompressorWeights, *, copy: bool) -> CompressorWeights:
    """One concatenated float32 projection where copies are made, the file's two otherwise."""
    if not copy:
        return weights
    joined = torch.cat([weight.to_float32() for weight in weights.projections])
    return CompressorWeights(
        (StoredWeight(joined, None, WeightFormat.PLAIN),), weights.ape, weights.norm.float()
    )


def plan_compression(
    batch: TokenBatch,
    *,
    ratio: int,
    overlap: bool,
    state_table: Tensor,
    state_page_tokens: int,
    entry_table: Tensor,
    entries_per_page: int,
    frequencies: RopeFrequencies,
) -> CompressionPlan:
    """Entry i of a sequence is complete once its token (i + 1) * ratio - 1 is in; this step's are planned
    here.

    State pages with id 0 are neither written nor kept.
    """
    device = batch.device
    reach = ratio if overlap else 0
    state_rows = rows_of(state_table, batch.sequence_T, batch.positions_T, per_page=state_page_tokens)
    written = (state_rows >= state_page_tokens).nonzero().squeeze(1)
    ape_rows_T, written_slots = batch.positions_T % ratio, state_rows[written]
    if all((start + count) // ratio == start // ratio for _, count, start in batch.spans):
        return _state_only_plan(ape_rows_T, written, written_slots)
    # each starts with an empty part, so that a step without sequences has something to join
    none = torch.empty(0, dtype=torch.int64)
    entry_ids, entry_sequences, old_positions, old_sequences = [none], [none], [none], [none]
    spans: list[tuple[int, int, int, int, int]] = []
    for index, (first, count, start) in enumerate(batch.spans):
        ids = torch.arange(start // ratio, (start + count) // ratio)
        oldest = max(0, start - start % ratio - reach) if len(ids) else start
        spans.append((first, start, oldest, sum(len(part) for part in old_positions), len(ids)))
        entry_ids.append(ids)
        entry_sequences.append(torch.full_like(ids, index))
        old_positions.append(torch.arange(oldest, start))
        old_sequences.append(torch.full((start - oldest,), index))
    ids_N, olds_M = torch.cat(entry_ids), torch.cat(old_positions)
    members = _members(spans, ids_N, ratio=ratio, reach=reach, totals=(batch.num_tokens, len(olds_M)))
    return CompressionPlan(
        entry_slots=rows_of(
            entry_table, torch.cat(entry_sequences).to(device), ids_N.to(device), per_page=entries_per_page
        ),
        rope=plan_rope(ids_N.to(device) * ratio, frequencies),
        ape_rows_T=ape_rows_T,
        written_tokens=written,
        written_slots=written_slots,
        old_slots_M=rows_of(
            state_table, torch.cat(old_sequences).to(device), olds_M.to(device), per_page=state_page_tokens
        ),
        member_NG=members.to(device),
    )


def _state_only_plan(ape_rows_T: Tensor, written: Tensor, written_slots: Tensor) -> CompressionPlan:
    """For a step that completes no entry, as three of four decoding steps of a CSA layer do."""
    none = written.new_empty(0)
    nowhere = torch.empty(0, 1, 0, dtype=torch.complex64, device=none.device)
    return CompressionPlan(
        entry_slots=none,
        rope=RopeRows(nowhere, nowhere),
        ape_rows_T=ape_rows_T,
        written_tokens=written,
        written_slots=written_slots,
        old_slots_M=none,
        member_NG=none.unsqueeze(1),
    )


def _members(
    spans: list[tuple[int, int, int, int, int]],
    ids_N: Tensor,
    *,
    ratio: int,
    reach: int,
    totals: tuple[int, int],
) -> Tensor:
    num_tokens, num_old = totals
    offsets = torch.arange(-reach, ratio)
    rows, done = [torch.empty(0, len(offsets), dtype=torch.int64)], 0
    for first, start, oldest, old_base, num_entries in spans:
        positions = ids_N[done : done + num_entries, None] * ratio + offsets
        done += num_entries
        new = first + positions - start
        old = num_tokens + old_base + positions - oldest
        row = torch.where(positions >= start, new, old)
        rows.append(torch.where(positions < 0, num_tokens + num_old, row))
    return torch.cat(rows)


@operator(
    source="reference/model.md 2.5; ascend-operators.md 6 and 19.4",
    tolerance=Tolerance(64, "float32 projections and pooling, a norm, then one rounding"),
    mutates=("state_cache_CSW",),
    plan=plan_compression,
    prepare=prepare_compressor,
)
def compress(
    x_TK: Annotated[Tensor, Spec("T K", FLOATS)],
    weights: CompressorWeights,
    state_cache_CSW: Annotated[Tensor, Spec("C S W", FLOAT32)],
    plan: Plan,
    *,
    overlap: bool,
    eps: float,
    rounded_once: bool,
) -> Annotated[Tensor, Spec("N D", FLOATS)]:
    """The entries completed by the new tokens, normed and rotated, in x's dtype; their state is kept for
    later steps.

    rounded_once: what is pooled stays float32 through norm and rotation, as in the chips' kernels. Otherwise
    it is rounded to x's dtype before the norm, after it and after the rotation, as in the release.

    Old state is read and new state written in one call; the caller's pages must not make them alias.
    """
    assert isinstance(plan, CompressionPlan), type(plan)
    halves = [float32_linear.reference(x_TK, weight) for weight in weights.projections]
    rows_TW = halves[0] if len(halves) == 1 else torch.cat(halves, dim=1)
    half = rows_TW.shape[1] // 2
    rows_TW[:, half:] += weights.ape[plan.ape_rows_T]
    state = state_cache_CSW.view(-1, rows_TW.shape[1])
    old_MW = state[plan.old_slots_M] if len(plan.entry_slots) else None
    state.index_copy_(0, plan.written_slots, rows_TW[plan.written_tokens])
    if old_MW is None:
        return x_TK.new_empty(0, weights.norm.shape[0])
    pooled_ND = _pool(torch.cat((rows_TW, old_MW)), plan.member_NG, overlap=overlap)
    entries_ND = rms_norm.reference(
        pooled_ND if rounded_once else pooled_ND.to(x_TK.dtype), weights.norm, eps=eps
    )
    rotate.reference(entries_ND.unsqueeze(1), plan.rope)
    return entries_ND.to(x_TK.dtype)


def _pool(rows_RW: Tensor, member_NG: Tensor, *, overlap: bool) -> Tensor:
    """Softmax over an entry's tokens, channel by channel, times their values, [N, D] float32."""
    half = rows_RW.shape[1] // 2
    empty = torch.cat((rows_RW.new_zeros(1, half), rows_RW.new_full((1, half), -torch.inf)), dim=1)
    picked = torch.cat((rows_RW, empty)).index_select(0, member_NG.flatten())
    picked = picked.view(*member_NG.shape, rows_RW.shape[1])
    kv, score = torch.split(picked, half, dim=-1)
    if overlap:
        run, width = member_NG.shape[1] // 2, half // 2
        kv = torch.cat((kv[:, :run, :width], kv[:, run:, width:]), dim=1)
        score = torch.cat((score[:, :run, :width], score[:, run:, width:]), dim=1)
    return torch.sum(torch.softmax(score, dim=1) * kv, dim=1)
