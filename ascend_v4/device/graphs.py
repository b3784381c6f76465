"""Recorded steps: one step's tensors copied over another's, and a graph for each batch size.

A recorded step reads and writes fixed memory. So whatever differs from step to step must be a tensor, and
`Overwriter` puts a new step's tensors where the recorded one looks for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Generic, TypeVar

from torch import Tensor

from ascend_v4.device.base import Device, Graph

log = logging.getLogger(__name__)

S = TypeVar("S")

HostFields = Mapping[type, frozenset[str]]
"""Fields by class that only planners read, before a step is run: what they hold may differ."""
NO_HOST_FIELDS: HostFields = MappingProxyType({})


class StepChangedError(ValueError):
    """A step differs from the recorded one in something that is not a tensor's content."""


class Overwriter:
    """Puts a new step's tensors in place of a recorded one's."""

    def __init__(self, host_fields: HostFields) -> None:
        self._host_fields = host_fields

    def put(self, recorded: object, fresh: object, *, path: str = "step") -> None:
        """Copies every tensor of `fresh` over its counterpart in `recorded`, through dataclasses, dicts,
        tuples and lists, properties that are computed on first use included.

        Raises StepChangedError, having copied perhaps some, where shapes, types or plain values differ.
        """
        if recorded is fresh:
            return
        if type(recorded) is not type(fresh):
            raise StepChangedError(f"{path} is {type(fresh).__name__}, recorded {type(recorded).__name__}")
        if isinstance(recorded, Tensor):
            assert isinstance(fresh, Tensor)
            _copy(recorded, fresh, path)
            return
        old, new = self._parts(recorded), self._parts(fresh, like=recorded)
        if old is None or new is None:
            if recorded != fresh:
                raise StepChangedError(f"{path} is {fresh!r}, recorded {recorded!r}")
            return
        if old.keys() != new.keys():
            raise StepChangedError(f"{path} has parts {list(new)}, recorded {list(old)}")
        for name, value in old.items():
            self.put(value, new[name], path=f"{path}.{name}")

    def _parts(self, value: object, *, like: object = None) -> Mapping[object, object] | None:
        """What a value consists of, by name; None for one without parts. `like` decides which of an object's
        computed properties are wanted.
        """
        if isinstance(value, Mapping):
            return value
        if isinstance(value, (tuple, list)):
            return dict(enumerate(value))
        if not is_dataclass(value):
            return None
        names = [field.name for field in fields(value)]
        # what a cached_property has computed stands beside the fields
        names += [name for name in getattr(like or value, "__dict__", ()) if name not in names]
        host_only = self._host_fields.get(type(value), frozenset())
        return {name: getattr(value, name) for name in names if name not in host_only}


def _copy(recorded: Tensor, fresh: Tensor, path: str) -> None:
    if (recorded.shape, recorded.dtype) != (fresh.shape, fresh.dtype):
        raise StepChangedError(
            f"{path} is {fresh.dtype} {tuple(fresh.shape)}, recorded {recorded.dtype} {tuple(recorded.shape)}"
        )
    if recorded.data_ptr() != fresh.data_ptr():
        recorded.copy_(fresh)


class StepGraphs(Generic[S]):
    """One graph per batch size. A step of another size is padded by its caller to the next one up."""

    def __init__(
        self,
        device: Device,
        *,
        sizes: Sequence[int],
        plan: Callable[[int], S],
        run: Callable[[S], Tensor],
        host_fields: HostFields = NO_HOST_FIELDS,
    ) -> None:
        self._overwriter = Overwriter(host_fields)
        self._device = device
        self.sizes = tuple(sorted(set(sizes)))
        self._plan, self._run = plan, run
        self._graphs: dict[int, tuple[S, Graph]] = {}
        self._warned: set[str] = set()

    def warm(self) -> None:
        """Records every size, largest first, so that the smaller ones fit into memory it left."""
        for size in reversed(self.sizes):
            if size not in self._graphs:
                step = self._plan(size)
                self._graphs[size] = (step, self._device.capture(lambda step=step: self._run(step)))  # type: ignore[misc]
        log.info("decoding steps are recorded for batches of %s", ", ".join(map(str, self.sizes)))

    def size_for(self, count: int) -> int | None:
        """The smallest recorded size that holds `count` sequences; None, said once per count, where none
        does.
        """
        for size in self.sizes:
            if size >= count:
                return size
        self._warn(
            f"{count}",
            f"a batch of {count} is larger than any that was recorded ({self.sizes[-1]}): it runs operator "
            "by operator, and slower",
        )
        return None

    def replay(self, size: int, fresh: S) -> Tensor | None:
        """The recorded run's output for a step of that size; None, said once, where the step cannot be put in
        place of the recorded one and has to run operator by operator. The next replay overwrites it.
        """
        step, graph = self._graphs[size]
        try:
            self._overwriter.put(step, fresh)
        except StepChangedError as error:
            self._warn(str(error), f"a step cannot be replayed: {error}. It runs operator by operator")
            return None
        graph.replay()
        return graph.output

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning(text)


def graph_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8 and so on, and `most`."""
    sizes = []
    size = 1
    while size < most:
        sizes.append(size)
        size *= 2
    return (*sizes, most)
