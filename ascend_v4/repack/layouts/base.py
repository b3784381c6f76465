"""What every layout answers, and what several of them share: config fields and the files copied through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from ascend_v4.config import ModelConfig
from ascend_v4.errors import CheckpointError
from ascend_v4.repack.layouts.parts import DEFAULT_PART_BYTES, Part
from ascend_v4.repack.layouts.ranks import Ranks
from ascend_v4.repack.plan import RepackPlan

MAX_COPIED_BYTES = 64 << 20
"""Bound of one copied file; the release's tokenizer has 6 MB."""

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "LICENSE",
)

RELEASE_FIELDS: Mapping[str, Any] = {
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "expert_dtype": "fp4",
}
"""Fields that say how the release stores weights. Packs leave them out of config.json: readers that know
config.json alone would take them for the weights' format."""


class LayoutName(Enum):
    """Which files a repacked checkpoint has; the values of --layout."""

    NATIVE = "native"
    MODELSLIM = "modelslim"
    HUGGINGFACE = "huggingface"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentInputs:
    """What the JSON files of an output say beyond its parts."""

    config_fields: Mapping[str, Any]
    """Raw config.json of the source, release fields restored."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Hashes of the source (config_sha256, index_sha256, parts); copied into ascend_v4.json."""
    ranks: Ranks | None = None


class Layout(Protocol):
    """A layout: pure, from a plan to files."""

    @property
    def name(self) -> LayoutName:
        """The value of --layout."""

    def parts(
        self,
        config: ModelConfig,
        plan: RepackPlan,
        *,
        max_part_bytes: int = DEFAULT_PART_BYTES,
        ranks: Ranks | None = None,
    ) -> tuple[Part, ...]:
        """The weight files. Raises ConfigError for a plan or ranks the layout cannot hold."""

    def documents(
        self, plan: RepackPlan, parts: tuple[Part, ...], inputs: DocumentInputs
    ) -> dict[str, bytes]:
        """Every JSON file by its name relative to the output directory: config, index, description."""


def without_release_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Config fields without those that say how the release stores weights."""
    return {key: value for key, value in fields.items() if key not in RELEASE_FIELDS}


def restore_release_fields(
    fields: Mapping[str, Any], description: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Config fields of a pack with the release's own put back: those its ascend_v4.json kept, else the usual.

    Nothing is added to a config that has its quantization_config: it is a release's.
    """
    if fields.get("quantization_config") is not None:
        return dict(fields)
    kept = (description or {}).get("release_fields")
    if not isinstance(kept, Mapping):
        kept = RELEASE_FIELDS
    return {**fields, **{key: kept[key] for key in RELEASE_FIELDS if key in kept}}


def copied_files(source: Path) -> tuple[tuple[str, int], ...]:
    """Tokenizer, generation settings and license of a source: (name, bytes), copied as they are.

    Raises CheckpointError for one over 64 MiB.
    """
    found = []
    for name in COPIED_FILES:
        path = source / name
        if not path.is_file():
            continue
        num_bytes = path.stat().st_size
        if num_bytes > MAX_COPIED_BYTES:
            raise CheckpointError(
                f"{path} has {num_bytes} bytes; the bound for a copied file is {MAX_COPIED_BYTES}. "
                "Move it out of the checkpoint, and copy it yourself if it belongs there."
            )
        found.append((name, num_bytes))
    return tuple(found)
