"""The multi-token-prediction block: from a token's final streams and the next token, logits for the one
after.

Legend: T tokens, H streams, D hidden, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from ascend_v4.cache.layout import layer_caches
from ascend_v4.checkpoint.names import mtp_names, mtp_prefix
from ascend_v4.config import LayerKind, ModelConfig
from ascend_v4.errors import ConfigError
from ascend_v4.model.block import Block, HeadMixer
from ascend_v4.model.build import Builder
from ascend_v4.model.caches import CacheTensors
from ascend_v4.model.deepseek_v4 import DeepSeekV4
from ascend_v4.model.step import Step


def require_mtp_block(config: ModelConfig) -> None:
    """Raises ConfigError where the checkpoint has no MTP block that could run."""
    if config.draft is not None:
        raise ConfigError(
            f"--mtp cannot run here: config.json has {', '.join(config.draft.fields)}, so every mtp.* tensor "
            "belongs to a DSpark draft, not to an MTP block. Drop --mtp."
        )
    if config.num_mtp_blocks == 0:
        raise ConfigError(
            "--mtp cannot run here: num_nextn_predict_layers is 0, so the checkpoint has no MTP block. "
            "Drop --mtp."
        )


class MtpBlock:
    """Block `mtp.0`: a sliding-window layer with caches of its own; embedding and head are the main
    model's.
    """

    kind = LayerKind.SWA

    def __init__(self, builder: Builder, model: DeepSeekV4) -> None:
        config = builder.config
        names = mtp_names(config, 0)
        self._model = model
        self.caches = layer_caches(config, self.kind, prefix=mtp_prefix(0).rstrip("."))
        self._embedding_norm = builder.norm(names.embedding_norm)
        self._hidden_norm = builder.norm(names.hidden_norm)
        self._embedding_projection = builder.linear(names.embedding_projection)
        self._hidden_projection = builder.linear(names.hidden_projection)
        self._block = Block(builder, names.block, kind=self.kind, caches=self.caches)
        self._mixer = HeadMixer(builder, names.head_hyper)
        self._norm = builder.norm(names.final_norm)

    def forward(self, streams_THD: Tensor, step: Step, tensors: CacheTensors) -> Tensor:
        """Float32 logits [T, V]. The step holds, at each position t, the id of token t + 1."""
        embedded_TD = self._embedding_norm(self._model.embed(step.token_ids_T))
        hidden = self._hidden_projection(self._hidden_norm(streams_THD.flatten(0, 1))).view_as(streams_THD)
        streams_THD = self._embedding_projection(embedded_TD).unsqueeze(1) + hidden
        streams_THD = self._block(streams_THD, step, tensors)
        return self._model.head(self._norm(self._mixer(streams_THD)))
