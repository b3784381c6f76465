"""The vendors' recipes at the widths that kernels fix, so that a chip is asked what it takes.

The kit's `vendor-` recipes are narrow, for chips whose sizes are waived. A kernel that takes one width only
is asked the same counts, edges and poison at that width here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ascend_v4.device.soc import Chip
from ascend_v4.operators.testing.cases import Case
from ascend_v4.operators.testing.paged import CSA_RATIO, ROPE_CHANNELS
from ascend_v4.operators.testing.recipe import Recipe

NARROW, RELEASED = "vendor-", "released-"
HEAD_CHANNELS = 512
FIXED: Mapping[str, Mapping[str, Any]] = {
    "sparse_attention": {"heads": 4, "width": HEAD_CHANNELS},
    "select_entries": {"heads": 64},
    # the narrowest that the compressor takes; its own width is the released one
    "compress": {"hidden": 1024, "width": HEAD_CHANNELS},
    "hyper_connection_pre": {"hidden": 4096},
    "hyper_connection_post": {"hidden": 4096},
    "write_kv": {"width": HEAD_CHANNELS, "nope_dim": HEAD_CHANNELS - ROPE_CHANNELS},
}
"""Arguments of the recipes' builders, by operator."""
HEADS_OF_950 = 64
"""Its attention takes 64 or 128; the others any multiple of 4, and few are quick."""
TOPK = 512
MOST_TOKENS_OF_950 = 64
"""Longer batches with all heads take minutes on a CPU, and their layout is that of the shorter ones."""


def at_released_widths(case: Case) -> Iterator[Case]:
    """The case at the widths of Flash, where kernels fix any and the case is narrower."""
    fixed = FIXED.get(case.operator.name)
    recipe = case.recipe
    if fixed is None or not recipe.name.startswith(NARROW) or "largest" in recipe.name:
        return
    if case.target.chip is not Chip.A950 and case.operator.name == "write_kv":
        return
    build = recipe.build
    assert isinstance(build, partial), recipe.name
    settings = _with_choices({**build.keywords, **fixed})
    if case.operator.name == "sparse_attention" and case.target.chip is Chip.A950:
        if sum(settings["counts"]) > MOST_TOKENS_OF_950:
            return
        settings["heads"] = HEADS_OF_950
    name = RELEASED + recipe.name.removeprefix(NARROW)
    widened: Recipe = replace(recipe, name=name, build=partial(build.func, **settings))
    yield replace(case, recipe=widened)


def _with_choices(settings: dict[str, Any]) -> dict[str, Any]:
    """As many entries kept as kernels take, of sequences long enough to have more."""
    if settings.get("topk") is None:
        return settings
    further = TOPK * CSA_RATIO
    return {**settings, "topk": TOPK, "starts": tuple(start + further for start in settings["starts"])}
