"""Judging one run: its outputs, the caches it may write, the inputs it must leave alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.contract import Tolerance

LOW_PRECISION = (torch.bfloat16, torch.float16)


def require_close(
    got: Tensor, want: Tensor, tolerance: Tolerance, *, contract: Tolerance, label: str = "output"
) -> None:
    """Holds `got` to the implementation's tolerance and to a root mean square of its own.

    Single elements may be off by `tolerance`. On average a float32 result may be off by as many steps; a
    lower precision only flips roundings, so by one step, or by as many times more as the implementation's
    tolerance is looser than the contract's.

    Raises AssertionError with the measured and the allowed difference.
    """
    got, want = got.detach().cpu(), want.detach().cpu()
    tolerance.require(got, want, label=label)
    if tolerance.steps == 0 or not want.dtype.is_floating_point:
        return
    finite = torch.isfinite(want)
    size = want[finite].double().square().mean().sqrt().item() if bool(finite.any()) else 0.0
    error = (got[finite].double() - want[finite].double()).square().mean().sqrt().item() if size else 0.0
    steps = tolerance.steps
    if want.dtype in LOW_PRECISION:
        steps = max(1.0, tolerance.steps / max(contract.steps, 1.0))
    bound = steps * torch.finfo(want.dtype).eps * size
    assert error <= bound, (
        f"{label}: off by {error:.3g} on average, allowed {bound:.3g} ({steps:g} steps: {tolerance.why})"
    )


def require_finite(want: Tensor, *, label: str = "output") -> None:
    """Raises AssertionError where a reference result is NaN or infinite: such a case could hide poison."""
    finite = torch.isfinite(want) if want.dtype.is_floating_point else torch.ones(1, dtype=torch.bool)
    assert bool(finite.all()), f"{label}: the reference itself is not finite, so the case shows nothing"


def tensors_in(value: object, *, path: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor inside nested dataclasses, tuples and mappings, with a path to show."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_in(part, path=f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for index, part in enumerate(value):
            yield from tensors_in(part, path=f"{path}[{index}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name), path=f"{path}.{field.name}")


def storage_bytes(tensor: Tensor) -> Tensor:
    """The whole memory behind a tensor, what lies around a slice included, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Inputs and a copy of their memory, taken before a call."""

    tensors: tuple[tuple[str, Tensor], ...]
    copies: Mapping[int, Tensor]
    """By address of the memory, so that tensors in the same memory share a copy."""

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Snapshot:
        """A snapshot of all tensors in an operator's arguments."""
        tensors = tuple(tensors_in(arguments, path=""))
        copies: dict[int, Tensor] = {}
        for _, tensor in tensors:
            memory = storage_bytes(tensor)
            if memory.data_ptr() not in copies:
                copies[memory.data_ptr()] = memory.clone()
        return Snapshot(tensors, copies)

    def require_untouched(self, *, written_rows: Mapping[str, Tensor | None]) -> None:
        """Compares memory bit by bit.

        written_rows names the arguments that are written in place, with the rows of `view(-1, width)` that
        may change, or None where all of the argument (but not what lies around it) may.
        Raises AssertionError with the first argument that changed elsewhere.
        """
        compared: set[int] = set()
        for path, tensor in self.tensors:
            after = storage_bytes(tensor)
            address = after.data_ptr()
            before = self.copies[address]
            if path not in written_rows:
                assert address in compared or torch.equal(after, before), f"{path} was written to"
                compared.add(address)
                continue
            rows = written_rows[path]
            allowed = before.clone()
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            view.set_(allowed.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if rows is None:
                view.copy_(tensor)
            else:
                width = tensor.shape[-1]
                chosen = rows.to(tensor.device)
                view.view(-1, width)[chosen] = tensor.view(-1, width)[chosen]
            assert torch.equal(after, allowed), f"{path} changed outside of what the call may write"
