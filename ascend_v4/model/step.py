"""What one forward step computes once for all layers: positions, page tables, rotations, slots and operator
plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.cache.layout import (
    ENTRIES,
    ENTRIES_GROUP,
    STATE_GROUP,
    WINDOW,
    PageGroup,
    entries_per_page,
)
from ascend_v4.cache.pages import SequencePages
from ascend_v4.config import LayerKind, ModelConfig
from ascend_v4.model.caches import table_tensor
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import Plan, TokenBatch, rows_of
from ascend_v4.operators.contracts.compressor import compress
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.rope import RopeFrequencies, rope_frequencies, rotate
from ascend_v4.operators.select import OperatorTable


@dataclass(frozen=True, kw_only=True, slots=True)
class KindPlan:
    """Plans shared by all layers of one kind; None where the kind has no such operator."""

    rope: Plan
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


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFrame:
    """The fixed shape of a decoding step that is recorded: one new token of each sequence, padded with
    sequences that hold no page.
    """

    num_sequences: int
    table_pages: Mapping[PageGroup, int]
    """Pages per table and group."""


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

    def plan(
        self,
        sequences: Sequence[SequencePages],
        token_ids: Sequence[Sequence[int]],
        *,
        frame: StepFrame | None = None,
    ) -> Step:
        """A step over sequences whose pages already reach over the new tokens, in a frame's shape if one is
        given.
        """
        padding = 0 if frame is None else frame.num_sequences - len(sequences)
        batch = TokenBatch(
            starts=(*(pages.num_tokens for pages in sequences), *[0] * padding),
            counts=(*(len(ids) for ids in token_ids), *[1] * padding),
            device=self._device,
        )
        tables = self._tables(sequences, frame)
        flat_ids = [token_id for ids in token_ids for token_id in ids]
        slots_T = rows_of(tables[WINDOW], batch.sequence_T, batch.positions_T, per_page=WINDOW.page_tokens)
        if frame is not None:
            slots_T = torch.where(slots_T < WINDOW.page_tokens, -1, slots_T)
        ropes = self._ropes(batch)
        return Step(
            token_ids_T=torch.tensor([*flat_ids, *[0] * padding], device=self._device),
            batch=batch,
            tables=tables,
            window_slots_T=slots_T,
            kinds={
                kind: self._kind_plan(kind, batch, tables, ropes[kind], frame=frame) for kind in self._kinds
            },
        )

    def _tables(self, sequences: Sequence[SequencePages], frame: StepFrame | None) -> dict[PageGroup, Tensor]:
        if frame is None:
            groups = sequences[0].tables
            return {group: table_tensor(sequences, group, device=self._device) for group in groups}
        return {
            group: table_tensor(sequences, group, device=self._device, shape=(frame.num_sequences, pages))
            for group, pages in frame.table_pages.items()
        }

    def _ropes(self, batch: TokenBatch) -> dict[LayerKind, Plan]:
        plan_rope = self._operators.plan(rotate)
        ropes: dict[LayerKind, Plan] = {}
        for kind in self._kinds:
            twin = LayerKind.CSA if kind is LayerKind.HCA else None
            ropes[kind] = (
                ropes[twin] if twin in ropes else plan_rope(batch.positions_T, self._frequencies[kind])
            )
        return ropes

    def _kind_plan(
        self,
        kind: LayerKind,
        batch: TokenBatch,
        tables: dict[PageGroup, Tensor],
        rope: Plan,
        *,
        frame: StepFrame | None,
    ) -> KindPlan:
        compressed = kind is not LayerKind.SWA
        per_page = entries_per_page(kind)
        config = self._config
        attention = self._operators.plan(sparse_attention)(
            batch,
            ratio=kind.ratio,
            window_tokens=config.sliding_window,
            window_table=tables[WINDOW],
            window_page_tokens=WINDOW.page_tokens,
            compressed_table=tables[ENTRIES_GROUP[kind]] if compressed else None,
            entries_per_page=per_page,
            num_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            topk=config.index_topk if kind is LayerKind.CSA else 0,
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
            entry_table=tables[ENTRIES_GROUP[kind]],
            entries_per_page=per_page,
            frequencies=self._frequencies[kind],
            # a recorded step returns a row per sequence, the completed entries first
            **({} if frame is None else {"static_rows": frame.num_sequences}),
        )
        index = None
        if kind is LayerKind.CSA:
            index = self._operators.plan(select_entries)(
                batch,
                ratio=kind.ratio,
                topk=config.index_topk,
                key_table=tables[ENTRIES],
                keys_per_page=per_page,
                num_heads=config.index_n_heads,
                head_dim=config.index_head_dim,
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
