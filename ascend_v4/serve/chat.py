"""/v1/chat/completions: messages through the chat protocol, reasoning and tool calls apart from content."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ascend_v4.chat import encode_messages
from ascend_v4.engine.requests import (
    FailEvent,
    FinishEvent,
    GenerationRequest,
    SampledToken,
    SamplingParams,
    TokenEvent,
)
from ascend_v4.engine.text import Channel
from ascend_v4.errors import RequestError
from ascend_v4.serve.answers import DONE_LINE, Answers, IndexedEvent, event_line, usage_of
from ascend_v4.serve.calls import ChatCall
from ascend_v4.serve.errors import HttpError, error_body, failure_status
from ascend_v4.serve.logprobs import chat_logprob
from ascend_v4.serve.service import Service
from ascend_v4.serve.tools import ToolGate

DEFAULT_MAX_TOKENS = 4096
"""Longest answer to a call that does not say; cache space for it is promised before the call runs."""


def chat_request(service: Service, call: ChatCall, *, max_sequence_tokens: int) -> GenerationRequest:
    """The engine request of a chat call. Slow for long prompts: run it beside the event loop.

    Raises ChatFormatError, RequestError, TokenizerError.
    """
    common = call.common
    prompt = encode_messages(
        _with_offers(call),
        thinking_mode="thinking" if call.thinking else "chat",
        reasoning_effort=call.effort.value,
    )
    prompt_ids = service.vocabulary.encode_prompt(prompt)
    room_tokens = max(1, max_sequence_tokens - len(prompt_ids))
    sampling = SamplingParams(
        temperature=common.temperature,
        top_p=common.top_p,
        seed=service.draw_seed() if common.seed is None else common.seed,
        num_top_logprobs=call.num_top_logprobs,
    )
    return GenerationRequest(
        prompt_ids=prompt_ids,
        max_tokens=min(DEFAULT_MAX_TOKENS, room_tokens) if common.max_tokens is None else common.max_tokens,
        output=service.vocabulary.chat_output(
            thinking=call.thinking, keeps_tool_calls=bool(call.tools), stops=common.stops
        ),
        sampling=sampling,
        ignore_eos=common.ignores_eos,
    )


def _with_offers(call: ChatCall) -> list[Any]:
    """The messages as the encoder wants them: tools and schema on the system message, text parts only."""
    messages = [_prepared(message, index) for index, message in enumerate(call.messages)]
    offers: dict[str, Any] = {}
    if call.tools:
        offers["tools"] = call.tools
    if call.schema is not None:
        offers["response_format"] = call.schema
    if not offers:
        return messages
    first = messages[0]
    if isinstance(first, Mapping) and first.get("role") == "system":
        return [{**first, **offers}, *messages[1:]]
    return [{"role": "system", "content": "", **offers}, *messages]


def _prepared(message: object, index: int) -> object:
    if not isinstance(message, Mapping):
        return message
    content = message.get("content")
    if isinstance(content, list):
        for part_index, part in enumerate(content):
            if isinstance(part, Mapping) and part.get("type") not in (None, "text"):
                where = f"messages[{index}].content[{part_index}]"
                raise RequestError(f"{where} is not text; this model reads text only.", field="messages")
    if message.get("reasoning_content") is None and isinstance(message.get("reasoning"), str):
        return {**message, "reasoning_content": message["reasoning"]}
    return message


class _Answer:
    """Turns the events of one answer into OpenAI's deltas."""

    def __init__(self, call: ChatCall) -> None:
        self._gate = ToolGate() if call.tools else None
        self.finish_reason: str | None = None
        self.end: FinishEvent | None = None

    def deltas(self, event: TokenEvent | FinishEvent) -> list[dict[str, Any]]:
        """What the event adds, in order; each delta has one kind of content."""
        found: list[dict[str, Any]] = []
        for delta in event.deltas:
            if delta.channel is Channel.REASONING:
                # Clients disagree on the name; both are sent.
                found.append({"reasoning_content": delta.text, "reasoning": delta.text})
                continue
            text = delta.text if self._gate is None else self._gate.push(delta.text)
            if text:
                found.append({"content": text})
        if isinstance(event, FinishEvent):
            found += self._end(event)
        return found

    def _end(self, event: FinishEvent) -> list[dict[str, Any]]:
        self.end, self.finish_reason = event, event.reason.value
        if self._gate is None:
            return []
        text, calls = self._gate.end(is_complete=event.ended_by_eos)
        found: list[dict[str, Any]] = [{"content": text}] if text else []
        if calls:
            self.finish_reason = "tool_calls"
            found.append({"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]})
        return found


class ChatReply:
    """Turns the events of one call into OpenAI's objects."""

    def __init__(self, service: Service, call: ChatCall, *, model_name: str) -> None:
        self._codec = service.codec
        self._call = call
        self._answer = _Answer(call)
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_name,
        }

    def whole(self, events: list[IndexedEvent]) -> dict[str, Any]:
        """The answer that is not streamed. Raises HttpError when the request failed."""
        deltas: list[dict[str, Any]] = []
        tokens: list[SampledToken] = []
        for _, event in events:
            if isinstance(event, FailEvent):
                raise HttpError(failure_status(event.error), str(event.error))
            deltas += self._answer.deltas(event)
            if isinstance(event, TokenEvent):
                tokens.append(event.token)
        assert self._answer.end is not None, "an answer ended without its last event"
        choice = {
            "index": 0,
            "message": self._message(deltas),
            "logprobs": self._logprobs(tokens),
            "finish_reason": self._answer.finish_reason,
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(self._answer.end),
        }

    async def stream(self, answers: Answers) -> AsyncIterator[str]:
        """The lines of the streamed answer."""
        yield self._line({"role": "assistant", "content": ""})
        async for _, event in answers.events():
            if isinstance(event, FailEvent):
                yield event_line(error_body(failure_status(event.error), event.error))
                yield DONE_LINE
                return
            tokens = [event.token] if isinstance(event, TokenEvent) else []
            deltas = self._answer.deltas(event)
            if tokens and self._call.num_top_logprobs is not None:
                deltas = deltas or [{"content": ""}]
            for index, delta in enumerate(deltas):
                # The logprobs of a token go with the first text that came with it.
                yield self._line(delta, tokens=[] if index else tokens)
        yield self._line({}, finish_reason=self._answer.finish_reason)
        if self._call.common.includes_usage and self._answer.end is not None:
            usage = {"usage": self._usage(self._answer.end)}
            yield event_line({**self._head, "object": "chat.completion.chunk", "choices": [], **usage})
        yield DONE_LINE

    def _message(self, deltas: list[dict[str, Any]]) -> dict[str, Any]:
        content = "".join(delta.get("content", "") for delta in deltas)
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self._call.thinking:
            reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
            message |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if calls:
            # OpenAI's index tells streamed calls apart and has no place in a whole message.
            without_index = [{name: call[name] for name in ("id", "type", "function")} for call in calls]
            message |= {"content": content or None, "tool_calls": without_index}
        return message

    def _line(
        self,
        delta: dict[str, Any],
        *,
        tokens: list[SampledToken] | None = None,
        finish_reason: str | None = None,
    ) -> str:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._call.common.includes_usage else {}
        return event_line({**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    def _logprobs(self, tokens: list[SampledToken]) -> dict[str, Any] | None:
        if self._call.num_top_logprobs is None:
            return None
        return {"content": [chat_logprob(token, self._codec) for token in tokens], "refusal": None}

    def _usage(self, end: FinishEvent) -> dict[str, Any]:
        return usage_of([end], reports_reasoning=self._call.thinking)
