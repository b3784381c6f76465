"""Recipes: what each part of the model becomes for a target, and why; their text is recipes.yaml.

Standard library and yaml only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources
from typing import Any

import yaml

from ascend_v4.checkpoint.names import is_mtp
from ascend_v4.errors import ConfigError


class Target(Enum):
    """What a repacked checkpoint is for; the values of --to."""

    W8A8 = "w8a8"
    W4A8 = "w4a8"
    MX = "mx"
    BF16 = "bf16"
    RELEASE = "release"


class RoundingChoice(Enum):
    """How FP4-born INT8 weights choose their channel scale; the values of --rounding."""

    EXACT = "exact"
    ABSMAX = "absmax"


class WeightForm(Enum):
    """How a weight is stored; the value is its `format` in ascend_v4.json."""

    PLAIN = "plain"
    FP8_BLOCK = "fp8_block"
    FP4_GROUP = "fp4_group"
    MXFP8 = "mxfp8"
    INT8_CHANNEL = "int8_channel"
    INT4_CHANNEL = "int4_channel"


class Wanted(Enum):
    """What a rule asks for; which form that is depends on how the weight is stored now."""

    INT8 = "int8"
    INT4 = "int4"
    MX = "mx"
    BF16 = "bf16"
    RELEASE = "release"


class SplitAxis(Enum):
    """Which side of a weight tensor parallelism cuts."""

    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Tensor parallelism gives each rank whole units: heads, groups or rows of the vocabulary."""

    axis: SplitAxis
    unit: str
    """The field of the config that counts the units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """Tensors that are treated alike. `routed` ones are shared out by expert id."""

    name: str
    what: str
    tensors: tuple[str, ...]
    split: Split | None
    routed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What one part becomes, and the reason in one line."""

    part: str
    wanted: Wanted
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Rules of one target under one name; parts without a rule pass through unchanged."""

    target: Target
    name: str
    summary: str
    rules: tuple[Rule, ...]


def recipe_names(target: Target) -> tuple[str, ...]:
    """Recipes of a target; the first is its default."""
    return tuple(_document()["recipes"][target.value])


def load_recipe(target: Target, name: str | None = None) -> Recipe:
    """A recipe by target and name; without a name the default. Raises ConfigError for other names."""
    names = recipe_names(target)
    chosen = names[0] if name is None else name
    if chosen not in names:
        raise ConfigError(
            f"there is no recipe {chosen[:60]!r} for --to {target.value}. Use one of: {', '.join(names)}."
        )
    entry = _document()["recipes"][target.value][chosen]
    rules = _rules(entry)
    return Recipe(target=target, name=chosen, summary=str(entry["summary"]), rules=rules)


def explain(recipe: Recipe) -> str:
    """The recipe as text for --explain: a line per part with what it becomes and why."""
    parts = model_parts()
    lines = [f"{recipe.target.value} / {recipe.name}: {recipe.summary}", ""]
    widths = (max(len(name) for name in parts), max(len(wanted.value) for wanted in Wanted))
    rows = [(rule.part, rule.wanted.value, parts[rule.part].what, rule.why) for rule in recipe.rules]
    ruled = {rule.part for rule in recipe.rules}
    kept = str(_document()["stored_why"])
    rows += [(name, "kept", part.what, kept) for name, part in parts.items() if name not in ruled]
    for part_name, wanted, what, why in rows:
        lines.append(f"  {part_name:<{widths[0]}}  {wanted:<{widths[1]}}  {what}: {why}.")
    others = [name for name in recipe_names(recipe.target) if name != recipe.name]
    lines += ["", "  Tensors of no part above pass through unchanged and are listed."]
    if others:
        lines.append(f"  Other recipes for {recipe.target.value}: {', '.join(others)}.")
    return "\n".join(lines)


@cache
def model_parts() -> Mapping[str, ModelPart]:
    """Every part the recipes know, by name, in the order they are explained."""
    return {name: _part(name, entry) for name, entry in _document()["parts"].items()}


def classify(name: str) -> ModelPart | None:
    """The part a tensor belongs to; None for one the recipes do not know, and for scales."""
    return _parts_by_pattern().get(_pattern_of(name))


def stored_reason() -> str:
    """Why tensors of the release's own plain types are left alone."""
    return str(_document()["stored_why"])


def has_split_bias(name: str) -> bool:
    """Whether a ModelSlim pack splits the INT4 bias of a weight along the reduction."""
    return _pattern_of(name) in _document()["modelslim_split_bias"]


_NUMBER = re.compile(r"\.\d+(?=\.)")


def _pattern_of(name: str) -> str:
    stem, star, rest = _NUMBER.sub(".*", name).partition(".*.")
    # the first number of a name is that of its layer or MTP block; further ones are experts
    if not star:
        return name
    return f"block.{rest}" if is_mtp(name) or stem == "layers" else name


@cache
def _parts_by_pattern() -> Mapping[str, ModelPart]:
    return {pattern: part for part in model_parts().values() for pattern in part.tensors}


@cache
def _document() -> Mapping[str, Any]:
    text = (resources.files("ascend_v4.repack") / "recipes.yaml").read_text(encoding="utf-8")
    parsed: Mapping[str, Any] = yaml.safe_load(text)
    return parsed


def _rules(entry: Mapping[str, Any]) -> tuple[Rule, ...]:
    merged: dict[str, Rule] = {}
    if "extends" in entry:
        target, name = entry["extends"]
        merged |= {rule.part: rule for rule in load_recipe(Target(target), name).rules}
    for part, (wanted, why) in entry["rules"].items():
        assert part in model_parts(), f"recipes.yaml has a rule for {part!r}, which is no part"
        merged[part] = Rule(part=part, wanted=Wanted(wanted), why=str(why))
    return tuple(merged.values())


def _part(name: str, entry: Mapping[str, Any]) -> ModelPart:
    split = entry.get("split")
    return ModelPart(
        name=name,
        what=str(entry["what"]),
        tensors=tuple(entry["tensors"]),
        split=None if split is None else Split(axis=SplitAxis(split["axis"]), unit=str(split["unit"])),
        routed=bool(entry.get("routed", False)),
    )
