"""What one token costs at least: multiply-adds and weight bytes of a model, counted from its config."""

from __future__ import annotations

from dataclasses import dataclass

from ascend_v4.config import LayerKind, ModelConfig


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Work of one token."""

    weight_elements: int
    """Matrix elements that multiply it: head included, embedding not."""
    attention_macs: int
    """Multiply-adds against window rows, compressed entries and indexer keys, full window."""


def token_cost(config: ModelConfig, *, position: int) -> TokenCost:
    """Cost of the token at `position` in the main model."""
    weights = attention = 0
    for kind in config.layer_kinds:
        weights += _layer_elements(config, kind)
        attention += _attention_macs(config, kind, position)
    return TokenCost(weights + config.vocab_size * config.hidden_size, attention)


def _layer_elements(config: ModelConfig, kind: LayerKind) -> int:
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    low = config.o_groups * config.o_lora_rank
    attention = hidden * (config.q_lora_rank + config.head_dim) + config.q_lora_rank * heads
    attention += heads * config.o_lora_rank + low * hidden
    experts = 3 * hidden * config.moe_intermediate_size * (config.num_experts_per_tok + 1)
    mixing = 2 * (2 + config.hc_mult) * config.hc_mult * config.hc_mult * hidden
    total = attention + experts + mixing + config.n_routed_experts * hidden
    if kind is not LayerKind.SWA:
        halves = 2 if kind is LayerKind.CSA else 1
        total += 2 * halves * config.head_dim * hidden
    if kind is LayerKind.CSA:
        total += config.q_lora_rank * config.index_n_heads * config.index_head_dim
        total += (config.index_n_heads + 4 * config.index_head_dim) * hidden
    return total


def _attention_macs(config: ModelConfig, kind: LayerKind, position: int) -> int:
    rows = min(config.sliding_window, position + 1)
    index = 0
    if kind is not LayerKind.SWA:
        visible = (position + 1) // kind.ratio
        rows += min(visible, config.index_topk) if kind is LayerKind.CSA else visible
        if kind is LayerKind.CSA and visible > config.index_topk:
            index = visible * config.index_n_heads * config.index_head_dim
    return 2 * rows * config.num_attention_heads * config.head_dim + index
