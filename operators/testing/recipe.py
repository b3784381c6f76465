"""What a case is made of: a name, how to draw its inputs, and what the call may write."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.testing.draw import Draw, Layout

BOTH = (torch.float32, torch.bfloat16)
FLOAT32_ONLY = (torch.float32,)


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """The half that runs once per step: its arguments, and the operator's parameter that takes the result."""

    parameter: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Arguments of one call, all by name."""

    arguments: Mapping[str, Any]
    """Without what the plan adds."""
    planned: Planned | None = None
    prepared: str | None = None
    """The parameter that goes through the implementation's `prepare`."""
    written_rows: Mapping[str, Tensor | None] = field(default_factory=lambda: MappingProxyType({}))
    """Arguments written in place, and the rows that may change; None: the whole argument."""


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


def sized(
    build: Callable[..., Inputs],
    sizes: Mapping[str, Mapping[str, Any]],
    *,
    largest: Mapping[str, Any],
    dtypes: tuple[torch.dtype, ...] = BOTH,
    copies: tuple[bool, ...] = (True,),
) -> list[Recipe]:
    """A recipe per size, the two awkward layouts of the size called `odd`, and the largest real size."""

    def bound(arguments: Mapping[str, Any]) -> Callable[[Draw], Inputs]:
        return lambda draw: build(draw, **arguments)

    recipes = [
        Recipe(name=name, build=bound(arguments), dtypes=dtypes, copies=copies)
        for name, arguments in sizes.items()
    ]
    for layout in (Layout.SLICED, Layout.STRIDED):
        odd = bound(sizes["odd"])
        recipes.append(
            Recipe(name=layout.name.lower(), build=odd, layout=layout, dtypes=dtypes, copies=copies)
        )
    recipes.append(
        Recipe(name="largest", build=bound(largest), dtypes=dtypes[-1:], copies=copies[-1:], slow=True)
    )
    return recipes
