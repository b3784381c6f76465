"""What the rest of the project asks of a device: memory, streams, events, graphs, and the name of its
collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

WARM_UPS = 2
"""Runs before a capture: the first may still compile kernels or start libraries, which no capture allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one device as its runtime counts them."""

    total_bytes: int
    free_bytes: int
    allocated_bytes: int
    """In tensors of this process; 0 where nobody counts."""
    reserved_bytes: int
    """Held by this process's allocator, the allocated ones included."""


class Graph(Protocol):
    """A recorded run over fixed memory."""

    @property
    def output(self) -> Tensor:
        """What the run returned; each replay writes it anew."""

    def replay(self) -> None:
        """Does again what was recorded, on what now stands in the same memory."""


class Event(Protocol):
    """A moment on a stream."""

    def record(self) -> None:
        """Now, on the current stream."""

    def synchronize(self) -> None:
        """Waits until it has passed."""

    def elapsed_time(self, later: Any) -> float:  # noqa: ANN401 -- an event of the same device
        """Milliseconds to a later event; both were made with timing and have passed."""


class Device(Protocol):
    """One device of this machine."""

    @property
    def name(self) -> str:
        """As torch spells it: cpu, cuda:0, npu:0."""

    @property
    def collective_backend(self) -> str:
        """What torch.distributed calls its collectives: gloo, nccl, hccl."""

    @property
    def captures_graphs(self) -> bool:
        """Whether `capture` records; elsewhere there is nothing to gain."""

    def memory(self) -> Memory:
        """Figures as of now."""

    def synchronize(self) -> None:
        """Waits for everything that was launched."""

    def new_stream(self) -> AbstractContextManager[Any]:
        """A stream of its own: work launched inside the context goes there, after what was launched before
        it.
        """

    def new_event(self, *, timed: bool = False) -> Event:
        """An event, not yet recorded."""

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Runs a function a few times and records it. It must touch the same memory on every run and ask the
        host nothing.
        """


class Accelerator:
    """A device whose torch module is built like torch.cuda: torch.cuda itself, and torch.npu."""

    captures_graphs = True

    def __init__(
        self,
        runtime: Any,  # noqa: ANN401 -- a module
        *,
        kind: str,
        index: int,
        collective_backend: str,
        graph_class: str,
    ) -> None:
        self._runtime = runtime
        self._index = index
        self._graph_class = graph_class
        self._pool: object = None
        self.name = f"{kind}:{index}"
        self.collective_backend = collective_backend

    def memory(self) -> Memory:
        """Figures as of now."""
        free, total = self._runtime.mem_get_info(self._index)
        return Memory(
            total_bytes=total,
            free_bytes=free,
            allocated_bytes=self._runtime.memory_allocated(self._index),
            reserved_bytes=self._runtime.memory_reserved(self._index),
        )

    def synchronize(self) -> None:
        """Waits for everything that was launched."""
        self._runtime.synchronize(self._index)

    def new_stream(self) -> AbstractContextManager[Any]:
        """A stream of its own, behind the current one."""
        stream = self._runtime.Stream()
        stream.wait_stream(self._runtime.current_stream())
        context: AbstractContextManager[Any] = self._runtime.stream(stream)
        return context

    def new_event(self, *, timed: bool = False) -> Event:
        """An event, not yet recorded."""
        event: Event = self._runtime.Event(enable_timing=timed)
        return event

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Records one run after a few that warm up. All graphs of a device share one memory pool."""
        with self.new_stream():
            for _ in range(WARM_UPS):
                run()
        self.synchronize()
        graph = getattr(self._runtime, self._graph_class)()
        if self._pool is None:
            self._pool = self._runtime.graph_pool_handle()
        with self._runtime.graph(graph, pool=self._pool):
            output = run()
        return RuntimeGraph(graph, output)


@dataclass(frozen=True, slots=True)
class RuntimeGraph:
    """A graph that the device's runtime holds."""

    graph: Any
    output: Tensor

    def replay(self) -> None:
        """One launch for all that was recorded."""
        self.graph.replay()
