"""Ascend NPUs: the only file of this package that imports torch_npu, and only when an NPU is asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from ascend_v4.device.base import Accelerator
from ascend_v4.device.packages import InstalledPackages
from ascend_v4.device.soc import Chip, Soc, chip_of, soc_of
from ascend_v4.device.software import explain_import_error, find_software, npu_problem
from ascend_v4.errors import DeviceError


@dataclass(frozen=True, kw_only=True, slots=True)
class NpuMachine:
    """A machine with at least one NPU, its runtime set up."""

    device: Accelerator
    soc_name: str
    chip: Chip
    soc: Soc | None
    num_devices: int
    packages: InstalledPackages


def require(index: int = 0) -> NpuMachine:
    """Imports torch_npu and sets it up: internal formats allowed, no compilation of operators at run time.

    Raises DeviceError in one sentence for whatever is missing: torch_npu, CANN, driver, device, or a chip
    that V4 operators are built for.
    """
    problem = npu_problem(find_software())
    if problem is not None:
        raise DeviceError(f"--device npu: {problem.sentence()}")
    packages = InstalledPackages()
    packages.announce_kernels()
    runtime = import_runtime()
    count = int(runtime.device_count()) if runtime.is_available() else 0
    if index >= count:
        raise DeviceError(
            f"--device npu: device {index} is asked for and torch_npu sees {count}. Check npu-smi info and "
            "ASCEND_RT_VISIBLE_DEVICES."
        )
    runtime.set_device(index)
    # matrix weights in NZ layout need the first; the second keeps operators from being compiled when called
    runtime.config.allow_internal_format = True
    runtime.set_compile_mode(jit_compile=False)
    soc_name = str(runtime.get_device_name(index))
    chip = chip_of(soc_name)
    if chip is None:
        raise DeviceError(
            f"--device npu: the soc of this machine is {soc_name}; operators of DeepSeek-V4 are built for "
            "Ascend910B1 to B4, Ascend910_93 and Ascend950. Use --device cpu."
        )
    return NpuMachine(
        device=open_device(runtime, index),
        soc_name=soc_name,
        chip=chip,
        soc=soc_of(soc_name),
        num_devices=count,
        packages=packages,
    )


def import_runtime() -> Any:  # noqa: ANN401 -- a module
    """torch.npu, with torch_npu imported. Raises DeviceError where that fails."""
    try:
        import torch

        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        problem = explain_import_error(error)
        if problem is None:
            raise
        raise DeviceError(f"--device npu: {problem.sentence()}") from error
    return torch.npu  # type: ignore[attr-defined]


def name_of(index: int) -> str:
    """What the runtime calls a device: its soc. The runtime must have been imported."""
    return str(import_runtime().get_device_name(index))


def open_device(runtime: Any, index: int = 0) -> Accelerator:  # noqa: ANN401 -- torch.npu, or its simulation
    """An NPU that is there."""
    return Accelerator(runtime, kind="npu", index=index, collective_backend="hccl", graph_class="NPUGraph")
