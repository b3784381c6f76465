"""The Ascend chips this project knows: what they hold, move, compute and insist on. Standard library only.

Figures are the vendor's where it publishes them, and None where it does not. Nothing here was measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

GB = 1_000_000_000
GIB = 1 << 30


class Chip(Enum):
    """A generation whose operators are alike; `--chip` takes the value."""

    A2 = "a2"
    A3 = "a3"
    A950 = "950"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChipFacts:
    """What the socs of one generation have in common."""

    chip: Chip
    products: str
    """How the vendor sells it."""
    formats: tuple[str, ...]
    """Number formats that its matrix unit multiplies."""
    packs: tuple[str, ...]
    """Targets of `ascend-v4 repack` that it runs; `release` is the official files themselves."""
    attention_heads: tuple[int, ...] = ()
    """The only numbers of query heads per rank that its attention kernel takes; none named: any multiple of
    4.
    """
    limits: tuple[str, ...] = ()
    """What to know before choosing a deployment, one sentence each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Soc:
    """One soc as the runtime names it. Memory and bandwidth are those of one device: one die of an A3."""

    name: str
    chip: Chip
    hbm_bytes: int | None
    """Nominal; the runtime reports less."""
    bytes_per_s: int | None
    matrix_cores: int | None
    teraops: Mapping[str, float]
    """Peak of dense products, 10^12 operations per second, for the formats that have a figure."""
    source: str


CLOUDMATRIX = "CloudMatrix384 paper, arXiv 2506.12708: half of a two-die chip"
WHITE_PAPER = "vendor white paper, quoted in ops-cv issue 997"
SAME_AS_B2 = f"{WHITE_PAPER} for Ascend910B2, taken for its variants"
ROADMAP = "vendor roadmap, Huawei Connect 2025"
NO_FIGURES: Mapping[str, float] = MappingProxyType({})

CHIPS: Mapping[Chip, ChipFacts] = MappingProxyType(
    {
        facts.chip: facts
        for facts in (
            ChipFacts(
                chip=Chip.A2,
                products="Atlas 800 A2, Atlas 900 A2",
                formats=("fp16", "bf16", "fp32 as hf32", "int8", "int4 weights"),
                packs=("w8a8", "w4a8"),
                limits=(
                    "There is no FP8 and no FP4 unit: the official files need ascend-v4 repack --to w8a8 or "
                    "w4a8.",
                ),
            ),
            ChipFacts(
                chip=Chip.A3,
                products="Atlas 800 A3, Atlas 900 A3",
                formats=("fp16", "bf16", "fp32 as hf32", "int8", "int4 weights"),
                packs=("w8a8", "w4a8"),
                limits=(
                    "There is no FP8 and no FP4 unit: the official files need ascend-v4 repack --to w8a8 or "
                    "w4a8.",
                    "A module has two dies, and each of them is a device of its own.",
                ),
            ),
            ChipFacts(
                chip=Chip.A950,
                products="Atlas 350, Atlas 950",
                formats=("fp16", "bf16", "fp32 as hf32", "int8", "fp8", "mxfp8", "hif8", "mxfp4"),
                packs=("release", "mx"),
                attention_heads=(64, 128),
                limits=(
                    "Attention takes 64 or 128 heads per rank: its tensor parallelism is 1 for Flash and at "
                    "most 2 for Pro.",
                    "There is no INT4 unit: w4a8 packs do not run.",
                ),
            ),
        )
    }
)

SOCS: tuple[Soc, ...] = (
    Soc(
        name="Ascend910B1",
        chip=Chip.A2,
        hbm_bytes=64 * GIB,
        bytes_per_s=1600 * GB,
        matrix_cores=None,
        teraops=NO_FIGURES,
        source=SAME_AS_B2,
    ),
    Soc(
        name="Ascend910B2",
        chip=Chip.A2,
        hbm_bytes=64 * GIB,
        bytes_per_s=1600 * GB,
        matrix_cores=24,
        teraops=MappingProxyType({"bf16": 353.9}),
        source=WHITE_PAPER,
    ),
    Soc(
        name="Ascend910B3",
        chip=Chip.A2,
        hbm_bytes=64 * GIB,
        bytes_per_s=1600 * GB,
        matrix_cores=None,
        teraops=NO_FIGURES,
        source=SAME_AS_B2,
    ),
    Soc(
        name="Ascend910B4",
        chip=Chip.A2,
        hbm_bytes=32 * GIB,
        bytes_per_s=None,
        matrix_cores=20,
        teraops=NO_FIGURES,
        source=SAME_AS_B2,
    ),
    Soc(
        name="Ascend910_93",
        chip=Chip.A3,
        hbm_bytes=64 * GIB,
        bytes_per_s=1600 * GB,
        matrix_cores=24,
        teraops=MappingProxyType({"bf16": 376.0, "int8": 752.0}),
        source=CLOUDMATRIX,
    ),
    Soc(
        name="Ascend950PR",
        chip=Chip.A950,
        hbm_bytes=128 * GIB,
        bytes_per_s=1600 * GB,
        matrix_cores=None,
        teraops=MappingProxyType({"bf16": 432.0, "mxfp8": 865.0, "mxfp4": 1730.0}),
        source=f"{WHITE_PAPER}; memory: {ROADMAP}",
    ),
    Soc(
        name="Ascend950DT",
        chip=Chip.A950,
        hbm_bytes=144 * GIB,
        bytes_per_s=4000 * GB,
        matrix_cores=None,
        teraops=NO_FIGURES,
        source=ROADMAP,
    ),
)
"""Socs by the beginning of their name; variants follow it: Ascend910B2C, Ascend910_9391, Ascend950DT_9582."""

# Ascend910B without a digit is the first generation, which no V4 operator is built for.
_CHIP_NAMES = (
    (re.compile(r"(ascend)?910b[1-9]"), Chip.A2),
    (re.compile(r"(ascend)?910_93"), Chip.A3),
    (re.compile(r"(ascend)?950|(ascend)?910_95"), Chip.A950),
)


def chip_of(soc_name: str) -> Chip | None:
    """The generation of a soc, by the name that the runtime gives it; None for one this project does not
    know.
    """
    text = soc_name.strip().lower()
    return next((chip for pattern, chip in _CHIP_NAMES if pattern.match(text)), None)


def soc_of(soc_name: str) -> Soc | None:
    """The row of a soc; None where its variant has none of its own, such as Ascend910B4-1 with its other
    memory.
    """
    text = soc_name.strip().lower()
    for soc in SOCS:
        rest = text.removeprefix("ascend").removeprefix(soc.name.lower().removeprefix("ascend"))
        if rest != text.removeprefix("ascend") and "-" not in rest:
            return soc
    return None
