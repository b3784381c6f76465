"""What `ascend-v4 devices` reports: the devices of this machine, and why others cannot be used."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from typing import Any

from ascend_v4 import env
from ascend_v4.device.base import Accelerator, Memory
from ascend_v4.device.cpu import CpuDevice
from ascend_v4.device.packages import NAMESPACES, InstalledPackages
from ascend_v4.device.soc import CHIPS, Chip, Soc, chip_of, soc_of
from ascend_v4.device.software import (
    AscendSoftware,
    Problem,
    explain_import_error,
    find_software,
    is_installed,
    npu_problem,
    torch_problem,
    version_of,
)
from ascend_v4.errors import DeviceError


def take_inventory() -> dict[str, Any]:
    """Facts as plain data. Raises nothing: what is missing or broken is a problem in the report.

    A torch_npu that would break `import torch` is kept out of this process first.
    """
    software = find_software()
    npu_trouble = npu_problem(software)
    if software.breaks_torch:
        env.BACKEND_AUTOLOAD.set("0")
    version, torch_trouble = _import_torch()
    return {
        "torch": version,
        "problem": _plain(torch_trouble or torch_problem(software)),
        "cpu": {
            "name": platform.machine(),
            "threads": os.cpu_count(),
            "memory": asdict(CpuDevice().memory()),
        },
        "cuda": _cuda() if torch_trouble is None else _nothing(torch_trouble),
        "npu": _npu(software, npu_trouble or torch_trouble),
        "sim": {"chips": {chip.value: CHIPS[chip].products for chip in Chip}},
    }


def package_versions() -> dict[str, str | None]:
    """Vendor packages by module name, with their version; None where they are not installed."""
    return {
        package.module: version_of(package.module) if is_installed(package.module) else None
        for package in NAMESPACES.values()
    }


def soc_facts(soc_name: str) -> dict[str, Any]:
    """What the chip table knows of a soc, as plain data."""
    chip, soc = chip_of(soc_name), soc_of(soc_name)
    if chip is None:
        return {"chip": None}
    known = CHIPS[chip]
    return {
        "chip": chip.value,
        "products": known.products,
        "formats": list(known.formats),
        "packs": list(known.packs),
        "limits": list(known.limits),
        **({} if soc is None else _figures(soc)),
    }


def _figures(soc: Soc) -> dict[str, Any]:
    return {
        "nominal_hbm_bytes": soc.hbm_bytes,
        "bytes_per_s": soc.bytes_per_s,
        "matrix_cores": soc.matrix_cores,
        "teraops": dict(soc.teraops),
        "source": soc.source,
    }


def _import_torch() -> tuple[str | None, Problem | None]:
    try:
        import torch
    except (ImportError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        known = explain_import_error(error)
        return None, known or Problem(f"torch cannot be imported: {first_line}", "Install torch again")
    return str(torch.__version__), None


def _cuda() -> dict[str, Any]:
    from ascend_v4.device import cuda

    try:
        machine = cuda.require()
    except DeviceError as error:
        return _nothing(Problem(str(error).removeprefix("--device cuda: ").rstrip("."), ""))
    devices = []
    for index in range(machine.num_devices):
        device = cuda.open_device(index)
        devices.append({"index": index, "name": cuda.name_of(index), "memory": _memory(device)})
    return {"devices": devices, "cuda": cuda.runtime_version(), "problem": None}


def _npu(software: AscendSoftware, trouble: Problem | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "devices": [],
        "device_nodes": software.num_device_nodes,
        "visible": env.VISIBLE_NPUS.read() or None,
        "driver": software.driver_version,
        "cann": software.cann_version,
        "cann_home": None if software.cann_home is None else str(software.cann_home),
        "torch_npu": software.torch_npu_version,
        "packages": package_versions(),
        "op_api_libraries": [str(path) for path in InstalledPackages().libraries()],
        "problem": _plain(trouble),
    }
    if trouble is not None:
        return facts
    from ascend_v4.device import npu

    try:
        machine = npu.require()
        for index in range(machine.num_devices):
            name = npu.name_of(index)
            memory = _memory(npu.open_device(npu.import_runtime(), index))
            facts["devices"].append({"index": index, "name": name, "memory": memory, **soc_facts(name)})
    except (DeviceError, RuntimeError) as error:
        # the runtime's own failures are RuntimeErrors: a device that is taken, or that fell off the bus
        text = (str(error).splitlines() or [type(error).__name__])[0].removeprefix("--device npu: ")
        facts["problem"] = _plain(Problem(text.rstrip("."), "Look at npu-smi info"))
    return facts


def _memory(device: Accelerator) -> dict[str, int] | None:
    try:
        found: Memory = device.memory()
    except RuntimeError:
        # of a device that another process holds alone
        return None
    return asdict(found)


def _nothing(problem: Problem) -> dict[str, Any]:
    return {"devices": [], "problem": _plain(problem)}


def _plain(problem: Problem | None) -> dict[str, str] | None:
    return None if problem is None else {"what": problem.what, "do": problem.do}
