"""The native layout: the release's names and files, and ascend_v4.json saying how each weight is stored.

config.json loses quantization_config and expert_dtype, except for --to release; ascend_v4.json keeps them
as `release_fields`. With ranks, each rank has a folder that is a pack by itself, with slices stated.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ascend_v4.checkpoint.names import CONFIG_FILE, INDEX_FILE
from ascend_v4.config import ModelConfig
from ascend_v4.repack.layouts.base import (
    RELEASE_FIELDS,
    DocumentInputs,
    LayoutName,
    restore_release_fields,
    without_release_fields,
)
from ascend_v4.repack.layouts.parts import (
    DEFAULT_PART_BYTES,
    Part,
    cut_parts,
    index_document,
    json_document,
    rank_folder,
)
from ascend_v4.repack.layouts.ranks import Ranks, check_ranks, rank_conversions
from ascend_v4.repack.plan import Action, Conversion, RepackPlan
from ascend_v4.repack.recipes import Target

PACK_FILE = "ascend_v4.json"
PACK_FORMAT = "ascend_v4"
PACK_VERSION = 1
STEM = "model"


class NativeLayout:
    """Release names in `model-0000x-of-0000y.safetensors`."""

    name = LayoutName.NATIVE

    def parts(
        self,
        config: ModelConfig,
        plan: RepackPlan,
        *,
        max_part_bytes: int = DEFAULT_PART_BYTES,
        ranks: Ranks | None = None,
    ) -> tuple[Part, ...]:
        """The weight files, rank after rank where there are ranks."""
        if ranks is None:
            return cut_parts(plan.conversions, max_part_bytes=max_part_bytes, stem=STEM)
        check_ranks(config, ranks)
        return tuple(
            part
            for rank in range(ranks.ep)
            for part in cut_parts(
                rank_conversions(config, plan.conversions, ranks, rank=rank),
                max_part_bytes=max_part_bytes,
                stem=STEM,
                rank=rank,
            )
        )

    def documents(
        self, plan: RepackPlan, parts: tuple[Part, ...], inputs: DocumentInputs
    ) -> dict[str, bytes]:
        """config.json, the index and ascend_v4.json; with ranks these three in every folder as well."""
        config = json_document(_config_fields(plan, inputs))
        pack = _pack(plan, inputs)
        if inputs.ranks is None:
            return {
                CONFIG_FILE: config,
                INDEX_FILE: index_document(parts),
                PACK_FILE: json_document({**pack, "tensors": _tensors(plan.conversions)}),
            }
        ranks = inputs.ranks
        folders = [rank_folder(rank) for rank in range(ranks.ep)]
        layout = {"tp": ranks.tp, "ep": ranks.ep, "folders": folders}
        documents = {
            CONFIG_FILE: config,
            PACK_FILE: json_document({**pack, "ranks": layout, "tensors": _tensors(plan.conversions)}),
        }
        for rank, folder in enumerate(folders):
            own = [part for part in parts if part.rank == rank]
            conversions = [item for part in own for item in part.conversions]
            place = {
                "index": rank,
                "tp": ranks.tp,
                "ep": ranks.ep,
                "tp_rank": rank % ranks.tp,
                "ep_rank": rank,
            }
            described = {
                **pack,
                "rank": place,
                "slices": _slices(conversions),
                "tensors": _tensors(conversions),
            }
            documents[f"{folder}/{CONFIG_FILE}"] = config
            documents[f"{folder}/{INDEX_FILE}"] = index_document(own)
            documents[f"{folder}/{PACK_FILE}"] = json_document(described)
        return documents


def _config_fields(plan: RepackPlan, inputs: DocumentInputs) -> dict[str, Any]:
    if plan.recipe.target is Target.RELEASE:
        return restore_release_fields(inputs.config_fields)
    return without_release_fields(inputs.config_fields)


def _pack(plan: RepackPlan, inputs: DocumentInputs) -> dict[str, Any]:
    rounded = any(item.action is Action.FP4_TO_INT8 for item in plan.conversions)
    return {
        "format": PACK_FORMAT,
        "version": PACK_VERSION,
        "scheme": plan.recipe.target.value,
        "recipe": plan.recipe.name,
        "rounding": plan.rounding.value if rounded else "none",
        "rotation": "none",
        "release_fields": {
            key: inputs.config_fields[key] for key in RELEASE_FIELDS if key in inputs.config_fields
        },
        "source": dict(inputs.source),
        "unruled": list(plan.unruled),
    }


def _tensors(conversions: Iterable[Conversion]) -> dict[str, dict[str, object]]:
    return {item.name: {"format": item.after.value, "reversible": item.reversible} for item in conversions}


def _slices(conversions: Iterable[Conversion]) -> dict[str, dict[str, object]]:
    """What a rank holds of each weight that is cut: the range, and the whole weight's shape."""
    return {
        item.name: {
            "axis": 0 if item.kept_rows is not None else 1,
            "range": list(item.kept_rows or item.kept_columns or ()),
            "of": list(item.shape),
        }
        for item in conversions
        if item.kept_rows is not None or item.kept_columns is not None
    }
