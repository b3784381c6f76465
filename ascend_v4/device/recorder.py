"""A device graph in pure Python: every torch operator of a run is noted with its tensors, and a replay calls
the same operators on the same memory.

It gains no time. It proves, on a machine without a card, that a step can be captured: what would make the
host wait, or what depends on the host's values, is refused while recording.
"""
# ruff: noqa: ANN401 -- torch's hooks hand over whatever an operator takes

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ascend_v4.errors import DeviceError

HOST_READS = frozenset(
    {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "cpu"}
)
"""Methods of a tensor by which the host waits for the device."""
DATA_SHAPED = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::is_nonzero",
        "aten::equal",
        "aten::allclose",
        "aten::nonzero",
        "aten::nonzero_numpy",
        "aten::argwhere",
        "aten::masked_select",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
        "aten::bincount",
        "aten::repeat_interleave",
    }
)
"""Operators whose result's shape, or whose host value, depends on what the tensors hold."""
DATA_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"})
FROM_HOST = frozenset({"aten::lift_fresh", "aten::lift_fresh_copy", "aten::lift"})
"""What torch.tensor does with host values: a copy that no graph can hold."""


@dataclass(frozen=True, slots=True)
class Call:
    """One operator with the tensors that it had."""

    function: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[tuple[int, Tensor], ...]
    """What a replay writes: results that share no argument's memory, each with its place among all."""

    def replay(self) -> None:
        """Calls the operator and puts its results where they were."""
        fresh = _tensors(self.function(*self.args, **self.kwargs))
        for index, kept in self.results:
            kept.copy_(fresh[index])


@dataclass
class RecordedGraph:
    """What a run called, in order."""

    calls: list[Call] = field(default_factory=list)
    result: Tensor | None = None

    @property
    def output(self) -> Tensor:
        """What the run returned; each replay writes it anew."""
        assert self.result is not None, "nothing was recorded"
        return self.result

    def replay(self) -> None:
        """Calls everything again."""
        for call in self.calls:
            call.replay()


def record(run: Callable[[], Tensor]) -> RecordedGraph:
    """Runs a function and notes what it calls.

    Raises DeviceError, naming the operator, where a graph could not be captured on a device.
    """
    graph = RecordedGraph()
    with _HostReads(), _Recorder(graph):
        graph.result = run()
    return graph


class _HostReads(TorchFunctionMode):
    """Refuses what reads a tensor's content without going through an operator."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST_READS and args and isinstance(args[0], Tensor):
            raise DeviceError(f"Tensor.{name} makes the host wait; a step with it cannot be captured.")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = graph

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        kwargs = kwargs or {}
        _require_capturable(func, args, kwargs)
        # a simulated kernel may read what it likes: on a device it is one launch
        with torch._C.DisableTorchFunction():
            out = func(*args, **kwargs)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        outputs = _tensors(out)
        results = tuple(
            (index, tensor) for index, tensor in enumerate(outputs) if _memory(tensor) not in given
        )
        # a view needs no replay; a vendor's operator may write without its schema saying so
        is_view = outputs and not results and func.namespace == "aten" and not func._schema.is_mutable
        if not is_view:
            self._graph.calls.append(Call(func, tuple(args), dict(kwargs), results))
        return out


def _require_capturable(func: Any, args: Any, kwargs: Any) -> None:
    name = func._schema.name
    if name in FROM_HOST:
        raise DeviceError(
            "torch.tensor copies host values while a step is captured; make the tensor in the plan, or by "
            "torch.full."
        )
    if name in INDEXING:
        indices = args[1] if len(args) > 1 else kwargs["indices"]
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            raise DeviceError(f"{name} by a mask has a size that depends on it; use torch.where.")
        return
    if name == "aten::repeat_interleave" and kwargs.get("output_size") is not None:
        return
    if name in DATA_SHAPED or any(tag in func.tags for tag in DATA_TAGS):
        raise DeviceError(f"{name} depends on what a tensor holds; a step with it cannot be captured.")


def _tensors(values: Any) -> list[Tensor]:
    leaves: Iterable[Any] = tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
