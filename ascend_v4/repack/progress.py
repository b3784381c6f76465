"""How far a repack is: bytes, GB/s and time left, on a terminal only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

REPORTED_BYTES = 32 << 20
"""Bytes gathered before the bar hears of them: a slab takes less time than drawing."""


@contextmanager
def progress_bar(total_bytes: int, *, title: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal, nothing elsewhere. Threads may call what it gives."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total_bytes)
        gathered = _Gathered(lambda piece_bytes: progress.advance(task, piece_bytes))
        yield gathered.add


class LateBar:
    """A progress bar whose total is known only once the work has begun; `stack` ends it."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._add: Callable[[int], None] | None = None

    def begin(self, total_bytes: int, *, title: str) -> None:
        """Draw it."""
        self._add = self._stack.enter_context(progress_bar(total_bytes, title=title))

    def add(self, piece_bytes: int) -> None:
        """Bytes done. Threads may call it."""
        assert self._add is not None, f"{piece_bytes} bytes came before the plan"
        self._add(piece_bytes)


class _Gathered:
    """Adds up pieces from several threads and passes them on in larger ones."""

    def __init__(self, pass_on: Callable[[int], None]) -> None:
        self._pass_on = pass_on
        self._lock = threading.Lock()
        self._waiting_bytes = 0

    def add(self, piece_bytes: int) -> None:
        with self._lock:
            self._waiting_bytes += piece_bytes
            ready = self._waiting_bytes if self._waiting_bytes >= REPORTED_BYTES else 0
            self._waiting_bytes -= ready
        if ready:
            self._pass_on(ready)
