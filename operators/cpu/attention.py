"""Sparse attention on a CPU: gathered rows for decoding, dense tiles for prefill.

A step of a few tokens gathers each token's rows, all sequences at once. A longer one multiplies tiles of
neighbouring queries with the rows they share and masks what single queries do not see. Row numbers and masks
are planned once per step for all layers of a kind.
Legend: T tokens, H heads, D head size, N key-value rows, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.contract import implements
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of

GATHERED_TOKENS = 8
"""Steps with at most this many new tokens per sequence gather rows token by token."""
TILE_TOKENS = 64
"""A tile of n queries multiplies n + 127 window rows: smaller ones waste less, larger ones multiply
faster.
"""
DENSE_FACTOR = 8
"""Tiles look at every entry while there are at most this many times as many as a query selects."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Neighbouring queries of one sequence (or single tokens of many) and the rows they share."""

    first: int
    stop: int
    rows: Tensor
    """Window rows: [N], shared, or [T, N], one set per token."""
    bias: Tensor | None
    """0 where a token sees a window row, -inf where not, [T, N]; None when it sees all."""
    entry_rows: Tensor | None
    entry_bias: Tensor | None
    sequence: Tensor
    """Sequence of each token, for entries that only selection knows."""
    visible: Tensor
    """Compressed entries each token sees, [T, 1]."""
    blind: Tensor | None = None
    """Tokens that see no entry, where some are gathered for them nonetheless: those may be anything."""


@dataclass(frozen=True)
class CpuAttentionPlan(Plan):
    """The tiles of a step."""

    tiles: tuple[Tile, ...]


def plan_cpu_attention(
    batch: TokenBatch,
    *,
    ratio: int,
    window_tokens: int,
    window_table: Tensor,
    window_page_tokens: int,
    compressed_table: Tensor | None,
    entries_per_page: int,
    num_heads: int,
    head_dim: int,
    topk: int,
) -> CpuAttentionPlan:
    """Gathered tiles when every sequence brings few tokens, shared tiles otherwise."""
    entries = None if compressed_table is None else (compressed_table, entries_per_page, ratio)
    window = (window_table, window_page_tokens, window_tokens)
    if not batch.counts:
        return CpuAttentionPlan(())
    if max(batch.counts) <= GATHERED_TOKENS:
        return CpuAttentionPlan((_gathered_tile(batch, window, entries),))
    tiles = []
    for index, (first, count, start) in enumerate(batch.spans):
        for low in range(0, count, TILE_TOKENS):
            high = min(low + TILE_TOKENS, count)
            span = (first + low, first + high, start + low, start + high)
            tiles.append(_shared_tile(index, span, window, entries))
    return CpuAttentionPlan(tuple(tiles))


def _bias(seen: Tensor) -> Tensor | None:
    if bool(seen.all()):
        return None
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _gathered_tile(
    batch: TokenBatch, window: tuple[Tensor, int, int], entries: tuple[Tensor, int, int] | None
) -> Tile:
    positions = batch.positions_T[:, None]
    sequence = batch.sequence_T[:, None]
    rows, seen = _gathered_window(batch, window)
    entry_rows = entry_bias = blind = None
    visible = torch.zeros_like(positions)
    if entries is not None:
        entry_table, entries_per_page, ratio = entries
        visible = (positions + 1) // ratio
        numbers = torch.arange(int(visible.max())).expand(len(positions), -1)
        valid = numbers < visible
        entry_rows = rows_of(entry_table, sequence, torch.where(valid, numbers, 0), per_page=entries_per_page)
        entry_bias = _bias(valid)
        unseeing = (visible == 0).flatten()
        blind = unseeing.nonzero().flatten() if bool(unseeing.any()) else None
    window_bias = _bias(seen >= 0)
    return Tile(0, len(positions), rows, window_bias, entry_rows, entry_bias, sequence, visible, blind)


def _gathered_window(batch: TokenBatch, window: tuple[Tensor, int, int]) -> tuple[Tensor, Tensor]:
    """Window rows of each token and their positions (negative: none), the same for every kind of layer."""
    if "cpu window rows" not in batch.scratch:
        table, per_page, window_tokens = window
        positions = batch.positions_T[:, None]
        reach = min(window_tokens, max(batch.ends))
        seen = positions - torch.arange(reach - 1, -1, -1)
        held = seen.clamp_min(0)
        batch.scratch["cpu window rows"] = rows_of(table, batch.sequence_T[:, None], held, per_page=per_page)
        batch.scratch["cpu window positions"] = seen
    return batch.scratch["cpu window rows"], batch.scratch["cpu window positions"]


def _shared_tile(
    index: int,
    span: tuple[int, int, int, int],
    window: tuple[Tensor, int, int],
    entries: tuple[Tensor, int, int] | None,
) -> Tile:
    first, stop, low, high = span
    table, per_page, window_tokens = window
    queries = torch.arange(low, high)[:, None]
    keys = torch.arange(max(0, low - window_tokens + 1), high)
    rows = rows_of(table, torch.full_like(keys, index), keys, per_page=per_page)
    entry_rows = entry_bias = None
    visible = torch.zeros_like(queries)
    if entries is not None:
        entry_table, entries_per_page, ratio = entries
        visible = (queries + 1) // ratio
        numbers = torch.arange(high // ratio)
        entry_rows = rows_of(entry_table, torch.full_like(numbers, index), numbers, per_page=entries_per_page)
        entry_bias = _bias(numbers < visible)
    sequence = torch.full_like(queries, index)
    seen = (keys <= queries) & (keys > queries - window_tokens)
    return Tile(first, stop, rows, _bias(seen), entry_rows, entry_bias, sequence, visible)


@implements(sparse_attention, backend="cpu", provider="torch", plan=plan_cpu_attention)
def sparse_attention_tiled(
    q_THD: Tensor,
    window_cache_CSD: Tensor,
    *,
    window_table_BP: Tensor,
    compressed_cache_CSD: Tensor | None,
    compressed_table_BP: Tensor | None,
    selected_TK: Tensor | None,
    sinks_H: Tensor,
    batch: TokenBatch,
    plan: Plan,
    ratio: int,
    window_tokens: int,
    scale: float,
    sink_in_peak: bool,
) -> Tensor:
    """Tile by tile; selected entries are gathered, or masked in where most are selected anyway."""
    assert isinstance(plan, CpuAttentionPlan), type(plan)
    window = window_cache_CSD.view(-1, window_cache_CSD.shape[-1])
    parts = []
    for tile in plan.tiles:
        q = q_THD[tile.first : tile.stop]
        kv, bias = [_take(window, tile.rows)], [(tile.rows.shape[-1], tile.bias)]
        if compressed_cache_CSD is not None and compressed_table_BP is not None:
            selected = None if selected_TK is None else selected_TK[tile.first : tile.stop]
            flat = compressed_cache_CSD.view(-1, compressed_cache_CSD.shape[-1])
            rows, entry_bias = _entries(tile, selected, compressed_table_BP, compressed_cache_CSD.shape[1])
            if rows.dim() > tile.rows.dim():
                kv[0] = kv[0].expand(len(q), -1, -1)
            kv.append(_take(flat, rows))
            if tile.blind is not None:
                # 0 times NaN would spoil the sum
                kv[1].index_fill_(0, tile.blind, 0.0)
            bias.append((rows.shape[-1], entry_bias))
        joined = kv[0] if len(kv) == 1 else torch.cat(kv, dim=-2)
        parts.append(
            _attend(
                q,
                joined.float(),
                _joined_bias(bias, len(q)),
                sinks_H,
                scale=scale,
                sink_in_peak=sink_in_peak,
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat([q_THD[:0], *parts])


def _take(cache_RD: Tensor, rows: Tensor) -> Tensor:
    """cache[rows] by whole rows, which index_select copies faster than indexing does."""
    return cache_RD.index_select(0, rows.flatten()).view(*rows.shape, cache_RD.shape[1])


def _entries(
    tile: Tile, selected: Tensor | None, table: Tensor, entries_per_page: int
) -> tuple[Tensor, Tensor | None]:
    """Rows of compressed entries and their bias: shared [N], or per token [T, N]."""
    assert tile.entry_rows is not None, "a compressed layer was planned without entries"
    if selected is None:
        return tile.entry_rows, tile.entry_bias
    columns = torch.arange(selected.shape[1])
    valid = columns < tile.visible
    chosen = torch.where(valid, selected, 0).long()
    num_entries = tile.entry_rows.shape[-1]
    if tile.entry_rows.dim() == 1 and num_entries <= DENSE_FACTOR * selected.shape[1]:
        # column num_entries takes the unused places of a row, then falls away
        marked = torch.full((len(chosen), num_entries + 1), -torch.inf)
        marked.scatter_(1, torch.where(valid, chosen, num_entries), 0.0)
        return tile.entry_rows, marked[:, :num_entries]
    return rows_of(table, tile.sequence, chosen, per_page=entries_per_page), _bias(valid)


def _joined_bias(parts: list[tuple[int, Tensor | None]], tokens: int) -> Tensor | None:
    if all(bias is None for _, bias in parts):
        return None
    filled = [torch.zeros(tokens, width) if bias is None else bias for width, bias in parts]
    return filled[0] if len(filled) == 1 else torch.cat(filled, dim=1)


def _attend(
    q_THD: Tensor,
    kv: Tensor,
    bias_TN: Tensor | None,
    sinks_H: Tensor,
    *,
    scale: float,
    sink_in_peak: bool,
) -> Tensor:
    """kv is [N, D] for all tokens or [T, N, D]; float32 scores, one rounding of the result."""
    tokens, heads, _ = q_THD.shape
    query = q_THD.float()
    shared = kv.dim() == 2
    if shared:
        scores = torch.mm(query.flatten(0, 1), kv.t()).view(tokens, heads, -1)
    else:
        scores = torch.bmm(query, kv.transpose(1, 2))
    # a scaled query would be rounded, and probabilities near a tie then round the other way
    scores *= scale
    if bias_TN is not None:
        scores += bias_TN.unsqueeze(1)
    peak = scores.amax(-1, keepdim=True)
    if sink_in_peak:
        peak = torch.maximum(peak, sinks_H[:, None])
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True) + torch.exp(sinks_H[:, None] - peak)
    if q_THD.dtype is not torch.float32:
        weights = weights.to(q_THD.dtype).float()
    mixed = torch.mm(weights.flatten(0, 1), kv).view_as(q_THD) if shared else torch.bmm(weights, kv)
    return mixed.div_(total).to(q_THD.dtype)
