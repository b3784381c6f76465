"""The repacks that are timed: which source, to what, and which conversion dominates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ascend_v4.checkpoint.synthesize import plan_synthesis, synthesize
from ascend_v4.config import read_config_fields, resolve_config_path
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.job import Job
from ascend_v4.repack.plan import Action
from ascend_v4.repack.recipes import Target, WeightForm

PART_BYTES = 160_000_000
"""Several parts per thread, as a real checkpoint has; the default is made for hundreds of gigabytes."""

_SMALL = {
    "num_hash_layers": 0,
    "num_nextn_predict_layers": 0,
    "vocab_size": 512,
    "n_shared_experts": 1,
}

SOURCES: Mapping[str, Mapping[str, Any]] = {
    # experts of Flash's shape, and next to nothing else
    "experts": {
        **_SMALL,
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 32,
        "num_experts_per_tok": 6,
    },
    # query projections, and next to nothing else
    "linears": {
        **_SMALL,
        "hidden_size": 512,
        "num_attention_heads": 64,
        "head_dim": 512,
        "q_lora_rank": 4096,
        "o_groups": 8,
        "o_lora_rank": 128,
        "moe_intermediate_size": 128,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
    },
}
LAYERS = {"experts": 2, "linears": 8}
"""At a scale of 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One repack. `kernel` is the conversion's name in bench/transcode.py."""

    name: str
    source: str
    target: Target
    before: WeightForm
    action: Action
    kernel: str
    synced: bool = False
    """Whether it is also timed down to the disk; that says more of the disk than of the case."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def config(self, source: Path, output: Path, *, jobs: int) -> RepackConfig:
        """The repack itself."""
        return RepackConfig(
            source=source,
            output=output,
            target=self.target,
            max_part_bytes=PART_BYTES,
            jobs=jobs,
            **self.options,
        )

    def counted(self, job: Job) -> tuple[int, float]:
        """Weights of the case's own conversion, and the share of the output they and their scales are."""
        mine = [
            item for item in job.plan.conversions if item.before is self.before and item.action is self.action
        ]
        weights = sum(prod(item.shape) for item in mine)
        written_bytes = sum(output.num_bytes for item in mine for output in item.outputs)
        return weights, written_bytes / job.part_bytes


CASES = (
    Case(
        name="FP4 to INT8, exact",
        source="experts",
        target=Target.W8A8,
        before=WeightForm.FP4_GROUP,
        action=Action.FP4_TO_INT8,
        kernel="fp4 to int8, exact",
        synced=True,
    ),
    Case(
        name="FP8 to INT8",
        source="linears",
        target=Target.W8A8,
        before=WeightForm.FP8_BLOCK,
        action=Action.FP8_TO_INT8,
        kernel="fp8 to int8",
    ),
    Case(
        name="FP4 to MX",
        source="experts",
        target=Target.MX,
        before=WeightForm.FP4_GROUP,
        action=Action.COPY,
        kernel="fp4 to mx (copy)",
    ),
    Case(
        name="FP4 to bf16",
        source="experts",
        target=Target.BF16,
        before=WeightForm.FP4_GROUP,
        action=Action.FP4_TO_BF16,
        kernel="fp4 to bf16",
    ),
)


def make_source(name: str, directory: Path, *, scale: int) -> Path:
    """A random checkpoint in one shard, however large: repack's memory must not depend on it."""
    layers = LAYERS[name] * scale
    fields = {
        **read_config_fields(resolve_config_path("tiny")),
        **SOURCES[name],
        "num_hidden_layers": layers,
        "compress_ratios": [0] * layers,
    }
    target = directory / name
    synthesize(target, plan_synthesis(fields, seed=5, max_shard_bytes=1 << 40))
    return target
