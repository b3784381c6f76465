"""A device that is not there: memory of the CPU that mixes with the CPU's own as that of a GPU would.

    with elsewhere():
        x = torch.zeros(3, device=DEVICE)
        x + torch.ones(3)  # RuntimeError: Expected all tensors to be on the same device

Code that passes here asks every factory for the right device. Kernels are the CPU's, except where a GPU is
known to differ: a division by a number multiplies by its reciprocal, and sums run in another order. What must
be equal to the bit on every device has to survive both. Kernels that a GPU lacks are not noticed.

The device's type is one that every torch has a guard and none has kernels for, so that a call which does not
come by here fails. Calls of other threads than the one in the block do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy", 0)
CPU = torch.device("cpu")

aten = torch.ops.aten
INDEXING = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
)
"""A device tensor takes indices of the CPU; a CPU tensor none of the device."""
FILLING = frozenset(
    {
        aten.fill.Tensor,
        aten.fill_.Tensor,
        aten.masked_fill.Tensor,
        aten.masked_fill_.Tensor,
        aten.index_fill.int_Tensor,
        aten.index_fill_.int_Tensor,
    }
)
"""Besides elementwise operators, what takes a number from a CPU tensor without axes."""


class ElsewhereTensor(Tensor):
    """A tensor of the device: `here` is the same memory as a CPU tensor."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, here: Tensor) -> ElsewhereTensor:
        made = Tensor._make_subclass(cls, here, dispatch_device=True, device_for_backend_keys=DEVICE)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]  # a class method
        return _run(func, args, kwargs or {})

    def tolist(self):
        return self.here.tolist()


class _Everywhere(TorchDispatchMode):
    """Shows `_run` the calls without a tensor of the device among their arguments: factories and copies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The device, for as long as the block runs."""
    before = torch._C._only_lift_cpu_tensors()
    # else torch.tensor(..., device=) copies to the device where no mode sees it
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Everywhere():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """One call, on the CPU; its results are the device's where its inputs are, or where its keyword says."""
    if func is torch.ops.prim.device.default:
        return DEVICE if isinstance(args[0], ElsewhereTensor) else CPU
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    theirs = [tensor for tensor in tensors if isinstance(tensor, ElsewhereTensor)]
    wanted = kwargs.get("device")
    if not theirs and (wanted is None or wanted.type != DEVICE.type):
        return func(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        # inference mode hands over whole what it else takes apart: `to`, `linear`, `einsum`
        with _Everywhere():
            return func.decompose(*args, **kwargs)
    own = [tensor for tensor in tensors if not isinstance(tensor, ElsewhereTensor)]
    if theirs and own:
        _require_one_device(func, args, own)
    by_tensor = func in DIVISIONS and isinstance(args[1], ElsewhereTensor)
    call = func if by_tensor else OWN_WAYS.get(func, func)
    outer_of = {id(tensor.here): tensor for tensor in theirs}
    args, settings = pytree.tree_map_only(ElsewhereTensor, lambda tensor: tensor.here, (args, dict(kwargs)))
    if wanted is not None:
        settings["device"] = CPU
    result = call(*args, **settings)
    if func._schema.is_mutable:
        for tensor in theirs:
            _follow(tensor)
    if wanted is not None and wanted.type != DEVICE.type:
        return result

    def outer(made: Tensor) -> Tensor:
        if any(made is tensor for tensor in own):
            return made
        return outer_of[id(made)] if id(made) in outer_of else ElsewhereTensor(made)

    return pytree.tree_map_only(Tensor, outer, result)


def _require_one_device(func: Any, args: tuple[Any, ...], own: list[Tensor]) -> None:
    """Raises RuntimeError as torch does where tensors of the CPU may not stand beside those of the device."""
    if func is aten.copy_.default:
        return
    is_written_here = func._schema.is_mutable and not isinstance(args[0], ElsewhereTensor)
    wrong = own
    if func in INDEXING:
        if not isinstance(args[0], ElsewhereTensor):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        values = args[2:3]
        wrong = [each for each in values if not isinstance(each, ElsewhereTensor) and each.dim()]
    elif (torch.Tag.pointwise in func.tags or func in FILLING) and not is_written_here:
        wrong = [each for each in own if each.dim()]
    if wrong:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! ({func})"
        )


def _follow(tensor: ElsewhereTensor) -> None:
    """Gives a tensor the shape and memory that a call such as `set_` gave to its CPU half."""
    here = tensor.here
    is_same = (
        tensor.shape == here.shape
        and tensor.stride() == here.stride()
        and tensor.storage_offset() == here.storage_offset()
        and tensor.untyped_storage().data_ptr() == here.untyped_storage().data_ptr()
    )
    if not is_same:
        tensor.data = ElsewhereTensor(here)


def _divide(x: Tensor, divisor: Any) -> Tensor:
    """x times the reciprocal of a number, as CUDA does; a CPU tensor without axes is a number too."""
    dtype = torch.result_type(x, divisor)
    if dtype.is_complex:
        return torch.div(x, divisor)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    wide = torch.promote_types(dtype, torch.float32)
    inverse = torch.as_tensor(divisor, dtype=torch.float64).reciprocal().to(wide)
    return (x.to(wide) * inverse).to(dtype)


def _divide_in_place(x: Tensor, divisor: Any) -> Tensor:
    return x.copy_(_divide(x, divisor))


def _from_the_end(reduce: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A sum over some axes, or all, taken from their last element on."""

    def reduced(x: Tensor, axes: list[int] | None = None, *rest: Any, **kwargs: Any) -> Tensor:
        given = () if axes is None else (axes,)
        return reduce(x.flip(axes or tuple(range(x.dim()))), *given, *rest, **kwargs)

    return reduced


def _mm(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left.flip(1), right.flip(0))


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    return torch.bmm(left.flip(2), right.flip(1))


OWN_WAYS: dict[Any, Callable[..., Tensor]] = {
    aten.div.Tensor: _divide,
    aten.div_.Tensor: _divide_in_place,
    aten.sum.default: _from_the_end(aten.sum.default),
    aten.sum.dim_IntList: _from_the_end(aten.sum.dim_IntList),
    aten.mean.dim: _from_the_end(aten.mean.dim),
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
}
"""What a device computes otherwise than a CPU, and may."""
DIVISIONS = (aten.div.Tensor, aten.div_.Tensor)
