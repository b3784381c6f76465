"""Builders for checkpoint tests: a small config, a checkpoint made of it, and ways to damage one."""

from __future__ import annotations

import json
from pathlib import Path

from ascend_v4.checkpoint.synthesize import plan_synthesis, synthesize
from ascend_v4.config import ModelConfig, parse_model_config, read_config_fields, resolve_config_path

INDEX = "model.safetensors.index.json"


def small_fields(**changes) -> dict:
    """The tiny model cut down: SWA with hash routing, CSA, HCA, an MTP block and four experts."""
    fields = read_config_fields(resolve_config_path("tiny"))
    fields |= {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "compress_ratios": [0, 4, 128, 0],
        "num_hash_layers": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "num_attention_heads": 4,
        "o_groups": 2,
        "index_n_heads": 8,
        "q_lora_rank": 160,
    }
    return fields | changes


def small_config(**changes) -> ModelConfig:
    """Config of `small_fields`."""
    return parse_model_config(small_fields(**changes))


def make_small(directory: Path, *, seed: int = 0, max_shard_bytes: int = 300_000, **changes) -> Path:
    """A checkpoint of the small model, in several shards."""
    plan = plan_synthesis(small_fields(**changes), seed=seed, max_shard_bytes=max_shard_bytes)
    synthesize(directory, plan)
    return directory


def read_header(shard: Path) -> dict:
    """Header of a shard, without its metadata."""
    raw = shard.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    return header


def write_header(shard: Path, header: dict) -> None:
    """Give a shard another header and keep its tensors."""
    raw = shard.read_bytes()
    tensors = raw[8 + int.from_bytes(raw[:8], "little") :]
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


def shard_of(directory: Path, name: str) -> Path:
    """The shard that the index says holds a tensor."""
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][name]


def edit_entry(directory: Path, name: str, **changes) -> None:
    """Change what a shard's header says of one tensor."""
    shard = shard_of(directory, name)
    header = read_header(shard)
    header[name] |= changes
    write_header(shard, header)


def edit_weight_map(directory: Path, edit) -> None:
    """Change the index's weight_map in place."""
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))
