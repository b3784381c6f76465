"""What goes into the engine and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from ascend_v4.engine.text import OutputText, TextDelta
from ascend_v4.errors import AscendV4Error, RequestError

MAX_TEMPERATURE = 2.0
MAX_TOP_LOGPROBS = 20


class QueueFullError(RequestError):
    """Too many requests wait; the same request may succeed later."""


class EngineStoppedError(RequestError):
    """The engine takes no more requests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How the next token is chosen from the logits."""

    temperature: float = 1.0
    """0 takes the most probable token, the lowest id among equals."""
    top_p: float = 1.0
    """Sample among the most probable tokens that together reach this share; 0 leaves the first only."""
    seed: int = 0
    """Each request has its own stream of random numbers, so its answer does not depend on the batch."""
    num_top_logprobs: int | None = None
    """Most probable tokens reported with each token; 0 reports the chosen one only, None nothing."""

    def __post_init__(self) -> None:
        _require_range("temperature", self.temperature, high=MAX_TEMPERATURE)
        _require_range("top_p", self.top_p, high=1.0)
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise RequestError("seed does not fit into 64 bits, signed. Use a smaller one.", field="seed")
        if self.num_top_logprobs is not None:
            _require_range("top_logprobs", self.num_top_logprobs, high=MAX_TOP_LOGPROBS)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt to be continued."""

    prompt_ids: Sequence[int]
    max_tokens: int
    output: OutputText
    """Turns this request's tokens into text; used by this request only."""
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ignore_eos: bool = False


class FinishReason(Enum):
    """Why an answer ended. The value is OpenAI's word."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A chosen token. The logarithms are of the model's own distribution, before temperature and top_p."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Token id and logarithm, the most probable first."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token more. Its text may come with a later token, or never when it belongs to a stop string."""

    deltas: tuple[TextDelta, ...]
    token: SampledToken


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishEvent:
    """The end of an answer, with the text that was still held back."""

    deltas: tuple[TextDelta, ...]
    reason: FinishReason
    ended_by_eos: bool
    num_prompt_tokens: int
    num_completion_tokens: int
    """Tokens the model gave, its end token among them."""
    num_reasoning_tokens: int
    prefill_s: float
    """From admission to the first token."""
    decode_s: float
    """From the first token to the last."""


@dataclass(frozen=True, slots=True)
class FailEvent:
    """The end of a request without an answer. The error's message may be shown to anybody."""

    error: AscendV4Error


Event: TypeAlias = TokenEvent | FinishEvent | FailEvent
EventSink: TypeAlias = Callable[[Event], None]


def check_request(request: GenerationRequest, *, vocab_size: int, max_sequence_tokens: int) -> None:
    """Raises RequestError for a prompt that is empty, too long or outside the vocabulary."""
    num_prompt_tokens = len(request.prompt_ids)
    if num_prompt_tokens == 0:
        raise RequestError("the prompt has no tokens. Give it at least one.", field="prompt")
    if request.max_tokens < 1:
        raise RequestError(f"max_tokens is {request.max_tokens}; it must be at least 1.", field="max_tokens")
    if num_prompt_tokens >= max_sequence_tokens:
        raise RequestError(
            f"the prompt has {num_prompt_tokens} tokens; this model's context holds {max_sequence_tokens}, "
            "answer included. Shorten the prompt.",
            field="prompt",
        )
    if num_prompt_tokens + request.max_tokens > max_sequence_tokens:
        raise RequestError(
            f"this model's context holds {max_sequence_tokens} tokens; the prompt has {num_prompt_tokens} "
            f"and max_tokens asks for {request.max_tokens} more. "
            f"Ask for at most {max_sequence_tokens - num_prompt_tokens}.",
            field="max_tokens",
        )
    outside = next((token for token in request.prompt_ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise RequestError(
            f"the prompt holds token id {outside}; the vocabulary is [0, {vocab_size}).", field="prompt"
        )


def _require_range(name: str, value: float, *, high: float) -> None:
    if not math.isfinite(value) or not 0 <= value <= high:
        raise RequestError(f"{name} is {value:g}; it must be in [0, {high:g}].", field=name)
