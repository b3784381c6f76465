"""What one forward step computes once for all layers: positions, page tables, rotations, slots and operator
plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.cache.layout import BLOCK_TOKENS, ENTRIES, STATE_GROUP, WINDOW, PageGroup
from ascend_v4.cache.pages import SequencePages
from ascend_v4.config import LayerKind, ModelConfig
from ascend_v4.model.caches import table_tensor
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of
from ascend_v4.operators.contracts.compressor import compress
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.rope import RopeFrequencies, RopeRows, rope_frequencies, rotate
from ascend_v4.operators.select import OperatorTable


@dataclass(frozen=True, kw_only=True, slots=True)
class KindPlan:
    """Plans shared by all layers of one kind; None where the kind has no such operator."""

    rope: RopeRows
    attention: Plan
    compression: CompressionStep | None
    index: Plan | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionStep:
    """A compression plan, and where its entries are cached."""

    plan: Plan
    entry_slots: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """New tokens of several sequences on their way through the layers. T packed tokens."""

    token_ids_T: Tensor
    batch: TokenBatch
    tables: dict[PageGroup, Tensor]
    window_slots_T: Tensor
    kinds: dict[LayerKind, KindPlan]


class StepPlanner:
    """Builds steps for the layer kinds of one model (or of its MTP block)."""

    def __init__(
        self, config: ModelConfig, operators: OperatorTable, kinds: Iterable[LayerKind], device: torch.device
    ) -> None:
        self._config = config
        self._operators = operators
        self._kinds = sorted(set(kinds), key=lambda kind: kind.value)
        self._device = device
        self._frequencies = {kind: _frequencies(config, kind) for kind in self._kinds}

    def plan(self, sequences: Sequence[SequencePages], token_ids: Sequence[Sequence[int]]) -> Step:
        """A step over sequences whose pages already reach over the new tokens."""
        batch = TokenBatch(
            starts=tuple(pages.num_tokens for pages in sequences),
            counts=tuple(len(ids) for ids in token_ids),
            device=self._device,
        )
        groups = sequences[0].tables
        tables = {group: table_tensor(sequences, group, device=self._device) for group in groups}
        flat_ids = [token_id for ids in token_ids for token_id in ids]
        ropes = self._ropes(batch)
        return Step(
            token_ids_T=torch.tensor(flat_ids, device=self._device),
            batch=batch,
            tables=tables,
            window_slots_T=rows_of(
                tables[WINDOW], batch.sequence_T, batch.positions_T, per_page=WINDOW.page_tokens
            ),
            kinds={kind: self._kind_plan(kind, batch, tables, ropes[kind]) for kind in self._kinds},
        )

    def _ropes(self, batch: TokenBatch) -> dict[LayerKind, RopeRows]:
        plan_rope = self._operators.plan(rotate)
        ropes: dict[LayerKind, RopeRows] = {}
        for kind in self._kinds:
            twin = LayerKind.CSA if kind is LayerKind.HCA else None
            ropes[kind] = (
                ropes[twin] if twin in ropes else plan_rope(batch.positions_T, self._frequencies[kind])
            )
        return ropes

    def _kind_plan(
        self, kind: LayerKind, batch: TokenBatch, tables: dict[PageGroup, Tensor], rope: RopeRows
    ) -> KindPlan:
        compressed = kind is not LayerKind.SWA
        entries_per_page = BLOCK_TOKENS // kind.ratio if compressed else 0
        attention = self._operators.plan(sparse_attention)(
            batch,
            ratio=kind.ratio,
            window_tokens=self._config.sliding_window,
            window_table=tables[WINDOW],
            window_page_tokens=WINDOW.page_tokens,
            compressed_table=tables[ENTRIES] if compressed else None,
            entries_per_page=entries_per_page,
        )
        if not compressed:
            return KindPlan(rope=rope, attention=attention, compression=None, index=None)
        state = STATE_GROUP[kind]
        plan = self._operators.plan(compress)(
            batch,
            ratio=kind.ratio,
            overlap=kind is LayerKind.CSA,
            state_table=tables[state],
            state_page_tokens=state.page_tokens,
            entry_table=tables[ENTRIES],
            entries_per_page=entries_per_page,
            frequencies=self._frequencies[kind],
        )
        index = None
        if kind is LayerKind.CSA:
            index = self._operators.plan(select_entries)(
                batch,
                ratio=kind.ratio,
                topk=self._config.index_topk,
                key_table=tables[ENTRIES],
                keys_per_page=entries_per_page,
            )
        compression = CompressionStep(plan=plan, entry_slots=plan.entry_slots)
        return KindPlan(rope=rope, attention=attention, compression=compression, index=index)


def _frequencies(config: ModelConfig, kind: LayerKind) -> RopeFrequencies:
    """Sliding-window layers rotate by rope_theta without YaRN, compressed layers by compress_rope_theta with
    it.
    """
    if kind is LayerKind.SWA:
        return rope_frequencies(config.qk_rope_head_dim, theta=config.rope_theta)
    if config.yarn is None:
        return rope_frequencies(config.qk_rope_head_dim, theta=config.compress_rope_theta)
    return rope_frequencies(
        config.qk_rope_head_dim,
        theta=config.compress_rope_theta,
        factor=config.yarn.factor,
        original_positions=config.yarn.original_max_position_embeddings,
        beta_fast=config.yarn.beta_fast,
        beta_slow=config.yarn.beta_slow,
    )
