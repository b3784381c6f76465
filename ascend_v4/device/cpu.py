"""The CPU as a device: everything runs at once and in order, so streams and graphs have nothing to do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ascend_v4.device.base import Event, Graph, Memory

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class HostEvent:
    """A moment of the host's clock."""

    seconds: float = field(default=0.0)

    def record(self) -> None:
        """Now."""
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        """It has passed."""

    def elapsed_time(self, later: Any) -> float:  # noqa: ANN401 -- a HostEvent
        """Milliseconds to a later event."""
        return float(later.seconds - self.seconds) * 1e3


class EagerGraph:
    """Nothing recorded: a replay runs the function."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self.output = run()

    def replay(self) -> None:
        """Runs the function; the output is a tensor of its own."""
        self.output = self._run()


class CpuDevice:
    """This machine's processor."""

    name = "cpu"
    collective_backend = "gloo"
    captures_graphs = False

    def memory(self) -> Memory:
        """The machine's memory; what the system could free counts as free."""
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        return Memory(
            total_bytes=os.sysconf("SC_PHYS_PAGES") * page_bytes,
            free_bytes=os.sysconf("SC_AVPHYS_PAGES") * page_bytes,
            allocated_bytes=0,
            reserved_bytes=0,
        )

    def synchronize(self) -> None:
        """Nothing is ever left to wait for."""

    def new_stream(self) -> AbstractContextManager[Any]:
        """The one there is."""
        return nullcontext()

    def new_event(self, *, timed: bool = False) -> Event:
        """A moment of the host's clock."""
        return HostEvent()

    def capture(self, run: Callable[[], Tensor]) -> Graph:
        """Records nothing."""
        return EagerGraph(run)
