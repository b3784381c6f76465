"""What stands beside the real torch_npu in the contract process: the other packages' schemas with Meta
kernels of ours, and Meta kernels for torch_npu's operators that the wheel has none for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.library import Library

from ascend_v4.device.soc import Chip
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.npu.schemas import NAMESPACES, schema_strings
from ascend_v4.operators.simulator.binding import load_kernels
from ascend_v4.operators.simulator.kernels import KERNELS
from ascend_v4.operators.simulator.state import SimulatedChip
from tools.npu_contract.record import has_meta

OTHERS = tuple(namespace for namespace in NAMESPACES if namespace != "npu")
"""Namespaces of packages that are not installed here."""
SOC_VERSIONS = {Chip.A2: 220, Chip.A3: 250, Chip.A950: 260}
"""What torch_npu's Meta kernels are told: the first of each chip's series."""
CANN_VERSION = "9.2.0"


class Everything:
    """`Packages` of a machine with every vendor package: an operator is there if a schema is."""

    def missing_module(self, name: str) -> str | None:
        """Every module is there."""

    def missing_operator(self, qualified_name: str) -> str | None:
        """Whether `namespace::name` is registered, by the wheel or from our schemas."""
        namespace, _, name = qualified_name.partition("::")
        found = registered(namespace, name)
        return None if found is not None else f"{qualified_name} is not registered"

    def missing_symbol(self, name: str) -> str | None:
        """Every kernel library is there."""


class StandIns:
    """Put up once per process; they answer for one chip at a time."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        """Operators of torch_npu whose Meta kernel is ours."""
        self._chip = Chip.A3
        self._library: Any = Library("npu", "IMPL")  # type: ignore[no-untyped-call]

    def put(self) -> None:
        """Declares the other packages and completes torch_npu."""
        load_kernels()
        lacking = [name for name in KERNELS if name.startswith("npu::") and not has_meta(name)]
        for name in lacking:
            self._library.impl(name.partition("::")[2], self._meta(name), "Meta")
        self.names = tuple(lacking)
        for namespace in OTHERS:
            simulator.declare(namespace)

    def be(self, chip: Chip) -> None:
        """Lets every Meta kernel, the wheel's too, answer as this chip from now on."""
        self._chip = chip
        for namespace in OTHERS:
            simulator.declare(namespace, chip=chip)
        meta: Any = importlib.import_module("torch_npu.op_plugin.meta._meta_registrations")
        # imported there by name, so that only that module's own can be replaced
        meta.get_soc_version = lambda: SOC_VERSIONS[chip]
        meta.get_cann_version = lambda *_: CANN_VERSION

    def _meta(self, name: str) -> Callable[..., Any]:
        arguments = torch._C.parse_schema(schema_strings("npu")[name.partition("::")[2]]).arguments

        def run(*args: object, **kwargs: object) -> object:
            values = {each.name: each.default_value for each in arguments if each.has_default_value()}
            values |= dict(zip((each.name for each in arguments), args, strict=False)) | kwargs
            return KERNELS[name].meta(SimulatedChip(chip=self._chip, waived=frozenset(WAIVABLE)), **values)

        return run


def registered(namespace: str, name: str) -> Any | None:  # noqa: ANN401 -- an OpOverload
    """The operator of a name that may have an overload, or None."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)


def compare_schemas(ours: Mapping[str, str], namespace: str = "npu") -> list[str]:
    """Where the registry differs from schema strings by name, one sentence per operator."""
    found = []
    for name, text in ours.items():
        operator = registered(namespace, name)
        if operator is None:
            found.append(f"{namespace}::{name} is not registered")
        elif str(operator._schema) != str(torch._C.parse_schema(text)):
            found.append(f"{namespace}::{name} is registered as {operator._schema}")
    return found
