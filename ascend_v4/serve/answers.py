"""The engine's events on the asyncio side: merged, cancelled when the client is gone, written as SSE."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeAlias

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ascend_v4.engine.engine import Engine
from ascend_v4.engine.requests import Event, EventSink, FinishEvent, GenerationRequest, TokenEvent

IndexedEvent: TypeAlias = tuple[int, Event]

DONE_LINE = "data: [DONE]\n\n"


class Answers:
    """The running requests of one HTTP call. Belongs to the event loop it was made on."""

    def __init__(self, engine: Engine, requests: Sequence[GenerationRequest]) -> None:
        """Submits them all or none. Raises what `Engine.submit` raises."""
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[IndexedEvent] = asyncio.Queue()
        self._ids: list[int] = []
        try:
            for index, request in enumerate(requests):
                self._ids.append(engine.submit(request, self._sink(index)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Stop whatever still runs. Safe at any time."""
        for request_id in self._ids:
            self._engine.cancel(request_id)

    async def events(self) -> AsyncIterator[IndexedEvent]:
        """Events of all requests in order of arrival, until each has had its last."""
        num_running = len(self._ids)
        while num_running:
            index, event = await self._events.get()
            num_running -= not isinstance(event, TokenEvent)
            yield index, event

    def _sink(self, index: int) -> EventSink:
        def put(event: Event) -> None:
            # The loop is closed when the server has ended before the engine: nobody is left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return put


async def collect(answers: Answers, request: Request) -> list[IndexedEvent] | None:
    """All events of a call that is not streamed; None when the client has gone, its requests cancelled."""

    async def gather() -> list[IndexedEvent]:
        return [event async for event in answers.events()]

    gathering = asyncio.create_task(gather())
    watching = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({gathering, watching}, return_when=asyncio.FIRST_COMPLETED)
        return await gathering if gathering.done() else None
    finally:
        gathering.cancel()
        watching.cancel()
        answers.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; `on_close` runs however the stream ends, also when it never began."""

    def __init__(
        self, content: AsyncIterator[str], *, headers: dict[str, str], on_close: Callable[[], None]
    ) -> None:
        # Proxies that buffer would turn a stream into one late answer.
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers={**unbuffered, **headers}, media_type="text/event-stream")
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


def event_line(payload: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(',', ':'))}\n\n"


def usage_of(ends: Sequence[FinishEvent], *, reports_reasoning: bool = False) -> dict[str, Any]:
    """Token counts of a call in OpenAI's form."""
    num_prompt_tokens = sum(end.num_prompt_tokens for end in ends)
    num_completion_tokens = sum(end.num_completion_tokens for end in ends)
    usage: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }
    if reports_reasoning:
        num_reasoning_tokens = sum(end.num_reasoning_tokens for end in ends)
        usage["completion_tokens_details"] = {"reasoning_tokens": num_reasoning_tokens}
    return usage
