"""Whether the files of a checkpoint hold what its config says: names, shapes and dtypes.

Runs on headers alone, before anything is loaded. Standard library only, so that `inspect` needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ascend_v4.checkpoint.index import Role, Specs, TensorSpec
from ascend_v4.checkpoint.names import is_mtp
from ascend_v4.checkpoint.shards import Problem, StoredFiles, StoredTensor
from ascend_v4.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Comparison:
    """Files against config. Only `problems` keep a checkpoint from being loaded."""

    problems: tuple[Problem, ...]
    missing: tuple[str, ...]
    """Expected tensors that no shard holds whole."""
    unexpected: tuple[str, ...]
    """Tensors in the files that this code does not know; they are left alone."""
    drafts: tuple[str, ...]
    """Tensors of draft blocks (dspark), listed and never loaded."""


def compare(
    config: ModelConfig, specs: Specs, files: StoredFiles, *, known: Collection[str] = ()
) -> Comparison:
    """Every difference between the expected tensors and the files, in the order of the expected tensors.

    `known` are names that may be there and are no surprise, though nothing loads them.
    """
    missing = [name for name in specs if name not in files.tensors]
    absent = [_absence(name, specs[name]) for name in missing if name not in files.damaged]
    differing = [
        problem
        for name, spec in specs.items()
        if name in files.tensors
        for problem in _differences(name, spec, files.tensors[name])
    ]
    others = [
        name for name in [*files.tensors, *files.unreferenced] if name not in specs and name not in known
    ]
    drafts = [name for name in others if config.draft is not None and is_mtp(name)]
    unexpected = [name for name in others if config.draft is None or not is_mtp(name)]
    return Comparison(
        problems=(*files.problems, *absent, *differing),
        missing=tuple(missing),
        unexpected=tuple(dict.fromkeys(unexpected)),
        drafts=tuple(dict.fromkeys(drafts)),
    )


def _absence(name: str, spec: TensorSpec) -> Problem:
    kind = "missing scale" if spec.role is Role.SCALE else "missing"
    return Problem(kind, name, None, f"no shard holds it; {spec.dtype} {list(spec.shape)} expected")


def _differences(name: str, spec: TensorSpec, stored: StoredTensor) -> list[Problem]:
    found = []
    if stored.dtype != spec.dtype:
        found.append(Problem("wrong dtype", name, stored.file, f"{stored.dtype}, expected {spec.dtype}"))
    if stored.shape != spec.shape:
        detail = f"{list(stored.shape)}, expected {list(spec.shape)}"
        if spec.weight is None:
            found.append(Problem("wrong shape", name, stored.file, detail))
        else:
            found.append(Problem("scale misfit", name, stored.file, f"{detail} to fit {spec.weight}"))
    return found
