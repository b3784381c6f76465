"""Shapes that no golden set has, over simulated operators and on the CPU: other head counts, widths, expert
counts, output groups and routings, one layer of a kind each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ascend_v4.operators import simulator
from tests.model.builders import make_model, token_ids
from tools.golden_report import Closeness
from tools.sim_report import ONE_LAYER

VOCAB = 384
SHAPES: dict[str, dict[str, Any]] = {
    "swa": {
        "compress_ratios": [0, 0],
        "num_attention_heads": 12,
        "o_groups": 3,
        "hidden_size": 384,
        "n_routed_experts": 9,
        "num_experts_per_tok": 3,
        "swiglu_limit": 0.7,
    },
    "swa-hash": {
        "compress_ratios": [0, 0],
        "num_hash_layers": 1,
        "num_attention_heads": 4,
        "o_groups": 1,
        "head_dim": 192,
        "n_routed_experts": 3,
        "num_experts_per_tok": 1,
        "routed_scaling_factor": 2.5,
    },
    "csa": {
        "compress_ratios": [4, 0],
        "num_attention_heads": 8,
        "o_groups": 8,
        "index_n_heads": 64,
        "index_topk": 20,
        "n_routed_experts": 12,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 256,
    },
    "csa-hash": {
        "compress_ratios": [4, 0],
        "num_hash_layers": 1,
        "num_attention_heads": 16,
        "o_groups": 2,
        "index_n_heads": 32,
        "index_topk": 7,
        "hidden_size": 256,
        "q_lora_rank": 256,
    },
    "hca": {
        "compress_ratios": [128, 0],
        "num_attention_heads": 4,
        "o_groups": 4,
        "head_dim": 256,
        "o_lora_rank": 256,
        "n_routed_experts": 5,
        "num_experts_per_tok": 4,
    },
    "hca-wide": {
        "compress_ratios": [128, 0],
        "num_attention_heads": 8,
        "o_groups": 4,
        "head_dim": 512,
        "hidden_size": 512,
        "moe_intermediate_size": 384,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
    },
}
ONE = {"num_hidden_layers": 1, "num_hash_layers": 0, "vocab_size": VOCAB}
TARGETS = {"a3": "w8a8", "950": "mx", "a2": "w4a8"}


def quick(shape: str, chip: str) -> bool:
    """Every shape on one chip, every chip with two shapes."""
    return list(TARGETS)[list(SHAPES).index(shape) % len(TARGETS)] == chip


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """A checkpoint of each shape, made once."""
    made: dict[str, Path] = {}

    def find(shape: str) -> Path:
        if shape not in made:
            folder = tmp_path_factory.mktemp("shape") / shape
            made[shape] = make_model(folder, seed=7, **(ONE | SHAPES[shape]))
        return made[shape]

    return find


@pytest.mark.parametrize(
    ("shape", "chip"),
    [
        pytest.param(shape, chip, marks=() if quick(shape, chip) else pytest.mark.slow)
        for shape in SHAPES
        for chip in TARGETS
    ],
)
def test_other_shapes_agree_with_the_cpu_engine(checkpoint_of, run_cli, tmp_path, shape, chip):
    folder = checkpoint_of(shape)
    prompts = [
        {"input_ids": ids[:-20], "decode_ids": ids[-20:]}
        for ids in (token_ids(count, seed=count, vocab_size=VOCAB) for count in (21, 120, 210))
    ]
    (tmp_path / "in.json").write_text(json.dumps({"prompts": prompts}))

    def scored(name: str, *flags: str) -> torch.Tensor:
        output = tmp_path / f"{name}.safetensors"
        asked = ("--input", tmp_path / "in.json", "--output", output, "--quantize", TARGETS[chip])
        result = run_cli("score", folder, *asked, *flags)
        assert result.exit_code == 0, result.stderr
        rows = load_file(output)
        return torch.cat([rows[each] for each in sorted(rows)]).double()

    want = scored("cpu")
    try:
        sim = ("--device", "sim", "--chip", chip, "--waive-limits", "sizes", "--sim-arithmetic", "ideal")
        got = scored("sim", *sim, "--chunk", "100")
    finally:
        simulator.uninstall()
    close = Closeness(
        worst=(got - want).abs().max().item(),
        cosine=torch.cosine_similarity(got, want, dim=1).mean().item(),
        argmax=(got.argmax(1) == want.argmax(1)).double().mean().item(),
    )
    assert ONE_LAYER["ideal"].keep(close), f"{close} over {len(want)} rows"
