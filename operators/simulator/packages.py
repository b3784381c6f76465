"""What software a simulated machine has: every vendor package as built for the chip, less what is masked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ascend_v4.device.soc import Chip
from ascend_v4.operators.simulator.binding import load_kernels
from ascend_v4.operators.simulator.kernels import KERNELS, PACKAGE_OF_NAMESPACE, Kernel

OPS_TRANSFORMER = "ops_transformer"
"""Not a Python module: CANN's package of kernels behind some bindings of custom_ops."""
MODULES = (*PACKAGE_OF_NAMESPACE.values(), OPS_TRANSFORMER)


@dataclass(frozen=True, slots=True)
class SimulatedPackages:
    """Answers as a machine with that chip and all packages but the masked ones would."""

    chip: Chip
    masked: frozenset[str] = frozenset()

    def missing_module(self, name: str) -> str | None:
        """Whether a Python module, or the pseudo-module ops_transformer, is there."""
        if name in self.masked:
            return f"module {name} is masked out"
        if name not in MODULES:
            return f"module {name} is not simulated"
        return None

    def missing_operator(self, qualified_name: str) -> str | None:
        """Whether `namespace::name` has a kernel in the chip's build; an overload may be named too."""
        namespace = qualified_name.split("::", maxsplit=1)[0]
        package = PACKAGE_OF_NAMESPACE.get(namespace)
        if package is None:
            return f"{qualified_name}: namespace {namespace} is not simulated"
        if package in self.masked:
            return f"{qualified_name}: module {package} is masked out"
        found = [
            kernel
            for name, kernel in KERNELS.items()
            if name == qualified_name or name.startswith(f"{qualified_name}.")
        ]
        if not found:
            return f"{qualified_name} has no simulated kernel"
        return self._missing_build(qualified_name, found)

    def missing_symbol(self, name: str) -> str | None:
        """Whether a kernel of the chip's build stands behind an aclnn function."""
        found = [kernel for kernel in KERNELS.values() if kernel.symbol == name]
        if not found:
            return f"{name}: no simulated kernel stands behind it"
        there = [kernel for kernel in found if kernel.symbol_package not in self.masked]
        if not there:
            return f"{name}: package {found[0].symbol_package} is masked out"
        return self._missing_build(name, there)

    def _missing_build(self, name: str, found: Iterable[Kernel]) -> str | None:
        chips = [chip for kernel in found for chip in kernel.chips]
        if self.chip in chips:
            return None
        built = "/".join(dict.fromkeys(chip.value for chip in chips))
        return f"{name} is built for {built}, this is {self.chip.value}"


def packages(chip: Chip, masked: frozenset[str] = frozenset()) -> SimulatedPackages:
    """The packages of a simulated machine; masked names modules, or ops_transformer, treated as absent."""
    load_kernels()
    return SimulatedPackages(chip, masked)
