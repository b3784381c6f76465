"""Comparison of a simulated kernel with its meta function."""

from __future__ import annotations

from typing import Any

import torch

from ascend_v4.operators.simulator.kernels import KERNELS
from ascend_v4.operators.simulator.state import SimulatedChip
from tests.npu.vendor_calls import call, full_arguments


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, list):
        return [_on_meta(each) for each in value]
    return value


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def called(sim: SimulatedChip, name: str, **given: Any) -> Any:
    """What the kernel returns, after its meta function was seen to promise the same shapes and dtypes."""
    result = call(sim, name, **given)
    moved = {key: _on_meta(value) for key, value in given.items()}
    promised = KERNELS[name].meta(sim, **full_arguments(name, moved))
    got = [(tuple(each.shape), each.dtype) for each in _tensors(result)]
    assert got == [(tuple(each.shape), each.dtype) for each in _tensors(promised)]
    return result
