"""What a checkpoint or a bare config is: layers, tensors, bytes, parameters, and what the files lack.

Reads headers only and imports no torch, so it answers at once for any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_v4.checkpoint.compare import Comparison, compare
from ascend_v4.checkpoint.index import Role, Specs, expected_tensors
from ascend_v4.checkpoint.names import is_mtp
from ascend_v4.checkpoint.pack import Pack, PackedForm, find_pack, pack_tensors, require_unrotated
from ascend_v4.checkpoint.rank_sets import scan_pack
from ascend_v4.checkpoint.shards import Problem, StoredFiles, find_shards
from ascend_v4.config import LayerKind, ModelConfig, resolve_config_path

_ABSENT_KINDS = ("missing", "missing scale")


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """Answer for `inspect`."""

    summary: dict[str, Any]
    """JSON-ready. The keys are a public interface: docs/checkpoint.md."""
    damage: tuple[Problem, ...]
    """Files that contradict the config or themselves. Tensors that are merely absent are in the summary."""


def describe(path: str | Path) -> dict[str, Any]:
    """Summary of a checkpoint directory, a config file or a shipped config's name.

    Tensors, bytes and dtypes are those of the files where there are any, and those of the release layout
    otherwise. Raises ConfigError, CheckpointError.
    """
    return examine(path).summary


def examine(path: str | Path) -> Description:
    """Summary and damage of a checkpoint directory, a config file or a shipped config's name."""
    place = resolve_config_path(path)
    pack = find_pack(place) if place.is_dir() else None
    config = ModelConfig.from_file(place)
    specs = expected_tensors(config)
    files: StoredFiles | None = None
    comparison: Comparison | None = None
    damage: tuple[Problem, ...] = ()
    is_divided = pack is not None and pack.ranks is not None
    if place.is_dir() and (is_divided or find_shards(place)):
        files = scan_pack(place, pack)
        if pack is not None:
            require_unrotated(place, pack, files.tensors)
            specs = pack_tensors(config, pack, files.tensors)
        comparison = compare(config, specs, files, known=() if pack is None else pack.kept_names())
        damage = tuple(problem for problem in comparison.problems if problem.kind not in _ABSENT_KINDS)
    summary: dict[str, Any] = {
        "path": str(path),
        "model_type": config.model_type,
        "layers": _count_layers(config),
        **_count_tensors(specs, files),
        "parameters": count_parameters(config, specs),
        "missing": None if comparison is None else list(comparison.missing),
        "unexpected": None if comparison is None else list(comparison.unexpected),
        "draft_tensors": None if comparison is None else list(comparison.drafts),
        "draft_fields": None if config.draft is None else list(config.draft.fields),
        "shards": None if files is None else list(files.shards),
        "quantization": {
            "linears": "fp8" if config.quantized else "bf16",
            "experts": config.expert_format.value if config.quantized else "bf16",
        }
        if pack is None
        else _pack_formats(specs, pack),
        "pack": None if pack is None else _pack_facts(pack),
        "ignored_fields": list(config.unknown_fields),
    }
    return Description(summary=summary, damage=damage)


def _pack_facts(pack: Pack) -> dict[str, object]:
    ranks = None if pack.ranks is None else {"tp": pack.ranks.tp, "ep": pack.ranks.ep}
    return {"layout": pack.layout.value, "scheme": pack.scheme.value, "recipe": pack.recipe, "ranks": ranks}


def _pack_formats(specs: Specs, pack: Pack) -> dict[str, str]:
    """Forms of the weights that a recipe may convert, the commonest first."""
    forms: dict[Role, Counter[str]] = {Role.LINEAR: Counter(), Role.EXPERT: Counter()}
    for name, spec in specs.items():
        if spec.role in forms:
            forms[spec.role][pack.forms.get(name, PackedForm.PLAIN).value] += 1
    return {
        "linears": ", ".join(form for form, _ in forms[Role.LINEAR].most_common()),
        "experts": ", ".join(form for form, _ in forms[Role.EXPERT].most_common()),
    }


def count_parameters(config: ModelConfig, specs: Specs) -> dict[str, int]:
    """Parameters of the main model, those one token uses, and those of the MTP blocks.

    Scales and the token-to-expert table are no parameters; packed FP4 counts two per byte. A token uses all
    but the embedding and the routed experts that were not chosen.
    """
    total = active = mtp = 0
    for name, spec in specs.items():
        if spec.role in (Role.SCALE, Role.TOKEN_EXPERTS):
            continue
        if is_mtp(name):
            mtp += spec.num_parameters
            continue
        total += spec.num_parameters
        if spec.role is Role.EXPERT:
            # experts are of one shape, so the share of all of them is a whole number in the end
            active += spec.num_parameters * config.num_experts_per_tok
        elif spec.role is not Role.EMBEDDING:
            active += spec.num_parameters * config.n_routed_experts
    return {"total": total, "active": active // config.n_routed_experts, "mtp": mtp}


def _count_layers(config: ModelConfig) -> dict[str, int]:
    kinds = Counter(config.layer_kinds)
    return {
        "swa": kinds[LayerKind.SWA],
        "csa": kinds[LayerKind.CSA],
        "hca": kinds[LayerKind.HCA],
        "mtp": config.num_mtp_blocks,
    }


def _count_tensors(specs: Specs, files: StoredFiles | None) -> dict[str, Any]:
    entries: Iterable[tuple[str, int]] = (
        ((spec.dtype, spec.num_bytes) for spec in specs.values())
        if files is None
        else ((stored.dtype, stored.num_bytes) for stored in files.tensors.values())
    )
    counts: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    for dtype, tensor_bytes in entries:
        counts[dtype] += 1
        num_bytes[dtype] += tensor_bytes
    return {
        "tensors": counts.total(),
        "bytes": num_bytes.total(),
        "dtypes": dict(sorted(counts.items())),
        "dtype_bytes": dict(sorted(num_bytes.items())),
    }
