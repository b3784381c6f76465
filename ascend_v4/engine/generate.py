"""One answer without a server: from a checkpoint and a prompt to text, with the speeds measured."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascend_v4.chat import encode_messages
from ascend_v4.checkpoint.pack import require_finished
from ascend_v4.checkpoint.tokenizer import load_tokenizer
from ascend_v4.config import ModelConfig
from ascend_v4.device.target import TargetRequest
from ascend_v4.engine.chat_text import ChatVocabulary
from ascend_v4.engine.engine import Engine
from ascend_v4.engine.requests import (
    FailEvent,
    FinishEvent,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    check_request,
)
from ascend_v4.engine.runner import build_runner
from ascend_v4.engine.scheduler import SchedulerLimits
from ascend_v4.engine.text import Channel, TextDelta
from ascend_v4.errors import ChatFormatError

MAX_MESSAGES_BYTES = 32 << 20
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Everything `ascend-v4 generate` was told."""

    checkpoint: Path
    prompt: str | None
    """One user message; a messages file takes its place."""
    messages_file: Path | None
    is_raw: bool
    """Continue the prompt as it stands, without the chat template."""
    thinking: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    tokenizer: Path | None
    """Where the tokenizer is; None means in the checkpoint."""
    target: TargetRequest
    numerics: str
    quantize: str | None = None
    """Target the checkpoint is repacked to while it loads."""
    cache_dir: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedAnswer:
    """A finished answer and how fast it came."""

    content: str
    reasoning: str
    finish_reason: str
    num_prompt_tokens: int
    num_completion_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    """None for an answer of one token, which prefill gave."""

    def to_json(self) -> dict[str, Any]:
        """The answer as `generate --json` prints it."""
        return {
            "text": self.content,
            "reasoning": self.reasoning,
            "finish_reason": self.finish_reason,
            "usage": {
                "prompt_tokens": self.num_prompt_tokens,
                "completion_tokens": self.num_completion_tokens,
                "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            },
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }

    def describe_speed(self) -> str:
        """The speeds in one line."""
        speed = self.decode_tokens_per_s
        decode = (
            "no token" if speed is None else f"{self.num_completion_tokens - 1} tokens, {speed:.1f} tokens/s"
        )
        prefill = f"{self.num_prompt_tokens} tokens, {self.prefill_tokens_per_s:.1f} tokens/s"
        return f"prefill: {prefill}; decode: {decode}"


def generate(config: GenerateConfig, *, on_text: Callable[[TextDelta], None]) -> GeneratedAnswer:
    """Answer the prompt; `on_text` gets the text as it comes.

    Everything but the weights is checked before they are read. Raises AscendV4Error.
    """
    require_finished(config.checkpoint)
    model = ModelConfig.from_file(config.checkpoint)
    request = _make_request(config, model)
    num_tokens = len(request.prompt_ids) + request.max_tokens
    runner = build_runner(
        config.checkpoint,
        device=config.target,
        numerics=config.numerics,
        quantize=config.quantize,
        cache_dir=config.cache_dir,
        max_sequence_tokens=num_tokens,
        cache_tokens=num_tokens,
        max_sequences=1,
    )
    engine = Engine(runner, eos_token_ids=model.eos_token_ids, limits=SchedulerLimits(max_num_seqs=1))
    engine.start()
    try:
        return _collect(engine, request, on_text)
    finally:
        engine.stop()
        engine.join(STOP_TIMEOUT_S)


def read_messages(path: Path) -> list[Any]:
    """Messages of a file, its tools put onto the system message. Raises ChatFormatError naming the file."""
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_MESSAGES_BYTES:
            raise ChatFormatError(f"{path} is {num_bytes} bytes; at most {MAX_MESSAGES_BYTES} are read.")
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ChatFormatError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ChatFormatError(f"{path} is not JSON: {str(error)[:200]}.") from None
    tools = None
    if isinstance(parsed, dict):
        tools, parsed = parsed.get("tools"), parsed.get("messages")
    if not isinstance(parsed, list) or not parsed:
        raise ChatFormatError(
            f'{path} holds no messages. It must be a JSON list, or {{"messages": [...], "tools": [...]}}.'
        )
    if not tools:
        return parsed
    first = parsed[0]
    if isinstance(first, dict) and first.get("role") == "system":
        return [{**first, "tools": tools}, *parsed[1:]]
    return [{"role": "system", "content": "", "tools": tools}, *parsed]


def _make_request(config: GenerateConfig, model: ModelConfig) -> GenerationRequest:
    codec = load_tokenizer(config.tokenizer or config.checkpoint, config=model)
    vocabulary = ChatVocabulary.of(codec)
    if config.is_raw:
        assert config.prompt is not None, "a raw generation without a prompt"
        prompt_ids = codec.encode(config.prompt)
        output = vocabulary.raw_output(eos_token_ids=model.eos_token_ids, stops=())
    else:
        prompt_ids = vocabulary.encode_prompt(_render(config))
        output = vocabulary.chat_output(thinking=config.thinking, keeps_tool_calls=True, stops=())
    sampling = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        seed=secrets.randbits(63) if config.seed is None else config.seed,
    )
    request = GenerationRequest(
        prompt_ids=prompt_ids, max_tokens=config.max_new_tokens, output=output, sampling=sampling
    )
    check_request(request, vocab_size=model.vocab_size, max_sequence_tokens=model.max_position_embeddings)
    return request


def _render(config: GenerateConfig) -> str:
    if config.messages_file is not None:
        messages = read_messages(config.messages_file)
    else:
        messages = [{"role": "user", "content": config.prompt}]
    return encode_messages(messages, thinking_mode="thinking" if config.thinking else "chat")


def _collect(
    engine: Engine, request: GenerationRequest, on_text: Callable[[TextDelta], None]
) -> GeneratedAnswer:
    texts: dict[Channel, list[str]] = {channel: [] for channel in Channel}
    events = engine.generate(request)
    while True:
        event = next(events)
        if isinstance(event, FailEvent):
            raise event.error
        for delta in event.deltas:
            texts[delta.channel].append(delta.text)
            on_text(delta)
        if not isinstance(event, TokenEvent):
            return _answer(event, texts)


def _answer(end: FinishEvent, texts: dict[Channel, list[str]]) -> GeneratedAnswer:
    num_decoded_tokens = end.num_completion_tokens - 1
    return GeneratedAnswer(
        content="".join(texts[Channel.CONTENT]),
        reasoning="".join(texts[Channel.REASONING]),
        finish_reason=end.reason.value,
        num_prompt_tokens=end.num_prompt_tokens,
        num_completion_tokens=end.num_completion_tokens,
        prefill_tokens_per_s=end.num_prompt_tokens / max(end.prefill_s, 1e-9),
        decode_tokens_per_s=num_decoded_tokens / max(end.decode_s, 1e-9) if num_decoded_tokens else None,
    )
