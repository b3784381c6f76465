"""transformers' DeepseekV4ForCausalLM in float32, a second implementation by other hands, on many shapes.

It leaves out the MTP block and the native rounding: the golden sets judge these.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from ascend_v4.bench.peer import load_peer
from tests.model.builders import all_rows, make_model, make_runner, run, token_ids

pytest.importorskip("transformers", reason="transformers is not installed; it needs Python 3.11 or newer")

BOUND = 1e-4
TOKENS = 300
"""75 CSA entries and two HCA entries; prompts up to 128 tokens are all window."""

SHAPES: dict[str, dict] = {
    "every kind of layer": {},
    "sliding windows only": {"compress_ratios": [0] * 5},
    "HCA first": {"compress_ratios": [128, 128, 4, 0, 0]},
    "CSA only": {"compress_ratios": [4] * 4 + [0]},
    "no hash layer": {"num_hash_layers": 0},
    "three hash layers": {"num_hash_layers": 3},
    "all layers hash": {"num_hash_layers": 4},
    "a clamp that bites": {"swiglu_limit": 0.7},
    "one head": {"num_attention_heads": 1, "o_groups": 1},
    "six heads in three groups, narrow ranks": {
        "num_attention_heads": 6,
        "o_groups": 3,
        "o_lora_rank": 48,
        "q_lora_rank": 96,
    },
    "head of 192": {"head_dim": 192, "num_attention_heads": 2},
    "rope of 32": {"head_dim": 96, "qk_rope_head_dim": 32, "index_head_dim": 32},
    "widths off the FP8 block": {"hidden_size": 160, "moe_intermediate_size": 96, "vocab_size": 300},
    "two streams": {"hc_mult": 2},
    "eight streams, five iterations": {"hc_mult": 8, "hc_sinkhorn_iters": 5},
    "one entry chosen": {"index_topk": 1, "index_n_heads": 64},
    "every expert chosen": {"n_routed_experts": 2, "num_experts_per_tok": 2},
    "FP8 experts": {"expert_dtype": "fp8", "moe_intermediate_size": 160},
    "bfloat16 weights": {"quantization_config": None},
    "large epsilons": {"rms_norm_eps": 1e-3, "hc_eps": 1e-3, "routed_scaling_factor": 2.5},
    "no YaRN": {"rope_scaling": None},
    "other YaRN constants": {
        "rope_theta": 500000,
        "compress_rope_theta": 40000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "original_max_position_embeddings": 256,
            "beta_fast": 20,
            "beta_slow": 2,
        },
    },
}


def peer_of(checkpoint: Path, workspace: Path):
    with warnings.catch_warnings():
        # what transformers deprecates is not ours to judge
        warnings.simplefilter("ignore")
        return load_peer(checkpoint, workspace)


def require_peer_rows(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= BOUND
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_exact_logits_are_those_of_transformers(tmp_path, changes):
    checkpoint = make_model(tmp_path / "model", **changes)
    runner = make_runner(checkpoint)
    ids = token_ids(TOKENS, seed=1, vocab_size=runner.vocab_size)
    with torch.inference_mode():
        expected = peer_of(checkpoint, tmp_path)(torch.tensor([ids])).logits[0]
    require_peer_rows(all_rows(runner, ids), expected)


def test_decoding_gives_the_logits_of_transformers(tmp_path, checkpoint, runner):
    ids = token_ids(TOKENS, seed=2)
    sequence = runner.open_sequence(TOKENS)
    run(runner, (sequence, ids[:250]))
    found = torch.cat([run(runner, (sequence, [token_id])) for token_id in ids[250:]])
    with torch.inference_mode():
        expected = peer_of(checkpoint, tmp_path)(torch.tensor([ids])).logits[0, 250:]
    require_peer_rows(found, expected)


@pytest.mark.parametrize("name", ["nano", "flash-tiny"])
def test_transformers_agrees_with_us_on_golden_checkpoints(golden_dir, tmp_path, name):
    checkpoint = golden_dir(name)
    runner = make_runner(checkpoint)
    ids = token_ids(TOKENS, seed=3, vocab_size=runner.vocab_size)
    with torch.inference_mode():
        expected = peer_of(checkpoint, tmp_path)(torch.tensor([ids])).logits[0]
    require_peer_rows(all_rows(runner, ids), expected)
