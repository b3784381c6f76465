"""The Hugging Face layout: bf16 under the release's names, for `DeepseekV4ForCausalLM.from_pretrained`.

transformers 5 maps the release's names itself and ignores `mtp.*`; these stay in the files, so that a model
fine-tuned elsewhere can be put together with its MTP blocks again. config.json loses quantization_config and
expert_dtype, and rope_scaling says `rope_type` as transformers 5 spells it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ascend_v4.checkpoint.names import CONFIG_FILE, INDEX_FILE
from ascend_v4.config import ModelConfig
from ascend_v4.errors import ConfigError
from ascend_v4.repack.layouts.base import DocumentInputs, LayoutName, without_release_fields
from ascend_v4.repack.layouts.parts import (
    DEFAULT_PART_BYTES,
    Part,
    cut_parts,
    index_document,
    json_document,
)
from ascend_v4.repack.layouts.ranks import Ranks
from ascend_v4.repack.plan import RepackPlan
from ascend_v4.repack.recipes import Target

STEM = "model"


class HuggingfaceLayout:
    """`model-0000x-of-0000y.safetensors`, the index and a config that transformers takes."""

    name = LayoutName.HUGGINGFACE

    def parts(
        self,
        config: ModelConfig,
        plan: RepackPlan,
        *,
        max_part_bytes: int = DEFAULT_PART_BYTES,
        ranks: Ranks | None = None,
    ) -> tuple[Part, ...]:
        """The weight files. Raises ConfigError for anything but --to bf16 without ranks and kept scales."""
        if plan.recipe.target is not Target.BF16:
            raise ConfigError(
                f"--layout huggingface holds bf16 only, not --to {plan.recipe.target.value}. "
                "Use --to bf16, or --layout native."
            )
        if ranks is not None or plan.reversible:
            option = "--ranks" if ranks is not None else "--reversible"
            raise ConfigError(f"{option} does not go with --layout huggingface. Use --layout native.")
        return cut_parts(plan.conversions, max_part_bytes=max_part_bytes, stem=STEM)

    def documents(
        self, plan: RepackPlan, parts: tuple[Part, ...], inputs: DocumentInputs
    ) -> dict[str, bytes]:
        """config.json and the index."""
        return {
            CONFIG_FILE: json_document(_config_fields(inputs.config_fields)),
            INDEX_FILE: index_document(parts),
        }


def _config_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    plain = without_release_fields(fields)
    scaling = plain.get("rope_scaling")
    if isinstance(scaling, Mapping) and "rope_type" not in scaling and "type" in scaling:
        plain["rope_scaling"] = {**scaling, "rope_type": scaling["type"]}
    return {**plain, "torch_dtype": "bfloat16"}
