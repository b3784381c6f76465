"""The module torch.npu of a process that simulates a chip: one device, which is the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ascend_v4.device.soc import SOCS, Chip
from ascend_v4.operators.simulator.state import SimulatedChip, require

SOC_VERSIONS = {Chip.A2: 223, Chip.A3: 250, Chip.A950: 260}
"""What torch_npu's get_soc_version says: 220 to 225 for A2, 250 to 255 for A3, 260 for 950."""
DEFAULT_SOCS = {Chip.A2: "Ascend910B3", Chip.A3: "Ascend910_9391", Chip.A950: "Ascend950PR"}
STREAM_ID = 0


class Stream:
    """Work runs when it is called, so that every stream is in order with all others."""

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        self.device = torch.device("cpu")
        self.priority = priority
        self.stream_id = STREAM_ID
        self.npu_stream = STREAM_ID

    def wait_event(self, event: Event) -> None:
        """Nothing to wait for."""

    def wait_stream(self, stream: Stream) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Event | None = None) -> Event:
        """The event, or a new one."""
        return event if event is not None else Event()

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Everything is done."""
        return True


class Event:
    """A point in time that has passed."""

    def __init__(self, enable_timing: bool = False, **_: object) -> None:
        self.enable_timing = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        """Nothing to record."""

    def wait(self, stream: Stream | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has passed."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds; a simulated chip takes no time."""
        return 0.0


@contextmanager
def in_stream(stream: Stream | None) -> Iterator[None]:
    """torch.npu.stream: a block whose work would go to a stream."""
    yield


class DeviceBlock:
    """torch.npu.device: a block that would run on a device."""

    def __init__(self, device: object) -> None:
        require_device_index(device)

    def __enter__(self) -> None:
        """Enters the only device."""

    def __exit__(self, *_: object) -> None:
        """Leaves the only device."""


def require_device_index(device: object) -> None:
    """Raises SimulatorError for any device but the only one."""
    named = torch.device(device) if isinstance(device, str) else device
    index = named.index if isinstance(named, torch.device) else named
    require(index in (None, 0), "torch.npu", f"there is one simulated device, npu:0, not {device}")


def device_module(sim: SimulatedChip) -> ModuleType:
    """What `torch.npu` is while sim is installed. Internal formats are allowed from the start."""
    module = ModuleType("torch.npu")
    module.__doc__ = "A simulated Ascend device."
    for name, value in {**_identity(sim), **_execution(), **_memory(sim)}.items():
        setattr(module, name, value)
    return module


def absent_device_module() -> ModuleType:
    """What `torch.npu` is when no chip is simulated any more: a device that is not there."""
    module = ModuleType("torch.npu")
    module.__doc__ = "No Ascend device."
    for name, value in (
        ("is_available", lambda: False),
        ("device_count", lambda: 0),
        ("_is_in_bad_fork", lambda: False),
        ("manual_seed_all", lambda seed: None),
    ):
        setattr(module, name, value)
    return module


def _identity(sim: SimulatedChip) -> dict[str, Any]:
    name = DEFAULT_SOCS[sim.chip]

    def properties(device: object = None) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, total_memory=memory_bytes(sim.chip), major=0, minor=0, multi_processor_count=1
        )

    return {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": require_device_index,
        "device": DeviceBlock,
        "get_device_name": lambda device=None: name,
        "get_soc_version": lambda: SOC_VERSIONS[sim.chip],
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: None,
        "is_bf16_supported": lambda: True,
    }


def _execution() -> dict[str, Any]:
    current = Stream()

    def nothing(*_: object, **__: object) -> None:
        return None

    return {
        "init": nothing,
        "_lazy_init": nothing,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "seed": nothing,
        "seed_all": nothing,
        "initial_seed": torch.initial_seed,
        "synchronize": nothing,
        "Stream": Stream,
        "Event": Event,
        "stream": in_stream,
        "current_stream": lambda device=None: current,
        "default_stream": lambda device=None: current,
        "set_stream": nothing,
        "set_compile_mode": nothing,
        "set_option": nothing,
        "config": SimpleNamespace(allow_internal_format=True),
        "matmul": SimpleNamespace(allow_hf32=False),
        "conv": SimpleNamespace(allow_hf32=True),
    }


def _memory(sim: SimulatedChip) -> dict[str, Any]:
    def nothing(*_: object, **__: object) -> None:
        return None

    def zero(*_: object, **__: object) -> int:
        return 0

    names = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    return {
        **dict.fromkeys(names, zero),
        "mem_get_info": lambda device=None: (memory_bytes(sim.chip), memory_bytes(sim.chip)),
        "memory_stats": lambda device=None: {},
        "memory_summary": lambda *_, **__: "simulated device: no memory statistics",
        "empty_cache": nothing,
        "reset_peak_memory_stats": nothing,
        "reset_max_memory_allocated": nothing,
        "ipc_collect": nothing,
    }


def memory_bytes(chip: Chip) -> int:
    """Memory of the soc that stands for a chip: its first one with a known size."""
    return next(soc.hbm_bytes for soc in SOCS if soc.chip is chip and soc.hbm_bytes is not None)
