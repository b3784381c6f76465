"""The sizes of a model that operators have limits on, by name. Pure arithmetic."""

from __future__ import annotations

from ascend_v4.cache.layout import ENTRIES, HCA_ENTRIES, WINDOW
from ascend_v4.config import LayerKind, ModelConfig
from ascend_v4.device.soc import CHIPS, Chip
from ascend_v4.errors import ConfigError


def model_sizes(config: ModelConfig, *, attention_parallel: int = 1) -> dict[str, int]:
    """Name -> value, for one rank; `attention_parallel` ranks share the attention heads.

    hidden streams heads head_dim rope_dim nope_dim row_width (elements of a key-value row) q_lora o_lora
    o_groups o_group_inputs query_outputs index_heads index_head_dim topk experts experts_per_token
    intermediate window window_block csa_block hca_block (cache rows per page) vocabulary sinkhorn.
    """
    heads = config.num_attention_heads // attention_parallel
    return {
        "hidden": config.hidden_size,
        "streams": config.hc_mult,
        "sinkhorn": config.hc_sinkhorn_iters,
        "heads": heads,
        "head_dim": config.head_dim,
        "rope_dim": config.qk_rope_head_dim,
        "nope_dim": config.nope_head_dim,
        "row_width": config.head_dim,
        "q_lora": config.q_lora_rank,
        "o_lora": config.o_lora_rank,
        "o_groups": config.o_groups,
        "o_group_inputs": config.num_attention_heads * config.head_dim // config.o_groups,
        "query_outputs": heads * config.head_dim,
        "index_heads": config.index_n_heads,
        "index_head_dim": config.index_head_dim,
        "topk": config.index_topk,
        "experts": config.n_routed_experts,
        "experts_per_token": config.num_experts_per_tok,
        "intermediate": config.moe_intermediate_size,
        "window": config.sliding_window,
        "window_block": WINDOW.page_tokens,
        "csa_block": ENTRIES.page_tokens // LayerKind.CSA.ratio,
        "hca_block": HCA_ENTRIES.page_tokens // LayerKind.HCA.ratio,
        "vocabulary": config.vocab_size,
    }


def require_attention_parallel(
    config: ModelConfig, attention_parallel: int, *, chip: Chip | None, waived: frozenset[str] = frozenset()
) -> None:
    """Raises ConfigError where the ranks cannot share the attention heads like this, on any chip or on this
    one.
    """
    heads = config.num_attention_heads
    if heads % attention_parallel:
        ways = ", ".join(str(ranks) for ranks in range(1, heads + 1) if heads % ranks == 0)
        raise ConfigError(
            f"{heads} attention heads do not divide over {attention_parallel} ranks. Use one of {ways}."
        )
    if chip is None or "heads" in waived:
        return
    taken = CHIPS[chip].attention_heads
    if taken and heads // attention_parallel not in taken:
        most = max((heads // count for count in taken if heads % count == 0), default=0)
        advice = f"use attention tensor parallelism of at most {most}" if most else "it cannot run there"
        raise ConfigError(
            f"attention on {chip.value} takes {' or '.join(map(str, taken))} heads per rank; {heads} heads "
            f"over {attention_parallel} rank(s) are {heads // attention_parallel}; "
            f"{advice}."
        )
