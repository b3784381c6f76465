"""From what a user asked for to a target that operators can be chosen for."""

from __future__ import annotations

import importlib
from typing import Any

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import (
    CPU,
    Arithmetic,
    Target,
    TargetRequest,
    named,
    parse_waived,
    require_device,
)
from ascend_v4.errors import ConfigError, DeviceError
from ascend_v4.operators.contract import WAIVABLE

SIM_ONLY = "only the simulator can (--device sim)"


def open_target(asked: Target | TargetRequest | str) -> Target:
    """The target, with its packages; on sim, the simulated operators are registered with this process.

    Raises ConfigError for a combination that makes no sense, DeviceError where the machine lacks the device.
    """
    if isinstance(asked, Target):
        return asked
    if isinstance(asked, str):
        asked = TargetRequest(device=asked)
    require_device(asked.device)
    chip = _chip(asked)
    waived = parse_waived(asked.waive, WAIVABLE)
    arithmetic = named(Arithmetic, asked.arithmetic)
    masked = frozenset(name for group in asked.without for name in group.split(",") if name)
    if asked.device != "sim":
        ideal = arithmetic is Arithmetic.IDEAL
        for what, given in (("waive limits", bool(waived)), ("choose the arithmetic", ideal)):
            if given:
                raise ConfigError(f"--device {asked.device} cannot {what}: {SIM_ONLY}.")
    if asked.device == "cpu":
        return CPU
    if asked.device == "cuda":
        _module("device.cuda").require()
        return Target(device="cuda")
    if asked.device == "npu":
        machine = _module("device.npu").require()
        if chip is not None and chip is not machine.chip:
            raise ConfigError(f"--chip {chip.value} was given and this machine has {machine.chip.value}.")
        packages = machine.packages.without(masked)
        return Target(device="npu", chip=machine.chip, masked=masked, packages=packages)
    if chip is None:
        choices = ", ".join(each.value for each in Chip)
        raise ConfigError(f"--device sim needs --chip, one of {choices}: it decides formats and operators.")
    simulator = _module("operators.simulator")
    simulator.install(chip, waived=waived, arithmetic=arithmetic)
    return Target(
        device="sim",
        chip=chip,
        waived=waived,
        masked=masked,
        arithmetic=arithmetic,
        packages=simulator.packages(chip, masked=masked),
    )


def _module(name: str) -> Any:  # noqa: ANN401 -- backends are imported by name, when they are asked for
    try:
        return importlib.import_module(f"ascend_v4.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("ascend_v4"):
            raise
        raise DeviceError(f"{error}. Install what this device needs, or use --device cpu.") from error


def _chip(asked: TargetRequest) -> Chip | None:
    if asked.chip is None:
        return None
    if asked.device not in ("npu", "sim"):
        raise ConfigError(f"--chip is for npu and sim; --device is {asked.device}.")
    return named(Chip, asked.chip)
