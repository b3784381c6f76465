"""/v1/completions: text or token ids go on as they stand, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from ascend_v4.engine.requests import (
    FailEvent,
    FinishEvent,
    GenerationRequest,
    SampledToken,
    SamplingParams,
    TokenEvent,
)
from ascend_v4.serve.answers import DONE_LINE, Answers, IndexedEvent, event_line, usage_of
from ascend_v4.serve.calls import CompletionCall
from ascend_v4.serve.errors import HttpError, error_body, failure_status
from ascend_v4.serve.logprobs import CompletionLogprobs
from ascend_v4.serve.service import Service

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own default for this endpoint."""


def completion_requests(service: Service, call: CompletionCall) -> list[GenerationRequest]:
    """One engine request per prompt. Slow for long prompts: run it beside the event loop."""
    common = call.common
    seed = service.draw_seed() if common.seed is None else common.seed
    sampling = SamplingParams(
        temperature=common.temperature,
        top_p=common.top_p,
        seed=seed,
        num_top_logprobs=call.num_top_logprobs,
    )
    return [
        GenerationRequest(
            prompt_ids=service.codec.encode(prompt) if isinstance(prompt, str) else prompt,
            max_tokens=DEFAULT_MAX_TOKENS if common.max_tokens is None else common.max_tokens,
            output=service.vocabulary.raw_output(eos_token_ids=service.eos_token_ids, stops=common.stops),
            sampling=sampling,
            ignore_eos=common.ignores_eos,
        )
        for prompt in call.prompts
    ]


class CompletionReply:
    """Turns the events of one call into OpenAI's objects."""

    def __init__(self, service: Service, call: CompletionCall, *, model_name: str) -> None:
        self._call = call
        self._head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }
        self._logprobs = [CompletionLogprobs(service.codec) for _ in call.prompts]

    def whole(self, events: list[IndexedEvent]) -> dict[str, Any]:
        """The answer that is not streamed. Raises HttpError when one of the requests failed."""
        parts = [_Part() for _ in self._call.prompts]
        for index, event in events:
            if isinstance(event, FailEvent):
                raise HttpError(failure_status(event.error), str(event.error))
            parts[index].add(event)
        choices = [
            self._choice(index, "".join(part.texts), part.tokens, part.finish_reason)
            for index, part in enumerate(parts)
        ]
        return {**self._head, "choices": choices, "usage": usage_of([part.end for part in parts if part.end])}

    async def stream(self, answers: Answers) -> AsyncIterator[str]:
        """The lines of the streamed answer."""
        ends: list[FinishEvent] = []
        async for index, event in answers.events():
            if isinstance(event, FailEvent):
                yield event_line(error_body(failure_status(event.error), event.error))
                yield DONE_LINE
                return
            part = _Part()
            part.add(event)
            if isinstance(event, FinishEvent):
                ends.append(event)
            yield self._line([self._choice(index, "".join(part.texts), part.tokens, part.finish_reason)])
        if self._call.common.includes_usage:
            yield event_line({**self._head, "choices": [], "usage": usage_of(ends)})
        yield DONE_LINE

    def _line(self, choices: list[dict[str, Any]]) -> str:
        usage = {"usage": None} if self._call.common.includes_usage else {}
        return event_line({**self._head, "choices": choices, **usage})

    def _choice(
        self, index: int, text: str, tokens: list[SampledToken], finish_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._call.num_top_logprobs is not None:
            logprobs = self._logprobs[index].lists(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


@dataclass(kw_only=True, slots=True)
class _Part:
    """What some events of one prompt add up to."""

    texts: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    end: FinishEvent | None = None

    @property
    def finish_reason(self) -> str | None:
        return None if self.end is None else self.end.reason.value

    def add(self, event: TokenEvent | FinishEvent) -> None:
        self.texts += [delta.text for delta in event.deltas]
        if isinstance(event, TokenEvent):
            self.tokens.append(event.token)
        else:
            self.end = event
