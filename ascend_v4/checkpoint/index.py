"""Every tensor a release checkpoint must hold, derived from the config alone.

Byte-exact for the published index files of Flash and Pro. Standard library only; reading files is shards.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod

from ascend_v4.checkpoint.names import (
    AttentionNames,
    BlockNames,
    CompressorNames,
    ExpertNames,
    HyperConnectionNames,
    LinearNames,
    MoeNames,
    MtpNames,
    layer_names,
    mtp_names,
    top_names,
)
from ascend_v4.config import ExpertFormat, LayerKind, ModelConfig

FP8_BLOCK = 128
"""Rows and columns of a weight that share one FP8 scale."""

FP4_GROUP = 32
"""Inputs of a row that share one FP4 scale."""

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of the safetensors dtypes that can be read."""


class Role(Enum):
    """What a tensor is for, where counting parameters or drawing random values depends on it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    LINEAR = "linear"
    EXPERT = "expert"
    SCALE = "scale"
    ROUTER = "router"
    ROUTER_BIAS = "router bias"
    TOKEN_EXPERTS = "token experts"
    SINK = "sink"
    POOL_VALUE = "pool value"
    POOL_GATE = "pool gate"
    POSITION_BIAS = "position bias"
    HYPER_MIX = "hyper-connection mix"
    HYPER_BASE = "hyper-connection base"
    HYPER_SCALE = "hyper-connection scale"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor as it lies in a file; `dtype` is the safetensors spelling."""

    shape: tuple[int, ...]
    dtype: str
    role: Role
    weight: str | None = None
    """For a scale: the name of the tensor it scales."""
    packed_elements: int = 1
    """Weights in one stored element: 2 for packed FP4."""

    @property
    def num_bytes(self) -> int:
        """Bytes the tensor takes in a file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def num_parameters(self) -> int:
        """Model parameters the tensor holds; packed FP4 counts two per byte."""
        return prod(self.shape) * self.packed_elements


Specs = dict[str, TensorSpec]


def expected_tensors(config: ModelConfig) -> Specs:
    """Every tensor of the release layout, in the release's order: layers, MTP blocks, then the rest.

    Draft blocks (dspark) are not among them: nothing of theirs is loaded.
    """
    specs: Specs = {}
    for layer_index in range(config.num_hidden_layers):
        _add_block(specs, config, layer_names(config, layer_index), kind=config.layer_kinds[layer_index])
    for mtp_index in range(config.num_mtp_blocks):
        _add_mtp(specs, config, mtp_names(config, mtp_index))
    top = top_names()
    specs[top.embedding] = TensorSpec((config.vocab_size, config.hidden_size), "BF16", Role.EMBEDDING)
    _add_norm(specs, top.final_norm, config.hidden_size)
    specs[top.head] = TensorSpec((config.vocab_size, config.hidden_size), "BF16", Role.HEAD)
    _add_hyper(specs, config, top.head_hyper, rows=config.hc_mult, scales=1)
    return specs


def fp8_scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the scale of an FP8 weight: one per 128x128 block, the last ones partial."""
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def _add_block(specs: Specs, config: ModelConfig, names: BlockNames, *, kind: LayerKind) -> None:
    _add_attention(specs, config, names.attention, kind=kind)
    _add_norm(specs, names.attention_norm, config.hidden_size)
    _add_norm(specs, names.moe_norm, config.hidden_size)
    _add_moe(specs, config, names.moe)
    for hyper in (names.attention_hyper, names.moe_hyper):
        # pre and post mix one value per stream; the residual mixing is a square of streams
        _add_hyper(specs, config, hyper, rows=config.hc_mult * (2 + config.hc_mult), scales=3)


def _add_mtp(specs: Specs, config: ModelConfig, names: MtpNames) -> None:
    hidden = config.hidden_size
    _add_block(specs, config, names.block, kind=LayerKind.SWA)
    _add_linear(specs, config, names.embedding_projection, rows=hidden, columns=hidden)
    _add_linear(specs, config, names.hidden_projection, rows=hidden, columns=hidden)
    for norm in (names.embedding_norm, names.hidden_norm, names.final_norm):
        _add_norm(specs, norm, hidden)
    _add_hyper(specs, config, names.head_hyper, rows=config.hc_mult, scales=1)


def _add_attention(specs: Specs, config: ModelConfig, names: AttentionNames, *, kind: LayerKind) -> None:
    hidden, rank = config.hidden_size, config.q_lora_rank
    heads_width = config.num_attention_heads * config.head_dim
    output_width = config.o_groups * config.o_lora_rank
    specs[names.sink] = TensorSpec((config.num_attention_heads,), "F32", Role.SINK)
    _add_linear(specs, config, names.query_down, rows=rank, columns=hidden)
    _add_norm(specs, names.query_norm, rank)
    _add_linear(specs, config, names.query_up, rows=heads_width, columns=rank)
    _add_linear(specs, config, names.key_value, rows=config.head_dim, columns=hidden)
    _add_norm(specs, names.key_value_norm, config.head_dim)
    _add_linear(specs, config, names.output_down, rows=output_width, columns=heads_width // config.o_groups)
    _add_linear(specs, config, names.output_up, rows=hidden, columns=output_width)
    if names.compressor is not None:
        _add_compressor(specs, config, names.compressor, kind=kind, entry_width=config.head_dim)
    if names.indexer is not None:
        index_width = config.index_n_heads * config.index_head_dim
        _add_linear(specs, config, names.indexer.query_up, rows=index_width, columns=rank)
        specs[names.indexer.head_weights] = TensorSpec((config.index_n_heads, hidden), "BF16", Role.LINEAR)
        _add_compressor(specs, config, names.indexer.compressor, kind=kind, entry_width=config.index_head_dim)


def _add_compressor(
    specs: Specs, config: ModelConfig, names: CompressorNames, *, kind: LayerKind, entry_width: int
) -> None:
    # CSA blocks overlap: each token has one set of channels for its own entry and one for the next
    width = entry_width * (2 if kind is LayerKind.CSA else 1)
    specs[names.position_bias] = TensorSpec((kind.ratio, width), "F32", Role.POSITION_BIAS)
    specs[names.value] = TensorSpec((width, config.hidden_size), "BF16", Role.POOL_VALUE)
    specs[names.gate] = TensorSpec((width, config.hidden_size), "BF16", Role.POOL_GATE)
    _add_norm(specs, names.norm, entry_width)


def _add_moe(specs: Specs, config: ModelConfig, names: MoeNames) -> None:
    experts = config.n_routed_experts
    specs[names.router] = TensorSpec((experts, config.hidden_size), "BF16", Role.ROUTER)
    if names.token_experts is not None:
        shape = (config.vocab_size, config.num_experts_per_tok)
        specs[names.token_experts] = TensorSpec(shape, "I64", Role.TOKEN_EXPERTS)
    if names.router_bias is not None:
        specs[names.router_bias] = TensorSpec((experts,), "F32", Role.ROUTER_BIAS)
    for expert in names.experts:
        _add_routed_expert(specs, config, expert)
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    _add_linear(specs, config, names.shared_expert.gate, rows=inner, columns=hidden)
    _add_linear(specs, config, names.shared_expert.up, rows=inner, columns=hidden)
    _add_linear(specs, config, names.shared_expert.down, rows=hidden, columns=inner)


def _add_routed_expert(specs: Specs, config: ModelConfig, names: ExpertNames) -> None:
    inner, hidden = config.moe_intermediate_size, config.hidden_size
    for linear, rows, columns in (
        (names.gate, inner, hidden),
        (names.up, inner, hidden),
        (names.down, hidden, inner),
    ):
        if linear.scale is None or config.expert_format is ExpertFormat.FP8:
            _add_linear(specs, config, linear, rows=rows, columns=columns, role=Role.EXPERT)
            continue
        specs[linear.weight] = TensorSpec((rows, columns // 2), "I8", Role.EXPERT, packed_elements=2)
        specs[linear.scale] = TensorSpec((rows, columns // FP4_GROUP), "F8_E8M0", Role.SCALE, linear.weight)


def _add_linear(
    specs: Specs,
    config: ModelConfig,
    names: LinearNames,
    *,
    rows: int,
    columns: int,
    role: Role = Role.LINEAR,
) -> None:
    if names.scale is None:
        specs[names.weight] = TensorSpec((rows, columns), "BF16", role)
        return
    specs[names.weight] = TensorSpec((rows, columns), "F8_E4M3", role)
    specs[names.scale] = TensorSpec(fp8_scale_shape(rows, columns), "F8_E8M0", Role.SCALE, names.weight)


def _add_norm(specs: Specs, name: str, width: int) -> None:
    specs[name] = TensorSpec((width,), "BF16", Role.NORM)


def _add_hyper(
    specs: Specs, config: ModelConfig, names: HyperConnectionNames, *, rows: int, scales: int
) -> None:
    specs[names.mix] = TensorSpec((rows, config.hc_mult * config.hidden_size), "F32", Role.HYPER_MIX)
    specs[names.base] = TensorSpec((rows,), "F32", Role.HYPER_BASE)
    specs[names.scale] = TensorSpec((scales,), "F32", Role.HYPER_SCALE)
