"""CUDA devices: the only file besides operators/cuda that sees torch.cuda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ascend_v4.device.base import Accelerator
from ascend_v4.errors import DeviceError


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaMachine:
    """A machine with at least one CUDA device."""

    device: Accelerator
    device_name: str
    capability: tuple[int, int]
    num_devices: int


def require(index: int = 0) -> CudaMachine:
    """The machine's CUDA device. Raises DeviceError where torch has none."""
    runtime = _runtime()
    count = count_devices()
    if index >= count:
        built = "for the CPU only" if runtime_version() is None else f"for CUDA {runtime_version()}"
        raise DeviceError(
            f"--device cuda: device {index} is asked for and torch, built {built}, sees {count}. Check "
            "nvidia-smi and the torch build, or use --device cpu."
        )
    return CudaMachine(
        device=open_device(index),
        device_name=runtime.get_device_name(index),
        capability=runtime.get_device_capability(index),
        num_devices=count,
    )


def open_device(index: int = 0) -> Accelerator:
    """A CUDA device that is there."""
    return Accelerator(
        _runtime(), kind="cuda", index=index, collective_backend="nccl", graph_class="CUDAGraph"
    )


def count_devices() -> int:
    """Devices that torch sees; 0 for a build without CUDA."""
    runtime = _runtime()
    return int(runtime.device_count()) if runtime.is_available() else 0


def name_of(index: int) -> str:
    """What the runtime calls a device."""
    return str(_runtime().get_device_name(index))


def runtime_version() -> str | None:
    """The CUDA version that torch was built for; None for a build without."""
    import torch

    return torch.version.cuda


def _runtime() -> Any:  # noqa: ANN401 -- a module
    import torch

    return torch.cuda
