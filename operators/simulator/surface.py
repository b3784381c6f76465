"""Puts the face of an Ascend machine on a process, and takes it off again.

torch cannot forget the device name "npu" once it knows it, and then asks torch.npu whether the device is
there. So a torch.npu that says no stays behind; everything else is undone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.backend_registration import rename_privateuse1_backend

from ascend_v4.errors import SimulatorError
from ascend_v4.operators.simulator.state import SimulatedChip
from ascend_v4.operators.simulator.surface_device import absent_device_module, device_module
from ascend_v4.operators.simulator.surface_modules import REAL_PACKAGES, SIMULATED, modules
from ascend_v4.operators.simulator.surface_tensors import DEVICE_TYPE, patches

UNNAMED = "privateuseone"
"""What torch calls the device of an extension until one names it."""
DEVICES = Path("/dev")
CARD_PATTERN = "davinci[0-9]*"

MISSING = object()


class Surface:
    """What one process has patched, so that it can be undone."""

    def __init__(self) -> None:
        self.patched: list[tuple[Any, str, Any, Any]] = []
        """Owner, attribute, what it was, what it is now."""
        self.hidden: dict[str, ModuleType | None] = {}
        """Modules of sys.modules as they were."""

    def put_up(self, sim: SimulatedChip) -> None:
        """Makes the process look like a machine with the chip; over an earlier chip it replaces that one."""
        self.take_down()
        _name_device()
        if not hasattr(torch, DEVICE_TYPE):
            setattr(torch, DEVICE_TYPE, absent_device_module())
            sys.modules[f"torch.{DEVICE_TYPE}"] = getattr(torch, DEVICE_TYPE)
        device = device_module(sim)
        for name, module in modules(device).items():
            self.hidden[name] = sys.modules.get(name)
            sys.modules[name] = module
        self._patch(torch, DEVICE_TYPE, device)
        for owner, name, value in patches():
            self._patch(owner, name, value)

    def take_down(self) -> None:
        """Restores what is still as this put it; what others have patched since stays."""
        for owner, name, before, now in reversed(self.patched):
            if vars(owner).get(name, MISSING) is not now:
                continue
            if before is MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self.patched.clear()
        for name, before in self.hidden.items():
            sys.modules.pop(name, None)
            if before is not None:
                sys.modules[name] = before
        self.hidden.clear()

    def _patch(self, owner: Any, name: str, value: object) -> None:  # noqa: ANN401 -- modules and classes
        before = vars(owner).get(name, MISSING)
        setattr(owner, name, value)
        self.patched.append((owner, name, before, value))


SURFACE = Surface()
"""The one of this process: sys.modules and torch are."""


def put_up(sim: SimulatedChip) -> None:
    """`Surface.put_up` of this process."""
    SURFACE.put_up(sim)


def take_down() -> None:
    """`Surface.take_down` of this process."""
    SURFACE.take_down()


def require_no_real_npu(devices: Path = DEVICES) -> None:
    """Raises SimulatorError where a vendor's package is loaded, or the machine has a card."""
    loaded = [
        name for name in REAL_PACKAGES if name in sys.modules and not hasattr(sys.modules[name], SIMULATED)
    ]
    if loaded:
        raise SimulatorError(
            f"{loaded[0]} is loaded in this process, and the simulator does not mix with it. Use "
            "--device npu, or a process that does not import it."
        )
    cards = sorted(path.name for path in devices.glob(CARD_PATTERN))
    if cards:
        raise SimulatorError(
            f"this machine has an Ascend card ({devices / cards[0]}), which the simulator does not "
            "stand in for. Use --device npu."
        )


def _name_device() -> None:
    name = torch._C._get_privateuse1_backend_name()
    if name == UNNAMED:
        rename_privateuse1_backend(DEVICE_TYPE)
    elif name != DEVICE_TYPE:
        raise SimulatorError(
            f"torch calls its extension device {name} in this process, so it cannot be {DEVICE_TYPE}. Use a "
            "process of its own for the simulator."
        )
