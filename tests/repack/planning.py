"""Builders for tests of plans and layouts: small models, their tensors, and a pack's own tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ascend_v4.checkpoint.index import expected_tensors
from ascend_v4.config import ModelConfig, parse_model_config, read_config_fields, resolve_config_path
from ascend_v4.repack.plan import Conversion, RepackPlan, plan_outputs
from ascend_v4.repack.recipes import Target, load_recipe


@dataclass(frozen=True, slots=True)
class Shape:
    """A tensor as far as a plan looks at it."""

    dtype: str
    shape: tuple[int, ...]


def model_fields(name="tiny", **changes):
    fields = read_config_fields(resolve_config_path(name))
    return {**fields, **changes}


def model_config(name="tiny", **changes) -> ModelConfig:
    return parse_model_config(model_fields(name, **changes))


def release_tensors(config) -> dict[str, Shape]:
    return {name: Shape(spec.dtype, spec.shape) for name, spec in expected_tensors(config).items()}


def written_tensors(plan: RepackPlan) -> dict[str, Shape]:
    return {
        output.name: Shape(output.dtype, output.shape) for item in plan.conversions for output in item.outputs
    }


def planned(target: Target, name=None, *, config=None, tensors=None, **options) -> RepackPlan:
    config = config or model_config()
    return plan_outputs(config, tensors or release_tensors(config), load_recipe(target, name), **options)


def conversion(plan: RepackPlan, name: str) -> Conversion:
    return next(item for item in plan.conversions if item.name == name)


def draft_model():
    """A model with three DSpark draft blocks: known parts, and two tensors nobody has a rule for."""
    config = model_config(
        dspark_block_size=5,
        dspark_target_layer_ids=[3, 4, 5],
        num_nextn_predict_layers=3,
        compress_ratios=[0, 0, 4, 128, 4, 128, 0, 0, 0],
    )
    blocks = {
        name: shape for name, shape in release_tensors(model_config()).items() if name.startswith("mtp.0.")
    }
    drafts = {
        name.replace("mtp.0.", f"mtp.{block}."): shape for block in range(3) for name, shape in blocks.items()
    }
    unknown = {
        "mtp.2.markov.weight": Shape("F8_E4M3", (256, 256)),
        "mtp.2.markov.scale": Shape("F8_E8M0", (2, 2)),
        "mtp.1.confidence": Shape("F32", (3,)),
    }
    return config, {**release_tensors(config), **drafts, **unknown}
