"""What a case is made of: a name, how to draw its inputs, and what the call may write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.contracts.quantize import IndexFormat, KvFormat
from ascend_v4.operators.testing.draw import Draw, Layout

BOTH = (torch.float32, torch.bfloat16)
FLOAT32_ONLY = (torch.float32,)
BFLOAT16_ONLY = (torch.bfloat16,)
NOTHING: Mapping[str, Any] = MappingProxyType({})
ROW_COUNTS = {
    "zero": {"rows": 0},
    "one": {"rows": 1},
    "few": {"rows": 2},
    "odd": {"rows": 5},
    "many": {"rows": 37},
}


def rows_and(**fixed: object) -> dict[str, dict[str, Any]]:
    """Sizes of every row count with other arguments of a builder beside them."""
    return {name: {**counts, **fixed} for name, counts in ROW_COUNTS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The half that runs once per step: its arguments, and the operator's parameter that takes the result."""

    parameter: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class KvCache:
    """An argument that holds key-value rows: drawn as numbers [C, S, width], stored the target's way."""

    width: int
    nope_dim: int
    format: KvFormat | None = None
    """None: the target's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexKeyCache:
    """An argument that holds indexer keys: drawn as numbers [C, S, width], stored the target's way."""

    width: int
    format: IndexFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Arguments of one call, all by name."""

    arguments: Mapping[str, Any]
    """Without what the plan adds."""
    planned: Planned | None = None
    prepared: str | None = None
    """The parameter that goes through the implementation's `prepare`."""
    written_rows: Mapping[str, Tensor | None] = field(default_factory=lambda: NOTHING)
    """Arguments written in place, and the rows that may change; None: the whole argument."""
    caches: Mapping[str, KvCache | IndexKeyCache] = field(default_factory=lambda: NOTHING)
    """Arguments that are stored the target's way."""
    sizes: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    """Sizes of the model that these inputs stand for, by the names that limits use."""
    not_on_chips: str | None = None
    """Why no chip is asked this, where the contract covers more than any kernel does."""
    far: bool = False
    """Whether caches are so large that they only exist where they are written: nothing copies them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One kind of input of one operator."""

    name: str
    build: Callable[[Draw], Inputs]
    layout: Layout = Layout.PACKED
    dtypes: tuple[torch.dtype, ...] = BOTH
    copies: tuple[bool, ...] = (True,)
    """Values of `copy` for operators whose weights are prepared."""
    slow: bool = False
    """Of the released models' sizes: seconds and gigabytes."""


def vendor_sized(
    build: Callable[..., Inputs],
    sizes: Mapping[str, Mapping[str, Any]],
    *,
    dtypes: tuple[torch.dtype, ...] = BFLOAT16_ONLY,
    copies: tuple[bool, ...] = (True,),
    largest: Mapping[str, Mapping[str, Any]] = NOTHING,
) -> list[Recipe]:
    """A recipe per size, `vendor-` in front of its name: sizes that kernels take once theirs are waived.

    `largest` are slow ones of a released model, which kernels take as they are.
    """
    return [
        Recipe(
            name=f"vendor-{name}",
            build=partial(build, **arguments),
            dtypes=dtypes,
            copies=copies,
            slow=name in largest,
        )
        for name, arguments in {**sizes, **largest}.items()
    ]


def sized(
    build: Callable[..., Inputs],
    sizes: Mapping[str, Mapping[str, Any]],
    *,
    largest: Mapping[str, Any],
    dtypes: tuple[torch.dtype, ...] = BOTH,
    copies: tuple[bool, ...] = (True,),
) -> list[Recipe]:
    """A recipe per size, the two awkward layouts of the size called `odd`, and the largest real size."""

    recipes = [
        Recipe(name=name, build=partial(build, **arguments), dtypes=dtypes, copies=copies)
        for name, arguments in sizes.items()
    ]
    for layout in (Layout.SLICED, Layout.STRIDED):
        odd = partial(build, **sizes["odd"])
        recipes.append(
            Recipe(name=layout.name.lower(), build=odd, layout=layout, dtypes=dtypes, copies=copies)
        )
    recipes.append(
        Recipe(
            name="largest", build=partial(build, **largest), dtypes=dtypes[-1:], copies=copies[-1:], slow=True
        )
    )
    return recipes
