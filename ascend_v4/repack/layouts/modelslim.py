"""The ModelSlim layout: what vLLM-Ascend, SGLang and xLLM load on Ascend.

Release names, `weight_scale` and `weight_offset` beside INT8 weights, `scale_bias` beside INT4, and a type
per tensor in quant_model_description.json. config.json has no quantization_config. Nothing is rotated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ascend_v4.checkpoint.names import CONFIG_FILE
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
from ascend_v4.repack.plan import Action, Conversion, OutputTensor, RepackPlan
from ascend_v4.repack.recipes import Target, WeightForm, has_split_bias
from ascend_v4.repack.source_forms import WEIGHT_SUFFIX, TensorKind

STEM = "quant_model_weights"
MODELSLIM_INDEX_FILE = "quant_model_weights.safetensors.index.json"
DESCRIPTION_FILE = "quant_model_description.json"
DESCRIPTION_VERSION = "1.0.0"
BIAS_SPLITS = 16
FLOAT = "FLOAT"

_TYPES: dict[WeightForm, str] = {
    WeightForm.INT8_CHANNEL: "W8A8_DYNAMIC",
    WeightForm.INT4_CHANNEL: "W4A8_DYNAMIC",
    WeightForm.MXFP8: "W8A8_MXFP8",
    WeightForm.FP4_GROUP: "W4A8_MXFP",
}
_MODEL_TYPES: dict[Target, str] = {
    Target.W8A8: "W8A8_DYNAMIC",
    Target.W4A8: "W4A8_DYNAMIC",
    Target.MX: "W8A8_MXFP8",
}


class ModelslimLayout:
    """Parts `quant_model_weights-0000x-of-0000y.safetensors` and a description that names every tensor."""

    name = LayoutName.MODELSLIM

    def parts(
        self,
        config: ModelConfig,
        plan: RepackPlan,
        *,
        max_part_bytes: int = DEFAULT_PART_BYTES,
        ranks: Ranks | None = None,
    ) -> tuple[Part, ...]:
        """The weight files. Raises ConfigError for targets, ranks and kept scales it has no place for."""
        if plan.recipe.target not in _MODEL_TYPES:
            fitting = ", ".join(target.value for target in _MODEL_TYPES)
            raise ConfigError(
                f"--layout modelslim does not hold --to {plan.recipe.target.value}; it holds {fitting}. "
                "Use --layout native."
            )
        if ranks is not None:
            raise ConfigError("--ranks does not go with --layout modelslim. Use --layout native.")
        if any(_is_kept(output) for item in plan.conversions for output in item.outputs):
            raise ConfigError(
                "--layout modelslim has no place for the release's scales: its loaders refuse tensors they "
                "do not know. Use --layout native with --reversible."
            )
        adapted = (_adapt(item) for item in plan.conversions)
        return cut_parts(adapted, max_part_bytes=max_part_bytes, stem=STEM)

    def documents(
        self, plan: RepackPlan, parts: tuple[Part, ...], inputs: DocumentInputs
    ) -> dict[str, bytes]:
        """config.json, the index and the description."""
        types = _tensor_types(item for part in parts for item in part.conversions)
        # only the groups of MX are groups in this format; INT8 and INT4 have one scale per row
        description = {
            **types,
            "model_quant_type": _MODEL_TYPES[plan.recipe.target],
            "version": DESCRIPTION_VERSION,
            "group_size": 32 if plan.recipe.target is Target.MX else 0,
            "metadata": {
                "producer": "ascend-v4",
                "recipe": plan.recipe.name,
                "rounding": plan.rounding.value,
                "rotation": "none",
            },
            "optional": {},
        }
        return {
            CONFIG_FILE: json_document(without_release_fields(inputs.config_fields)),
            MODELSLIM_INDEX_FILE: index_document(parts),
            DESCRIPTION_FILE: json_document(description),
        }


def _is_kept(output: OutputTensor) -> bool:
    return output.kind in (TensorKind.RELEASE_SCALE, TensorKind.RELEASE_WEIGHT, TensorKind.NEGATIVE_ZEROS)


def _tensor_types(conversions: Iterable[Conversion]) -> dict[str, str]:
    return {output.name: _TYPES.get(item.after, FLOAT) for item in conversions for output in item.outputs}


def _adapt(item: Conversion) -> Conversion:
    """The same conversion with this layout's companions; offsets come last and are zeros."""
    stem = item.name.removesuffix(WEIGHT_SUFFIX)
    if item.after in (WeightForm.MXFP8, WeightForm.FP4_GROUP):
        return replace(item, outputs=_as_bytes(stem, item.outputs))
    if item.after not in (WeightForm.INT8_CHANNEL, WeightForm.INT4_CHANNEL):
        return item
    rows = item.shape[0]
    outputs = [
        _bias(item, stem, output) if output.kind is TensorKind.BIAS else output for output in item.outputs
    ]
    outputs.append(OutputTensor(f"{stem}weight_offset", TensorKind.OFFSET, "F32", (rows, 1)))
    return replace(item, outputs=tuple(outputs))


def _bias(item: Conversion, stem: str, output: OutputTensor) -> OutputTensor:
    rows = item.shape[0]
    shape = (rows, BIAS_SPLITS) if has_split_bias(item.name) else (rows, 1)
    if item.action is Action.COPY and output.shape != shape:
        raise ConfigError(
            f"{output.name} of this pack has shape {list(output.shape)}; --layout modelslim needs "
            f"{list(shape)}. Repack the official files with --layout modelslim."
        )
    return replace(output, name=f"{stem}scale_bias", shape=shape)


def _as_bytes(stem: str, outputs: Sequence[OutputTensor]) -> tuple[OutputTensor, ...]:
    """MX codes under this layout's names: E8M0 scales and packed FP4 are plain bytes there."""
    renamed = []
    for output in outputs:
        if output.kind is TensorKind.SCALE:
            renamed.append(replace(output, name=f"{stem}weight_scale", dtype="U8"))
        else:
            renamed.append(replace(output, dtype="U8" if output.dtype == "I8" else output.dtype))
    return tuple(renamed)
