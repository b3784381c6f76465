"""The lightning indexer of a CSA layer: its own small keys, and the entries each token attends to."""

from __future__ import annotations

from torch import Tensor

from ascend_v4.cache.layout import ENTRIES
from ascend_v4.checkpoint.names import IndexerNames
from ascend_v4.config import LayerKind
from ascend_v4.model.build import Builder
from ascend_v4.model.compressor import Compressor
from ascend_v4.model.step import KindPlan, Step
from ascend_v4.operators.contracts.cache import write_index_keys
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.linear import linear
from ascend_v4.operators.contracts.quantize import ActivationFormat
from ascend_v4.operators.contracts.rope import rotate


class Indexer:
    """Scores compressed entries with many small heads and keeps the best."""

    def __init__(self, builder: Builder, names: IndexerNames) -> None:
        config = builder.config
        self._heads, self._head_dim = config.index_n_heads, config.index_head_dim
        self._topk, self._format = config.index_topk, builder.numerics.index
        self._weight_scale = self._head_dim**-0.5 * self._heads**-0.5
        self._query_up = builder.linear(names.query_up)
        head_weights = builder.weights.matrix(names.head_weights)
        self._head_weights = builder.operators.prepare(linear)(
            head_weights, copy=builder.unpack.take(head_weights)
        )
        self._compressor = Compressor(builder, names.compressor, overlap=True)
        self._linear = builder.operators[linear]
        self._rotate = builder.operators[rotate]
        self._write = builder.operators[write_index_keys]
        self._select = builder.operators[select_entries]

    def __call__(
        self,
        x_TD: Tensor,
        query_TQ: Tensor,
        step: Step,
        plan: KindPlan,
        *,
        key_cache: Tensor,
        state_cache: Tensor,
    ) -> Tensor | None:
        """Entry numbers [T, topk], or None for all visible; the keys of new entries are cached on the way.

        query is the normed low-rank query that attention uses too.
        """
        assert plan.compression is not None, "the indexer needs a compressed layer's plan"
        assert plan.index is not None, "the indexer needs its own plan"
        keys_ND = self._compressor(x_TD, state_cache, plan.compression)
        self._write(key_cache, keys_ND, plan.compression.entry_slots, format=self._format)
        q_THD = self._query_up(query_TQ).view(-1, self._heads, self._head_dim)
        self._rotate(q_THD, plan.rope)
        weights_TH = self._linear(x_TD, self._head_weights, activation=ActivationFormat.NONE)
        return self._select(
            q_THD,
            weights_TH * self._weight_scale,
            key_cache_CSD=key_cache,
            key_table_BP=step.tables[ENTRIES],
            batch=step.batch,
            plan=plan.index,
            ratio=LayerKind.CSA.ratio,
            topk=self._topk,
            format=self._format,
        )
