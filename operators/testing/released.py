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
from ascend_v4.operators.testing.paged import ROPE_CHANNELS
from ascend_v4.operators.testing.recipe import Recipe

NARROW, RELEASED = "vendor-", "released-"
HEAD_CHANNELS = 512
FIXED: Mapping[str, Mapping[str, Any]] = {
    "sparse_attention": {"heads": 64, "width": HEAD_CHANNELS},
    "select_entries": {"heads": 64},
    # the narrowest that the compressor takes; its own width is the released one
    "compress": {"hidden": 1024, "width": HEAD_CHANNELS},
    "hyper_connection_pre": {"hidden": 4096},
    "hyper_connection_post": {"hidden": 4096},
    "write_kv": {"width": HEAD_CHANNELS, "nope_dim": HEAD_CHANNELS - ROPE_CHANNELS},
}
"""Arguments of the recipes' builders, by operator."""
TOPK = 512


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
    settings = {**build.keywords, **fixed}
    if settings.get("topk") is not None and case.operator.name == "sparse_attention":
        settings["topk"] = TOPK
    name = RELEASED + recipe.name.removeprefix(NARROW)
    widened: Recipe = replace(recipe, name=name, build=partial(build.func, **settings))
    yield replace(case, recipe=widened)
