"""Everything a repack is asked for, checked before a file is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_v4.errors import ConfigError
from ascend_v4.repack.layouts import DEFAULT_PART_BYTES, LayoutName, Ranks, parse_ranks
from ascend_v4.repack.plan import parse_keep
from ascend_v4.repack.recipes import RoundingChoice, Target

MAX_JOBS = 256
MAX_DEFAULT_JOBS = 16
"""Threads nobody asked for: each holds some 20 MB, and no disk takes what 16 make."""

DEVICES = ("cpu", "cuda", "npu")


@dataclass(frozen=True, kw_only=True, slots=True)
class RepackConfig:
    """One repack from a checkpoint directory to a new directory."""

    source: Path
    output: Path
    target: Target
    recipe: str | None = None
    """Name of a recipe of the target; None is its default."""
    rounding: RoundingChoice = RoundingChoice.EXACT
    keep: tuple[str, ...] = ()
    """fnmatch patterns of weights that become bf16 whatever the recipe says."""
    reversible: bool = False
    layout: LayoutName = LayoutName.NATIVE
    ranks: Ranks | None = None
    max_part_bytes: int = DEFAULT_PART_BYTES
    jobs: int | None = None
    """Threads; None: as many as help, see `threads_of`. The output does not depend on it."""
    device: str = "cpu"
    """Where weights are converted, one of DEVICES. The output does not depend on it."""

    def __post_init__(self) -> None:
        if self.jobs is not None and not 1 <= self.jobs <= MAX_JOBS:
            raise ConfigError(f"--jobs is {self.jobs}; it must be in [1, {MAX_JOBS}].")
        if self.device not in DEVICES:
            known = ", ".join(DEVICES)
            raise ConfigError(
                f"--device {self.device!r:.40} does not convert weights; choose one of {known}."
            )

    def options(self, recipe_name: str) -> dict[str, Any]:
        """What decides the output's bytes beside the source, as the manifest keeps it."""
        return {
            "target": self.target.value,
            "recipe": recipe_name,
            "rounding": self.rounding.value,
            "keep": list(self.keep),
            "reversible": self.reversible,
            "layout": self.layout.value,
            "ranks": None if self.ranks is None else {"tp": self.ranks.tp, "ep": self.ranks.ep},
            "max_part_bytes": self.max_part_bytes,
        }

    @classmethod
    def from_flags(cls, source: str, output: Path, flags: Mapping[str, Any]) -> RepackConfig:
        """The config that the command line's flags ask for, by their names there. Raises ConfigError."""
        part_bytes = flags["max_part_bytes"]
        return cls(
            source=Path(source),
            output=output,
            target=Target(flags["target"]),
            recipe=flags["recipe"],
            rounding=RoundingChoice(flags["rounding"]),
            keep=parse_keep(flags["keep"]),
            reversible=flags["reversible"],
            layout=LayoutName(flags["layout"]),
            ranks=None if flags["ranks"] is None else parse_ranks(flags["ranks"]),
            max_part_bytes=DEFAULT_PART_BYTES if part_bytes is None else part_bytes,
            jobs=flags["jobs"],
            device=flags["device"],
        )

    @classmethod
    def from_options(cls, source: Path, output: Path, options: dict[str, Any]) -> RepackConfig:
        """The config that `options` came from. Raises ConfigError for options of another version."""
        try:
            ranks = options["ranks"]
            return cls(
                source=source,
                output=output,
                target=Target(options["target"]),
                recipe=str(options["recipe"]),
                rounding=RoundingChoice(options["rounding"]),
                keep=tuple(map(str, options["keep"])),
                reversible=bool(options["reversible"]),
                layout=LayoutName(options["layout"]),
                ranks=None if ranks is None else Ranks(tp=int(ranks["tp"]), ep=int(ranks["ep"])),
                max_part_bytes=int(options["max_part_bytes"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{output} was made with options this version does not know ({error!r:.80}). "
                "Verify it with the version that made it."
            ) from None


def default_threads() -> int:
    """One thread per processor this process may use, at most MAX_DEFAULT_JOBS."""
    if hasattr(os, "sched_getaffinity"):
        return min(MAX_DEFAULT_JOBS, len(os.sched_getaffinity(0)))
    return min(MAX_DEFAULT_JOBS, os.cpu_count() or 1)
