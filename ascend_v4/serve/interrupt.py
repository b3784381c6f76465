"""SIGINT and SIGTERM end the server with exit status 0, at whatever moment they come.

Light to import, so that the handlers stand before the heavy imports begin.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Protocol

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stoppable(Protocol):
    """A server that ends soon after `should_exit` is set."""

    should_exit: bool


class Interrupt:
    """Handlers for both signals, while the `with` block lasts. Main thread only.

    Until there is a server a signal raises KeyboardInterrupt. From then on it stops the server, which handles
    signals itself while it runs and raises those it has handled once more at its end.
    """

    def __init__(self) -> None:
        self._server: Stoppable | None = None
        self._former = {number: signal.getsignal(number) for number in SIGNALS}

    def hand_over(self, server: Stoppable) -> None:
        """Stop this server from now on."""
        self._server = server

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self._server is None:
            raise KeyboardInterrupt
        self._server.should_exit = True
