"""One transformer block: attention and experts, each between two hyper-connections.

Legend: T tokens, H streams.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ascend_v4.cache.layout import LayerCaches
from ascend_v4.checkpoint.names import BlockNames, HyperConnectionNames
from ascend_v4.config import LayerKind
from ascend_v4.model.attention import Attention
from ascend_v4.model.build import Builder
from ascend_v4.model.caches import CacheTensors
from ascend_v4.model.moe import MixtureOfExperts
from ascend_v4.model.step import Step
from ascend_v4.operators.contracts.hyper_connections import (
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_pre,
    round_to_hf32,
)


class HyperConnection:
    """The residual around one sublayer: mixes the streams into its input, and its output back into the
    streams.
    """

    def __init__(self, builder: Builder, names: HyperConnectionNames) -> None:
        fn_MF, self._scale, self._base = builder.weights.hyper_connection(names)
        self._fn = round_to_hf32(fn_MF) if builder.numerics.hf32_mixing else fn_MF
        self._iterations = builder.config.hc_sinkhorn_iters
        self._norm_eps, self._mix_eps = builder.config.rms_norm_eps, builder.config.hc_eps
        self._pre = builder.operators[hyper_connection_pre]
        self._post = builder.operators[hyper_connection_post]

    def __call__(self, streams_THD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """New streams after one sublayer."""
        x_TD, post_TH, mix_THH = self._pre(
            streams_THD,
            self._fn,
            self._scale,
            self._base,
            sinkhorn_iterations=self._iterations,
            norm_eps=self._norm_eps,
            mix_eps=self._mix_eps,
        )
        return self._post(sublayer(x_TD), streams_THD, post_TH, mix_THH)


class HeadMixer:
    """Collapses the streams into one, in front of the final norm."""

    def __init__(self, builder: Builder, names: HyperConnectionNames) -> None:
        self._fn, self._scale, self._base = builder.weights.hyper_connection(names)
        self._norm_eps, self._mix_eps = builder.config.rms_norm_eps, builder.config.hc_eps
        self._collapse = builder.operators[hyper_connection_head]

    def __call__(self, streams_THD: Tensor) -> Tensor:
        """[T, hidden]."""
        return self._collapse(
            streams_THD, self._fn, self._scale, self._base, norm_eps=self._norm_eps, mix_eps=self._mix_eps
        )


class Block:
    """A layer of the main model, or the one inside the MTP block."""

    def __init__(self, builder: Builder, names: BlockNames, *, kind: LayerKind, caches: LayerCaches) -> None:
        self._attention = Attention(builder, names.attention, kind=kind, caches=caches)
        self._attention_norm = builder.norm(names.attention_norm)
        self._attention_hyper = HyperConnection(builder, names.attention_hyper)
        self._moe = MixtureOfExperts(builder, names.moe)
        self._moe_norm = builder.norm(names.moe_norm)
        self._moe_hyper = HyperConnection(builder, names.moe_hyper)

    def __call__(self, streams_THD: Tensor, step: Step, tensors: CacheTensors) -> Tensor:
        """Streams after attention and experts; the layer's caches are extended on the way."""

        def attend(x_TD: Tensor) -> Tensor:
            return self._attention(self._attention_norm(x_TD), step, tensors)

        def feed_forward(x_TD: Tensor) -> Tensor:
            return self._moe(self._moe_norm(x_TD), step.token_ids_T)

        streams_THD = self._attention_hyper(streams_THD, attend)
        return self._moe_hyper(streams_THD, feed_forward)
