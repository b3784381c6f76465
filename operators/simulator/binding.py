"""Registers vendors' schemas with torch, and kernels under them.

Every kernel is called with all arguments of its schema by name. The dispatcher leaves out arguments that
equal the schema's default, so they are filled in from the schema here and written nowhere else.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch.library import Library

from ascend_v4.device.soc import Chip
from ascend_v4.errors import ContractError, SimulatorError
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.npu.schemas import NAMESPACES, schema_strings
from ascend_v4.operators.simulator.kernels import KERNELS, PACKAGE_OF_NAMESPACE, Kernel
from ascend_v4.operators.simulator.state import SimulatedChip

META_DEVICE = "meta"


class Binding:
    """What of the vendors' namespaces is declared in this process, and the chip that kernels run for.

    torch forgets no operator, so there is one of these per process: `BINDING`.
    """

    def __init__(self) -> None:
        self.sim: SimulatedChip | None = None
        """None: declared operators refuse to run."""
        self.meta_sim = SimulatedChip(chip=Chip.A3, waived=frozenset(WAIVABLE))
        """What Meta kernels are told while no chip is installed."""
        self.libraries: dict[str, Any] = {}
        """torch.library.Library by namespace; torch does not type its methods."""
        self.with_kernels: set[str] = set()

    def declare(self, namespace: str, *, chip: Chip | None = None) -> None:
        """Declares one namespace with Meta kernels only; a second call changes the chip at most.

        It is meant to stand beside the real torch_npu, for namespaces whose package is not installed.
        Raises ContractError for a namespace that is not known.
        """
        if namespace not in NAMESPACES:
            raise ContractError(
                f"no schemas are known for namespace {namespace}; known: {', '.join(NAMESPACES)}."
            )
        load_kernels()
        if chip is not None:
            self.meta_sim = SimulatedChip(chip=chip, waived=frozenset(WAIVABLE))
        if namespace in self.libraries:
            return
        library: Any = Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        self.libraries[namespace] = library
        for name, text in schema_strings(namespace).items():
            schema = torch._C.parse_schema(text)
            library.define(text.removeprefix(f"{namespace}::"))
            library.impl(name, self._meta(f"{namespace}::{name}", schema), "Meta")

    def bind(self, namespace: str) -> None:
        """Declares a namespace and gives its operators kernels that run, once."""
        self.declare(namespace)
        if namespace in self.with_kernels:
            return
        self.with_kernels.add(namespace)
        for name, text in schema_strings(namespace).items():
            schema = torch._C.parse_schema(text)
            key = "CPU" if _has_tensor(schema) else "CompositeExplicitAutograd"
            self.libraries[namespace].impl(name, self._kernel(f"{namespace}::{name}", schema), key)

    def _meta(self, name: str, schema: torch.FunctionSchema) -> Callable[..., Any]:
        arguments = _arguments_of(schema)

        def run_meta(*args: object, **kwargs: object) -> object:
            sim = self.sim if self.sim is not None else self.meta_sim
            return _kernel_of(name, sim).meta(sim, **arguments(args, kwargs))

        return run_meta

    def _kernel(self, name: str, schema: torch.FunctionSchema) -> Callable[..., Any]:
        arguments = _arguments_of(schema)

        def run(*args: object, **kwargs: object) -> object:
            if self.sim is None:
                raise SimulatorError(
                    f"{name}: the simulator was uninstalled; call install(chip) to use it again"
                )
            kernel = _kernel_of(name, self.sim)
            values = arguments(args, kwargs)
            if values.get("device") == META_DEVICE:
                return kernel.meta(self.sim, **values)
            return kernel.run(self.sim, **values)

        return run


BINDING = Binding()
"""The one of this process: what torch has registered cannot be taken back."""


def declare(namespace: str, *, chip: Chip | None = None) -> None:
    """`Binding.declare` of this process."""
    BINDING.declare(namespace, chip=chip)


def load_kernels() -> None:
    """Imports every module of this package, so that KERNELS is complete. Raises ContractError for a kernel
    without a schema.
    """
    package = importlib.import_module(__package__)
    for found in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{found.name}")
    known = {f"{namespace}::{name}" for namespace in NAMESPACES for name in schema_strings(namespace)}
    unknown = sorted(KERNELS.keys() - known)
    if unknown:
        raise ContractError(f"kernels without a schema in operators/npu/schemas: {', '.join(unknown)}.")


def _kernel_of(name: str, sim: SimulatedChip) -> Kernel:
    found = KERNELS.get(name)
    if found is None:
        raise SimulatorError(f"{name}: the operator is declared and has no simulated kernel")
    if sim.chip not in found.chips:
        package = PACKAGE_OF_NAMESPACE[name.split("::", maxsplit=1)[0]]
        chips = "/".join(chip.value for chip in found.chips)
        raise SimulatorError(f"{name}: {package} builds it for {chips}, this is {sim.chip.value}")
    return found


def _arguments_of(
    schema: torch.FunctionSchema,
) -> Callable[[tuple[object, ...], dict[str, object]], dict[str, object]]:
    names = [argument.name for argument in schema.arguments]
    defaults = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}

    def complete(args: tuple[object, ...], kwargs: dict[str, object]) -> dict[str, object]:
        values = {name: copy(value) for name, value in defaults.items()}
        values.update(zip(names, args, strict=False))
        values.update(kwargs)
        return values

    return complete


def _has_tensor(schema: torch.FunctionSchema) -> bool:
    """Whether every call carries a tensor to dispatch by."""
    return any(str(argument.type) in ("Tensor", "List[Tensor]") for argument in schema.arguments)
