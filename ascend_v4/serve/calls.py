"""What a client asks for, from the JSON body of a call. Checked here; carried out elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ascend_v4.chat.protocol import shown
from ascend_v4.engine.requests import MAX_TEMPERATURE, MAX_TOP_LOGPROBS
from ascend_v4.engine.text import check_stops
from ascend_v4.errors import RequestError
from ascend_v4.serve.fields import Fields

MAX_PROMPTS = 64
"""Prompts of one completions call."""

# Fields that change no token: taken without a word.
_HARMLESS = frozenset((
    "user", "metadata", "store", "service_tier", "safety_identifier", "request_id", "priority",
    "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "skip_special_tokens",
    "add_generation_prompt",
))  # fmt: skip
# Fields this server does not act on, at the values where that makes no difference.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "functions": ([],),
}


class Effort(Enum):
    """How long the model is to think. The value is the chat encoder's word."""

    HIGH = "high"
    MAX = "max"


_EFFORTS: Mapping[str, Effort | None] = {
    "none": None,
    "minimal": Effort.HIGH,
    "low": Effort.HIGH,
    "medium": Effort.HIGH,
    "high": Effort.HIGH,
    "max": Effort.MAX,
    "xhigh": Effort.MAX,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CommonCall:
    """What chat and plain completions have in common."""

    model: str | None
    is_streamed: bool
    includes_usage: bool
    """Whether the stream ends with a chunk that holds the usage."""
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stops: tuple[str, ...]
    ignores_eos: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionCall:
    """A call of /v1/completions."""

    common: CommonCall
    prompts: tuple[str | list[int], ...]
    num_top_logprobs: int | None
    ignored: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatCall:
    """A call of /v1/chat/completions."""

    common: CommonCall
    messages: list[Any]
    """Unchecked; the chat encoder checks them."""
    tools: list[Any]
    schema: dict[str, Any] | None
    """JSON schema the answer is asked to follow; told to the model, not enforced."""
    thinking: bool
    effort: Effort
    num_top_logprobs: int | None
    ignored: tuple[str, ...]


def read_completion_call(body: Mapping[str, Any]) -> CompletionCall:
    """A completions call. Raises RequestError naming the field."""
    fields = Fields(body)
    common = _read_common(fields, max_tokens_names=("max_tokens",))
    if fields.flag("echo"):
        raise RequestError(
            "echo is not supported; leave it out and put prompt and answer together.", field="echo"
        )
    if fields.raw("suffix"):
        raise RequestError("suffix is not supported; the model only continues text.", field="suffix")
    return CompletionCall(
        common=common,
        prompts=_read_prompts(fields),
        num_top_logprobs=fields.integer("logprobs", low=0, high=MAX_TOP_LOGPROBS),
        ignored=_ignored(fields),
    )


def read_chat_call(body: Mapping[str, Any]) -> ChatCall:
    """A chat call. Raises RequestError naming the field."""
    fields = Fields(body)
    common = _read_common(fields, max_tokens_names=("max_completion_tokens", "max_tokens"))
    messages = fields.items("messages")
    if not messages:
        raise fields.wrong("messages", "a list of at least one message")
    thinking, effort = _read_thinking(fields)
    schema, unenforced = _read_response_format(fields)
    wants_logprobs = fields.flag("logprobs")
    num_top_logprobs = fields.integer("top_logprobs", low=0, high=MAX_TOP_LOGPROBS)
    if num_top_logprobs and not wants_logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", field="top_logprobs")
    return ChatCall(
        common=common,
        messages=messages,
        tools=_read_tools(fields),
        schema=schema,
        thinking=thinking,
        effort=effort,
        num_top_logprobs=(num_top_logprobs or 0) if wants_logprobs else None,
        ignored=_ignored(fields) + unenforced,
    )


def _read_common(fields: Fields, *, max_tokens_names: tuple[str, ...]) -> CommonCall:
    for name in ("n", "best_of"):
        if (fields.integer(name, low=1, high=1 << 20) or 1) > 1:
            raise RequestError(
                f"{name} above 1 is not supported; send the request several times.", field=name
            )
    is_streamed = bool(fields.flag("stream"))
    options = fields.mapping("stream_options")
    includes_usage = bool(options.flag("include_usage"))
    if includes_usage and not is_streamed:
        raise RequestError("stream_options needs stream to be true.", field="stream_options")
    limits = [fields.integer(name, low=1) for name in max_tokens_names]
    temperature = fields.number("temperature", low=0.0, high=MAX_TEMPERATURE)
    top_p = fields.number("top_p", low=0.0, high=1.0)
    return CommonCall(
        model=fields.text("model"),
        is_streamed=is_streamed,
        includes_usage=includes_usage,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=fields.integer("seed", low=-(1 << 63)),
        stops=_read_stops(fields),
        ignores_eos=bool(fields.flag("ignore_eos")),
    )


def _read_stops(fields: Fields) -> tuple[str, ...]:
    stop = fields.raw("stop")
    if stop is None or stop == []:
        return ()
    stops = stop if isinstance(stop, list) else [stop]
    if not all(isinstance(text, str) for text in stops):
        raise fields.wrong("stop", "a string or a list of strings")
    check_stops(stops)
    return tuple(stops)


def _read_prompts(fields: Fields) -> tuple[str | list[int], ...]:
    prompt = fields.raw("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise fields.wrong("prompt", "a string, a list of token ids, or a list of those")
    if _is_token_ids(prompt):
        return (prompt,)
    if len(prompt) > MAX_PROMPTS:
        raise RequestError(
            f"prompt holds {len(prompt)} prompts; at most {MAX_PROMPTS} go into one call.", field="prompt"
        )
    for index, item in enumerate(prompt):
        if not isinstance(item, str) and not (isinstance(item, list) and _is_token_ids(item)):
            raise RequestError(
                f"prompt[{index}] is {shown(item)}; it must be a string or a list of token ids.",
                field="prompt",
            )
    return tuple(prompt)


def _is_token_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _read_tools(fields: Fields) -> list[Any]:
    tools = fields.items("tools") or []
    choice = fields.raw("tool_choice")
    if choice is None or choice == "auto":
        return tools
    if choice == "none":
        return []
    if choice == "required" or isinstance(choice, dict):
        raise RequestError(
            'tool_choice can be "auto" or "none": this server cannot force the model to call a tool.',
            field="tool_choice",
        )
    raise fields.wrong("tool_choice", '"auto" or "none"')


def _read_response_format(fields: Fields) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    """The schema to be shown to the model, and what to warn about: nothing here is enforced."""
    wanted = fields.mapping("response_format")
    kind = wanted.text("type")
    if kind in (None, "text"):
        return None, ()
    if kind == "json_object":
        return None, ("response_format",)
    if kind != "json_schema":
        raise wanted.wrong("type", '"text", "json_object" or "json_schema"')
    schema = wanted.mapping("json_schema").raw("schema")
    if not isinstance(schema, dict) or not schema:
        raise RequestError(
            f"response_format.json_schema.schema is {shown(schema)}; it must be an object.",
            field="response_format",
        )
    return schema, ("response_format",)


def _read_thinking(fields: Fields) -> tuple[bool, Effort]:
    """Whether to think, and how hard.

    Asked for by `thinking` (true, or DeepSeek's {"type": "enabled"}), `enable_thinking`, either of them in
    `chat_template_kwargs`, or `reasoning_effort`. What is said of thinking itself outranks the effort.
    """
    template = fields.mapping("chat_template_kwargs")
    switches = [_read_switch(fields), fields.flag("enable_thinking")]
    switches += [_read_switch(template), template.flag("enable_thinking")]
    words = [(source, source.text("reasoning_effort")) for source in (fields, template)]
    said = next((switch for switch in switches if switch is not None), None)
    for source, word in words:
        if word is None:
            continue
        if word not in _EFFORTS:
            raise source.wrong("reasoning_effort", "one of " + ", ".join(_EFFORTS))
        effort = _EFFORTS[word]
        return (effort is not None if said is None else said), effort or Effort.HIGH
    return bool(said), Effort.HIGH


def _read_switch(fields: Fields) -> bool | None:
    value = fields.raw("thinking")
    if isinstance(value, dict):
        kind = value.get("type")
        if kind not in ("enabled", "disabled"):
            raise fields.wrong("thinking", 'true, false or {"type": "enabled"} or {"type": "disabled"}')
        return bool(kind == "enabled")
    return fields.flag("thinking")


def _ignored(fields: Fields) -> tuple[str, ...]:
    """Names of fields that would have changed the answer, had this server known them."""
    return tuple(
        name
        for name, value in fields.unread().items()
        if name not in _HARMLESS and value not in _NEUTRAL.get(name, ())
    )
