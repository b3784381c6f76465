"""A numeric simulator of the vendors' operators on the CPU, written from their documented semantics.

`install(chip)` registers it with this process: torch.ops.npu, torch.ops._C_ascend and torch.ops.custom then
run on CPU tensors, `import torch_npu` and torch.npu answer for the chip, and `.npu()` copies. What the chip
leaves undefined is an error or poison here.
"""

from __future__ import annotations

from collections.abc import Iterable

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Arithmetic, named, parse_waived
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.npu.schemas import NAMESPACES
from ascend_v4.operators.simulator import surface
from ascend_v4.operators.simulator.binding import BINDING, declare, load_kernels
from ascend_v4.operators.simulator.packages import packages
from ascend_v4.operators.simulator.state import SimulatedChip

__all__ = ["declare", "install", "installed", "packages", "uninstall"]


def install(
    chip: Chip | str,
    *,
    waived: Iterable[str] = (),
    arithmetic: Arithmetic | str = Arithmetic.CHIP,
) -> None:
    """Makes this process look like a machine with one such chip; a second call changes the chip.

    chip and arithmetic may be given by value: "a3", "ideal". waived are names of
    `operators.contract.WAIVABLE`, or "sizes" for all, whose fixed sizes the kernels then do not insist on.
    Internal formats (NZ) are allowed, as the device layer leaves a real process.
    Raises ConfigError for a name that is not known, SimulatorError where a real package is loaded or the
    machine has a card.
    """
    chip, arithmetic = named(Chip, chip), named(Arithmetic, arithmetic)
    waived = parse_waived((waived,) if isinstance(waived, str) else waived, WAIVABLE)
    surface.require_no_real_npu()
    load_kernels()
    for namespace in NAMESPACES:
        BINDING.bind(namespace)
    BINDING.sim = SimulatedChip(chip=chip, arithmetic=arithmetic, waived=waived)
    surface.put_up(BINDING.sim)


def uninstall() -> None:
    """Takes the patches of torch and the modules away; the operators stay registered and refuse to run.

    The device name "npu" stays known to torch, which cannot forget it.
    """
    BINDING.sim = None
    surface.take_down()


def installed() -> SimulatedChip | None:
    """The chip that this process simulates now."""
    return BINDING.sim
