"""Patches of torch that make "npu" a device one can name: factories and copies give CPU tensors.

A move to the device copies, as a real one does. An NZ tensor is already there and stays itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.simulator.formats import nz_format_of, to_nd

DEVICE_TYPE = "npu"

FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace",
    "logspace", "normal", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like", "randn",
    "randn_like", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
    "zeros_like",
)  # fmt: skip
METHODS = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")

Patch = tuple[Any, str, Any]
"""Owner, attribute, what it becomes."""


def is_npu(device: object) -> bool:
    """Whether a device argument names the simulated device."""
    if isinstance(device, str):
        return device.partition(":")[0] == DEVICE_TYPE
    return isinstance(device, torch.device) and device.type == DEVICE_TYPE


def patches() -> list[Patch]:
    """Every attribute of torch to replace while a chip is simulated."""
    found: list[Patch] = [(torch, name, _on_cpu(getattr(torch, name))) for name in FACTORIES]
    found += [(Tensor, name, _on_cpu(getattr(Tensor, name))) for name in METHODS]
    found += [
        (Tensor, "to", _moving(Tensor.to)),
        (Tensor, "cpu", _fetching(Tensor.cpu)),
        (Tensor, "npu", _to_npu),
        (Tensor, "is_npu", property(lambda tensor: tensor.device.type == "cpu")),
        (torch.nn.Module, "npu", _module_to_npu),
        # torch would ask C++ hooks of the device next, which a simulated one does not have.
        (torch.accelerator, "is_available", lambda: False),
        (torch, "set_default_device", _default_device(torch.set_default_device)),
    ]
    return found


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401 -- torch's own arguments, passed on
        if is_npu(kwargs.get("device")):
            kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made


def _moving(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(move)
    def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        if args and is_npu(args[0]):
            args = ("cpu", *args[1:])
        elif is_npu(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        else:
            return move(tensor, *args, **kwargs)
        result = move(tensor, *args, **kwargs)
        return _copied(result) if result is tensor else result

    return moved


def _fetching(fetch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(fetch)
    def fetched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
        found = nz_format_of(tensor)
        if found is not None:
            return to_nd(tensor, "Tensor.cpu", fractal_bytes=found.fractal_bytes).contiguous()
        result = fetch(tensor, *args, **kwargs)
        return result.clone() if result is tensor else result

    return fetched


def _copied(tensor: Tensor) -> Tensor:
    return tensor if nz_format_of(tensor) is not None else tensor.clone()


def _to_npu(tensor: Tensor, device: object = None, non_blocking: bool = False, **_: object) -> Tensor:
    return _copied(tensor)


def _module_to_npu(module: torch.nn.Module, device: object = None) -> torch.nn.Module:
    module._apply(_copied)  # type: ignore[no-untyped-call]
    return module


def _default_device(choose: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(choose)
    def chosen(device: Any) -> None:  # noqa: ANN401
        choose("cpu" if is_npu(device) else device)

    return chosen
