"""A conversation through the engine: tools offered, one called, its result in the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ascend_v4.chat import encode_messages
from ascend_v4.checkpoint.tokenizer import load_tokenizer
from ascend_v4.config import ModelConfig
from ascend_v4.engine.chat_text import ChatVocabulary
from ascend_v4.engine.engine import Engine
from ascend_v4.engine.requests import (
    FailEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from ascend_v4.engine.runner import ModelRunner
from ascend_v4.engine.scheduler import SchedulerLimits
from ascend_v4.errors import TokenizerError
from ascend_v4.smoke.report import Outcome, SkippedError

NUM_ANSWER_TOKENS = 12
STOP_TIMEOUT_S = 60.0
MAX_CHAT_TOKENS = 2048
"""Prompt and answer in the longest tokenizer, one token per byte."""
TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "", "tools": [TOOL]},
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": '{"place": "Ulm"}'}, "id": "1"}
        ],
    },
    {"role": "tool", "content": "dry", "tool_call_id": "1"},
]


def chat_prompt(checkpoint: Path, config: ModelConfig) -> tuple[ChatVocabulary, list[int]]:
    """The conversation's token ids. Raises SkippedError where the checkpoint has no tokenizer for a chat."""
    try:
        vocabulary = ChatVocabulary.of(load_tokenizer(checkpoint, config=config))
        return vocabulary, vocabulary.encode_prompt(encode_messages(MESSAGES, thinking_mode="chat"))
    except TokenizerError as error:
        raise SkippedError(f"{checkpoint.name} has no tokenizer for a chat: {error}") from None


def check_chat(runner: ModelRunner, vocabulary: ChatVocabulary, prompt_ids: list[int]) -> Outcome:
    """Asks twice without chance; the streams must be whole, of finite logarithms and the same."""
    limits = SchedulerLimits(max_num_seqs=1)
    engine = Engine(runner, eos_token_ids=runner.loaded.config.eos_token_ids, limits=limits)
    engine.start()
    try:
        first, second = (_ask(engine, vocabulary, prompt_ids) for _ in range(2))
    finally:
        engine.stop()
        engine.join(STOP_TIMEOUT_S)
    differ = sum(one != other for one, other in zip(first, second, strict=False)) + abs(
        len(first) - len(second)
    )
    return Outcome(
        compared=f"two answers of {len(first)} tokens to a prompt of {len(prompt_ids)}, a tool call in it",
        measure="tokens that differ",
        difference=float(differ),
        bound=0.0,
    )


def _ask(engine: Engine, vocabulary: ChatVocabulary, prompt_ids: list[int]) -> list[tuple[int, float]]:
    """Token ids with their logarithms. Raises AssertionError for a stream that is not well formed."""
    output = vocabulary.chat_output(thinking=False, keeps_tool_calls=True, stops=())
    request = GenerationRequest(
        prompt_ids=prompt_ids,
        max_tokens=NUM_ANSWER_TOKENS,
        output=output,
        sampling=SamplingParams(temperature=0.0, num_top_logprobs=0),
    )
    tokens: list[tuple[int, float]] = []
    end: FinishEvent | None = None
    for event in engine.generate(request):
        if isinstance(event, FailEvent):
            raise event.error
        if isinstance(event, FinishEvent):
            end = event
            continue
        assert isinstance(event, TokenEvent), type(event).__name__
        assert end is None, "a token came after the end"
        token, logprob = event.token, event.token.logprob
        assert logprob is not None, f"token {token.token_id} has no logprob"
        assert math.isfinite(logprob), f"the logprob of token {token.token_id} is {logprob}"
        tokens.append((token.token_id, logprob))
    assert end is not None, "the stream has no end"
    stopped = end.reason is FinishReason.STOP
    assert stopped or end.num_completion_tokens == NUM_ANSWER_TOKENS, (
        f"{end.num_completion_tokens} of {NUM_ANSWER_TOKENS} tokens came, and the end is a {end.reason.value}"
    )
    assert end.num_prompt_tokens == len(prompt_ids), f"{end.num_prompt_tokens} prompt tokens were counted"
    return tokens
