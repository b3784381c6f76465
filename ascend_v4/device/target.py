"""What a run is asked to use: a device, its chip, what the simulator waives. Standard library only.

A target is a plain value. What is installed where it points is asked of its `packages`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, TypeVar

from ascend_v4.device.soc import Chip
from ascend_v4.errors import ConfigError

DEVICES = ("cpu", "cuda", "npu", "sim")
"""What `--device` takes; sim runs the Ascend adapters over simulated operators on the CPU."""


class Arithmetic(Enum):
    """How the simulator rounds: as the chips are known to, or only where a result is stored."""

    CHIP = "chip"
    IDEAL = "ideal"


class Packages(Protocol):
    """What software a target has. Each question is answered by None for "there", or by a reason."""

    def missing_module(self, name: str) -> str | None:
        """Whether a Python module can be imported, without importing it."""

    def missing_operator(self, qualified_name: str) -> str | None:
        """Whether `namespace::name` is registered with torch, or would be once its package is imported."""

    def missing_symbol(self, name: str) -> str | None:
        """Whether an op_api library that is loaded or installed exports an aclnn function."""


@dataclass(frozen=True)
class NoPackages:
    """A target without vendor software."""

    why: str = "this target has no vendor packages"

    def missing_module(self, name: str) -> str | None:
        """Never there."""
        return f"module {name}: {self.why}"

    def missing_operator(self, qualified_name: str) -> str | None:
        """Never there."""
        return f"{qualified_name}: {self.why}"

    def missing_symbol(self, name: str) -> str | None:
        """Never there."""
        return f"{name}: {self.why}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A device to choose operators for."""

    device: str
    """One of DEVICES."""
    chip: Chip | None = None
    """Of npu and sim; None elsewhere."""
    waived: frozenset[str] = frozenset()
    """Model sizes whose limits the simulator relaxes, by their names in `operators.contract.WAIVABLE`."""
    masked: frozenset[str] = frozenset()
    """Packages treated as absent, by module name."""
    arithmetic: Arithmetic = Arithmetic.CHIP
    packages: Packages = field(default_factory=NoPackages, compare=False, repr=False)

    @property
    def backend(self) -> str:
        """Whose implementations run: those of npu for the simulator too."""
        return "npu" if self.device == "sim" else self.device

    @property
    def torch_device(self) -> str:
        """Where tensors live."""
        return "cpu" if self.device == "sim" else self.device

    def describe(self) -> str:
        """`sim (a3)`, `npu (950)`, `cpu`."""
        return self.device if self.chip is None else f"{self.device} ({self.chip.value})"


CPU = Target(device="cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRequest:
    """What a user asked for, as typed; `ascend_v4.operators.targets.open_target` turns it into a target."""

    device: str = "cpu"
    chip: str | None = None
    waive: tuple[str, ...] = ()
    arithmetic: str = Arithmetic.CHIP.value
    without: tuple[str, ...] = ()
    """Packages to treat as absent."""


ON_CPU = TargetRequest()


E = TypeVar("E", bound=Enum)


def named(kind: type[E], value: E | str) -> E:
    """A member of an enumeration by its value, or itself. Raises ConfigError for another value."""
    if isinstance(value, kind):
        return value
    known = {str(each.value): each for each in kind}
    if str(value).lower() not in known:
        raise ConfigError(f"{kind.__name__.lower()} {value!r} is unknown; choose one of {', '.join(known)}.")
    return known[str(value).lower()]


def require_device(name: str) -> str:
    """The name itself. Raises ConfigError for one that is not in DEVICES."""
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is unknown; choose one of {', '.join(DEVICES)}.")
    return name


def parse_waived(groups: Iterable[str], names: tuple[str, ...]) -> frozenset[str]:
    """Names of `--waive-limits`: `sizes` for all of them, or some by name. Raises ConfigError for others."""
    waived: set[str] = set()
    for group in groups:
        for name in filter(None, (part.strip() for part in group.split(","))):
            if name == "sizes":
                waived |= set(names)
            elif name in names:
                waived.add(name)
            else:
                raise ConfigError(
                    f"--waive-limits {name!r} is not a model size. Sizes: {', '.join(names)}; `sizes` is "
                    "all. Dtypes, layouts, alignments and index ranges are never waived."
                )
    return frozenset(waived)
