"""Attention of one layer: low-rank query, one shared key-value head, window and compressed entries, grouped
output.

Legend: T tokens, H heads, D head size, G output groups.
"""

from __future__ import annotations

from torch import Tensor

from ascend_v4.cache.layout import ENTRIES_GROUP, WINDOW, LayerCaches
from ascend_v4.checkpoint.names import AttentionNames
from ascend_v4.config import LayerKind
from ascend_v4.model.build import Builder
from ascend_v4.model.caches import CacheTensors
from ascend_v4.model.compressor import Compressor
from ascend_v4.model.indexer import Indexer
from ascend_v4.model.step import KindPlan, Step
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.cache import write_kv
from ascend_v4.operators.contracts.linear import grouped_linear
from ascend_v4.operators.contracts.norm import head_rms_norm
from ascend_v4.operators.contracts.rope import rotate


class Attention:
    """SWA, CSA or HCA, by the layer's kind."""

    def __init__(
        self, builder: Builder, names: AttentionNames, *, kind: LayerKind, caches: LayerCaches
    ) -> None:
        config = builder.config
        self._kind, self._caches = kind, caches
        self._heads, self._head_dim = config.num_attention_heads, config.head_dim
        self._groups, self._nope_dim = config.o_groups, config.nope_head_dim
        self._window_tokens, self._eps = config.sliding_window, config.rms_norm_eps
        self._kv_format, self._rounds_once = builder.numerics.kv, builder.numerics.rounds_once
        self._sink_in_peak = builder.numerics.sink_in_peak
        self._query_down, self._query_norm = builder.linear(names.query_down), builder.norm(names.query_norm)
        self._query_up = builder.linear(names.query_up)
        self._key_value = builder.linear(names.key_value)
        self._key_value_norm = builder.norm(names.key_value_norm)
        output_down = builder.weights.linear(names.output_down)
        self._output_down = builder.operators.prepare(grouped_linear)(
            output_down, copy=builder.unpack.take(output_down)
        )
        self._grouped_activation = builder.numerics.grouped_activation_of(output_down.format)
        self._output_up = builder.linear(names.output_up)
        self._sinks_H = builder.weights.float32(names.sink)
        self._compressor = (
            None
            if names.compressor is None
            else Compressor(builder, names.compressor, overlap=kind is LayerKind.CSA)
        )
        self._indexer = None if names.indexer is None else Indexer(builder, names.indexer)
        self._head_norm = builder.operators[head_rms_norm]
        self._rotate = builder.operators[rotate]
        self._write_kv = builder.operators[write_kv]
        self._attend = builder.operators[sparse_attention]
        self._grouped = builder.operators[grouped_linear]

    def __call__(self, x_TD: Tensor, step: Step, tensors: CacheTensors) -> Tensor:
        """Sublayer output [T, hidden] of normed inputs x [T, hidden]; caches are extended on the way."""
        plan = step.kinds[self._kind]
        query_TQ = self._query_norm(self._query_down(x_TD))
        q_THD = self._head_norm(
            self._query_up(query_TQ).view(-1, self._heads, self._head_dim),
            eps=self._eps,
            rounded_once=self._rounds_once,
        )
        self._rotate(q_THD, plan.rope)
        window = tensors[self._caches.window]
        self._write_window(x_TD, window, step, plan)
        selected_TK = self._compress(x_TD, query_TQ, step, plan, tensors)
        entries = self._caches.entries
        out_THD = self._attend(
            q_THD,
            window,
            window_table_BP=step.tables[WINDOW],
            compressed_cache_CSD=None if entries is None else tensors[entries],
            compressed_table_BP=None if entries is None else step.tables[ENTRIES_GROUP[self._kind]],
            selected_TK=selected_TK,
            sinks_H=self._sinks_H,
            batch=step.batch,
            plan=plan.attention,
            ratio=self._kind.ratio,
            window_tokens=self._window_tokens,
            scale=self._head_dim**-0.5,
            sink_in_peak=self._sink_in_peak,
        )
        self._rotate(out_THD, plan.rope, inverse=True)
        grouped_TGK = out_THD.view(len(out_THD), self._groups, -1)
        low_TGR = self._grouped(grouped_TGK, self._output_down, activation=self._grouped_activation)
        return self._output_up(low_TGR.flatten(1))

    def _write_window(self, x_TD: Tensor, window: Tensor, step: Step, plan: KindPlan) -> None:
        kv_TD = self._key_value_norm(self._key_value(x_TD))
        self._rotate(kv_TD.unsqueeze(1), plan.rope)
        self._write_kv(window, kv_TD, step.window_slots_T, nope_dim=self._nope_dim, format=self._kv_format)

    def _compress(
        self, x_TD: Tensor, query_TQ: Tensor, step: Step, plan: KindPlan, tensors: CacheTensors
    ) -> Tensor | None:
        if self._compressor is None:
            return None
        caches = self._caches
        assert caches.entries is not None, self._kind
        assert caches.state is not None, self._kind
        assert plan.compression is not None, self._kind
        entries_ND = self._compressor(x_TD, tensors[caches.state], plan.compression)
        self._write_kv(
            tensors[caches.entries],
            entries_ND,
            plan.compression.entry_slots,
            nope_dim=self._nope_dim,
            format=self._kv_format,
        )
        if self._indexer is None:
            return None
        assert caches.index_keys is not None, self._kind
        assert caches.index_state is not None, self._kind
        return self._indexer(
            x_TD,
            query_TQ,
            step,
            plan,
            key_cache=tensors[caches.index_keys],
            state_cache=tensors[caches.index_state],
        )
