"""DeepSeek-V4: embedding, blocks over hyper-connected streams, head.

Legend: T tokens, H streams, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from ascend_v4.cache.layout import LayerCaches, layer_caches
from ascend_v4.checkpoint.names import layer_names, layer_prefix, top_names
from ascend_v4.model.block import Block, HeadMixer
from ascend_v4.model.build import Builder, Layer
from ascend_v4.model.caches import CacheTensors
from ascend_v4.model.step import Step
from ascend_v4.operators.contracts.embedding import embed_tokens


class DeepSeekV4:
    """The main model. Stateless: sequences live in pages and cache tensors."""

    def __init__(self, builder: Builder) -> None:
        config, names = builder.config, top_names()
        self._num_streams, self._dtype = config.hc_mult, builder.dtype
        self._embedding_VD = builder.weights.plain(names.embedding)
        self._embed = builder.operators[embed_tokens]
        self.caches: list[LayerCaches] = [
            layer_caches(config, kind, prefix=layer_prefix(index).rstrip("."))
            for index, kind in enumerate(config.layer_kinds)
        ]
        self._blocks = [
            Block(builder, layer_names(config, index), kind=kind, caches=self.caches[index])
            for index, kind in enumerate(config.layer_kinds)
        ]
        self._mixer = HeadMixer(builder, names.head_hyper)
        self._norm = builder.norm(names.final_norm)
        self.head: Layer = builder.float32_linear(names.head)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Embeddings [T, D] in the model's dtype."""
        return self._embed(token_ids_T, self._embedding_VD, dtype=self._dtype)

    def forward(self, step: Step, tensors: CacheTensors) -> Tensor:
        """Final streams [T, H, D] of a step's tokens; caches are extended by them."""
        streams_THD = self.embed(step.token_ids_T).unsqueeze(1).repeat(1, self._num_streams, 1)
        for block in self._blocks:
            streams_THD = block(streams_THD, step, tensors)
        return streams_THD

    def logits(self, streams_THD: Tensor) -> Tensor:
        """Float32 logits [T, V] of final streams."""
        return self.head(self._norm(self._mixer(streams_THD)))
