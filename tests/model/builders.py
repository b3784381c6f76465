"""Builders for model tests: configs of odd shapes, checkpoints made of them, runners, rows of logits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from ascend_v4.checkpoint.synthesize import plan_synthesis, synthesize
from ascend_v4.config import read_config_fields, resolve_config_path
from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import ModelRunner, ModelSequence
from ascend_v4.model.load import load_model

FLOAT32_STEPS = 2.0**-16
"""Float32 rounds by 2^-24; four layers of sums over up to 512 terms in another order grow that by 2^8."""


def model_fields(**changes) -> dict:
    """A small model of all kinds: SWA with hash routing, CSA that has to choose, HCA, CSA, an MTP block.

    32 indexer heads: with few, ReLU makes many scores exactly zero, and other implementations break such ties
    another way.
    """
    fields = read_config_fields(resolve_config_path("tiny"))
    fields |= {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "compress_ratios": [0, 4, 128, 4, 0],
        "num_hash_layers": 1,
        "num_attention_heads": 4,
        "o_groups": 2,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "index_topk": 12,
        "vocab_size": 320,
    }
    return fields | changes


def make_model(directory: Path, *, seed: int = 0, **changes) -> Path:
    """A checkpoint of `model_fields` with random weights."""
    synthesize(directory, plan_synthesis(model_fields(**changes), seed=seed))
    return directory


def make_runner(checkpoint: Path, *, numerics: str = "exact", mtp: bool = False, **limits) -> ModelRunner:
    """A runner with room for a handful of sequences of several hundred tokens."""
    limits = {"max_sequence_tokens": 1024, "cache_tokens": 4096, "max_sequences": 8} | limits
    return ModelRunner(load_model(checkpoint, numerics=numerics, mtp=mtp), **limits)


def token_ids(count: int, *, seed: int, vocab_size: int = 320) -> list[int]:
    """Random token ids, the same for the same seed."""
    return random.Random(seed).choices(range(vocab_size), k=count)


def all_rows(runner: ModelRunner, ids: list[int]) -> torch.Tensor:
    """Logits after every token of a sequence that is alone and goes through whole."""
    sequence = runner.open_sequence(len(ids))
    try:
        return runner.logits(runner.streams(Chunk(sequence, ids)))
    finally:
        runner.close_sequence(sequence)


def run(runner: ModelRunner, *pieces: tuple[ModelSequence, list[int]]) -> torch.Tensor:
    """One forward of several sequences' next tokens."""
    return runner.forward([Chunk(sequence, ids) for sequence, ids in pieces])


def require_same_rows(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal up to the order of float32 sums, and the same token on top."""
    assert got.shape == want.shape
    largest = (got - want).abs().max().item()
    bound = FLOAT32_STEPS * want.abs().max().item()
    assert largest <= bound, f"rows differ by {largest:.2e}; rounding explains {bound:.2e}"
    assert torch.equal(got.argmax(-1), want.argmax(-1))


def write_prompts(path: Path, *prompts: tuple[list[int], list[int]]) -> Path:
    """A score input file of (input ids, decode ids) pairs."""
    rows = [{"input_ids": ids, "decode_ids": forced} for ids, forced in prompts]
    path.write_text(json.dumps({"prompts": rows}))
    return path
