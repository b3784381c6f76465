"""Where each part of the model lies in a release checkpoint: the only file that spells checkpoint names.

The model builder asks for `top_names()`, `layer_names(config, i)` and `mtp_names(config, i)` and reads
attributes that say what a tensor does; what is None does not exist for that layer. Shapes and dtypes are in
index.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from ascend_v4.config import LayerKind, ModelConfig

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MTP_PREFIX = "mtp."

PACK_FILE = "ascend_v4.json"
"""Description of a native pack."""
DESCRIPTION_FILE = "quant_model_description.json"
"""Description of a ModelSlim pack."""
MANIFEST_FILE = "manifest.json"
"""Written last by a repack: without it an output is unfinished."""
JOURNAL_FILE = "repack.journal"
"""There while a repack runs, or after one was interrupted."""


@dataclass(frozen=True, slots=True)
class LinearNames:
    """A matrix product. `scale` is None where the weight is stored unquantised."""

    weight: str
    scale: str | None


@dataclass(frozen=True, slots=True)
class CompressorNames:
    """Pools the key-values of a block of tokens into one entry."""

    position_bias: str
    value: str
    gate: str
    norm: str


@dataclass(frozen=True, slots=True)
class IndexerNames:
    """Lightning indexer of a CSA layer."""

    query_up: LinearNames
    head_weights: str
    compressor: CompressorNames


@dataclass(frozen=True, slots=True)
class AttentionNames:
    """Attention of one layer; `compressor` is None for SWA, `indexer` is None for all but CSA."""

    query_down: LinearNames
    query_norm: str
    query_up: LinearNames
    key_value: LinearNames
    key_value_norm: str
    output_down: LinearNames
    output_up: LinearNames
    sink: str
    compressor: CompressorNames | None
    indexer: IndexerNames | None


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """A SwiGLU feed-forward: down(silu(gate x) * up x)."""

    gate: LinearNames
    up: LinearNames
    down: LinearNames


@dataclass(frozen=True, slots=True)
class MoeNames:
    """Routed and shared experts; `token_experts` exists under hash routing, `router_bias` otherwise."""

    router: str
    router_bias: str | None
    token_experts: str | None
    experts: tuple[ExpertNames, ...]
    shared_expert: ExpertNames


@dataclass(frozen=True, slots=True)
class HyperConnectionNames:
    """Mixing of the residual streams around one sublayer, or in front of the head."""

    mix: str
    base: str
    scale: str


@dataclass(frozen=True, slots=True)
class BlockNames:
    """One transformer block."""

    attention: AttentionNames
    attention_norm: str
    moe: MoeNames
    moe_norm: str
    attention_hyper: HyperConnectionNames
    moe_hyper: HyperConnectionNames


@dataclass(frozen=True, slots=True)
class MtpNames:
    """One multi-token-prediction block; embedding and head are the main model's."""

    block: BlockNames
    embedding_norm: str
    hidden_norm: str
    embedding_projection: LinearNames
    hidden_projection: LinearNames
    head_hyper: HyperConnectionNames
    final_norm: str


@dataclass(frozen=True, slots=True)
class TopNames:
    """Tensors outside the blocks."""

    embedding: str
    final_norm: str
    head: str
    head_hyper: HyperConnectionNames


def layer_prefix(layer_index: int) -> str:
    """What the names of a layer start with."""
    return f"layers.{layer_index}."


def mtp_prefix(mtp_index: int) -> str:
    """What the names of an MTP block start with."""
    return f"{MTP_PREFIX}{mtp_index}."


def is_mtp(name: str) -> bool:
    """Whether a tensor belongs to an MTP or draft block."""
    return name.startswith(MTP_PREFIX)


def top_names() -> TopNames:
    """Names of the tensors outside the blocks."""
    return TopNames(
        embedding="embed.weight", final_norm="norm.weight", head="head.weight", head_hyper=_hyper("hc_head_")
    )


def layer_names(config: ModelConfig, layer_index: int) -> BlockNames:
    """Names of one layer of the main model."""
    return _block(
        config,
        layer_prefix(layer_index),
        kind=config.layer_kinds[layer_index],
        hash_routed=config.is_hash_routed(layer_index),
    )


def mtp_names(config: ModelConfig, mtp_index: int) -> MtpNames:
    """Names of one MTP block: a sliding-window block with learned routing, and what feeds and follows it."""
    prefix = mtp_prefix(mtp_index)
    return MtpNames(
        block=_block(config, prefix, kind=LayerKind.SWA, hash_routed=False),
        embedding_norm=f"{prefix}enorm.weight",
        hidden_norm=f"{prefix}hnorm.weight",
        embedding_projection=_linear(config, f"{prefix}e_proj"),
        hidden_projection=_linear(config, f"{prefix}h_proj"),
        head_hyper=_hyper(f"{prefix}hc_head_"),
        final_norm=f"{prefix}norm.weight",
    )


def _linear(config: ModelConfig, path: str) -> LinearNames:
    return LinearNames(f"{path}.weight", f"{path}.scale" if config.quantized else None)


def _hyper(stem: str) -> HyperConnectionNames:
    return HyperConnectionNames(mix=f"{stem}fn", base=f"{stem}base", scale=f"{stem}scale")


def _block(config: ModelConfig, prefix: str, *, kind: LayerKind, hash_routed: bool) -> BlockNames:
    return BlockNames(
        attention=_attention(config, f"{prefix}attn.", kind),
        attention_norm=f"{prefix}attn_norm.weight",
        moe=_moe(config, f"{prefix}ffn.", hash_routed),
        moe_norm=f"{prefix}ffn_norm.weight",
        attention_hyper=_hyper(f"{prefix}hc_attn_"),
        moe_hyper=_hyper(f"{prefix}hc_ffn_"),
    )


def _attention(config: ModelConfig, prefix: str, kind: LayerKind) -> AttentionNames:
    indexer = None
    if kind is LayerKind.CSA:
        indexer = IndexerNames(
            query_up=_linear(config, f"{prefix}indexer.wq_b"),
            head_weights=f"{prefix}indexer.weights_proj.weight",
            compressor=_compressor(f"{prefix}indexer.compressor."),
        )
    return AttentionNames(
        query_down=_linear(config, f"{prefix}wq_a"),
        query_norm=f"{prefix}q_norm.weight",
        query_up=_linear(config, f"{prefix}wq_b"),
        key_value=_linear(config, f"{prefix}wkv"),
        key_value_norm=f"{prefix}kv_norm.weight",
        output_down=_linear(config, f"{prefix}wo_a"),
        output_up=_linear(config, f"{prefix}wo_b"),
        sink=f"{prefix}attn_sink",
        compressor=None if kind is LayerKind.SWA else _compressor(f"{prefix}compressor."),
        indexer=indexer,
    )


def _compressor(prefix: str) -> CompressorNames:
    return CompressorNames(
        position_bias=f"{prefix}ape",
        value=f"{prefix}wkv.weight",
        gate=f"{prefix}wgate.weight",
        norm=f"{prefix}norm.weight",
    )


def _moe(config: ModelConfig, prefix: str, hash_routed: bool) -> MoeNames:
    return MoeNames(
        router=f"{prefix}gate.weight",
        router_bias=None if hash_routed else f"{prefix}gate.bias",
        token_experts=f"{prefix}gate.tid2eid" if hash_routed else None,
        experts=tuple(_expert(config, f"{prefix}experts.{i}.") for i in range(config.n_routed_experts)),
        shared_expert=_expert(config, f"{prefix}shared_experts."),
    )


def _expert(config: ModelConfig, prefix: str) -> ExpertNames:
    return ExpertNames(
        gate=_linear(config, f"{prefix}w1"),
        up=_linear(config, f"{prefix}w3"),
        down=_linear(config, f"{prefix}w2"),
    )
