"""Bytes that this process holds on a device."""

from __future__ import annotations

import os
from pathlib import Path

from ascend_v4.device.base import Device
from ascend_v4.device.target import Target

STATM = Path("/proc/self/statm")


def held_bytes(target: Target, device: Device) -> int:
    """In tensors on a device with memory of its own; elsewhere what the process has resident, 0 where the
    system does not say.
    """
    device.synchronize()
    if target.torch_device != "cpu":
        return device.memory().allocated_bytes
    if not STATM.is_file():
        return 0
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
