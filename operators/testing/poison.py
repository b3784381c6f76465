"""Uninitialised memory made visible: NaN and absurd integers instead of whatever was there before.

A kernel that forgets to write part of its output often finds the right answer there, left by an earlier call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

E8M0_NAN = 0xFF
OTHER_FP8_NAN = 0x7F
"""NaN in every 8-bit float format but e8m0; packed FP4 has none."""

FUNCTIONS = ("empty", "empty_like", "empty_strided")
METHODS = ("new_empty", "new_empty_strided")


def poison(tensor: Tensor) -> Tensor:
    """The tensor filled with values that no correct result survives, in place."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return tensor
    if tensor.dtype.is_complex:
        return tensor.fill_(complex(float("nan"), float("nan")))
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        return tensor.fill_(float("nan"))
    if tensor.dtype.is_floating_point:
        code = E8M0_NAN if tensor.dtype is torch.float8_e8m0fnu else OTHER_FP8_NAN
        tensor.view(torch.uint8).fill_(code)
        return tensor
    if tensor.dtype is torch.bool:
        return tensor.fill_(True)
    limits = torch.iinfo(tensor.dtype)
    return tensor.fill_(limits.min // 2 if limits.min < 0 else limits.max - 1)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its kin return poison inside the block. Memory that kernels take themselves is not
    reached.
    """
    places: list[tuple[Any, str]] = [(torch, name) for name in FUNCTIONS]
    places += [(Tensor, name) for name in METHODS]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, make in originals:
        setattr(owner, name, _poisoning(make))
    try:
        yield
    finally:
        for owner, name, make in originals:
            setattr(owner, name, make)


def _poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return poison(make(*args, **kwargs))

    return poisoned
