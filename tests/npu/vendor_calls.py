"""Calls of simulated kernels by the vendors' schemas, without registering anything with torch."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic
from ascend_v4.errors import SimulatorError
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.npu.schemas import schema_strings
from ascend_v4.operators.simulator.binding import load_kernels
from ascend_v4.operators.simulator.kernels import KERNELS
from ascend_v4.operators.simulator.state import SimulatedChip


def simulated(
    chip: Chip, arithmetic: Arithmetic = Arithmetic.IDEAL, *, waived: frozenset[str] = frozenset(WAIVABLE)
) -> SimulatedChip:
    """A chip that takes any model size, unless told otherwise."""
    return SimulatedChip(chip=chip, arithmetic=arithmetic, waived=waived)


@cache
def _schema(name: str) -> torch.FunctionSchema:
    load_kernels()
    namespace, operator = name.split("::")
    return torch._C.parse_schema(schema_strings(namespace)[operator])


def full_arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Every argument of the schema: those given, and defaults. A missing or unknown one is a TypeError."""
    arguments = {}
    for argument in _schema(name).arguments:
        if argument.name in given:
            arguments[argument.name] = given[argument.name]
        elif argument.has_default_value():
            arguments[argument.name] = argument.default_value
        else:
            raise TypeError(f"{name} needs {argument.name}")
    unknown = given.keys() - arguments.keys()
    if unknown:
        raise TypeError(f"{name} has no {sorted(unknown)}")
    return arguments


def call(sim: SimulatedChip, name: str, **given: Any) -> Any:
    """What the kernel returns."""
    arguments = full_arguments(name, given)
    assert sim.chip in KERNELS[name].chips, f"{name} is not built for {sim.chip}"
    return KERNELS[name].run(sim, **arguments)


def call_meta(sim: SimulatedChip, name: str, **given: Any) -> Any:
    """What its meta function returns for the same arguments on meta."""
    moved = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in given.items()
    }
    return KERNELS[name].meta(sim, **full_arguments(name, moved))


def refuses(sim: SimulatedChip, name: str, problem: str, **given: Any) -> None:
    """Asserts that the kernel refuses the call, and says why."""
    with pytest.raises(SimulatorError, match=problem):
        call(sim, name, **given)
