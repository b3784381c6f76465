"""Turns of a conversation, from messages that nobody has checked yet.

A turn is what the prompt shows as one: user and tool messages that follow each other are a single user turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ascend_v4.chat.json_text import read_json, require_unicode, write_json
from ascend_v4.chat.protocol import PROTOCOL, shown
from ascend_v4.errors import ChatFormatError


class Role(Enum):
    """Who speaks in a turn."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"
    LATEST_REMINDER = "latest_reminder"


_TOOL_ROLE = "tool"
_ROLE_NAMES = (*(role.value for role in Role), _TOOL_ROLE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One piece of a turn's content. `tool_call_id` is None unless the piece is a tool's result."""

    text: str
    tool_call_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One argument of a call, as it is written out: raw text, or JSON where `is_text` is false."""

    name: str
    text: str
    is_text: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call the assistant made. `call_id` is "" where the message has none."""

    call_id: str
    name: str
    parameters: tuple[Parameter, ...]


@dataclass(kw_only=True, slots=True)
class Turn:
    """One turn, checked. `blocks` grows while messages are merged and is not touched after."""

    role: Role
    blocks: list[Block] = field(default_factory=list)
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    tool_schemas: tuple[str, ...] = ()
    """JSON of each tool offered. A user message offers none: the official encoder loses its tools."""
    response_format: str = ""
    """JSON schema, "" where none is asked for."""
    task: str | None = None
    is_closed: bool = True
    """Whether an assistant's turn ends with EOS."""

    @property
    def asks(self) -> bool:
        """Whether the assistant is to answer this turn."""
        return self.role in (Role.USER, Role.DEVELOPER)


def read_turns(messages: Sequence[Mapping[str, Any]]) -> list[Turn]:
    """Turns in order, tool results sorted by the order of the calls they answer. The messages stay untouched.

    Raises ChatFormatError naming the message and the field.
    """
    if not isinstance(messages, (list, tuple)):
        raise ChatFormatError(f"messages is {shown(messages)}; it must be a list of messages.")
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = _read_role(message, where)
        turn = _read_tool_result(message, where) if role is None else _read_turn(message, role, where)
        last = turns[-1] if turns and turns[-1].role is Role.USER else None
        # A tool's result joins the user turn before it even if that one carries a task.
        if last is not None and turn.role is Role.USER and (role is None or last.task is None):
            last.blocks += turn.blocks
        else:
            turns.append(turn)
    _sort_tool_results(turns)
    return turns


def _sort_tool_results(turns: list[Turn]) -> None:
    call_order: dict[str, int] = {}
    for turn in turns:
        if turn.calls:
            call_order = {call.call_id: index for index, call in enumerate(turn.calls) if call.call_id}
        elif turn.role is Role.USER:
            results = [block for block in turn.blocks if block.tool_call_id is not None]
            # Results of unknown calls count as the first, as in the official encoder.
            results.sort(key=lambda block: call_order.get(block.tool_call_id or "", 0))
            in_order = iter(results)
            turn.blocks = [block if block.tool_call_id is None else next(in_order) for block in turn.blocks]


def _read_role(message: object, where: str) -> Role | None:
    """The role, None for a tool's message."""
    if not isinstance(message, Mapping):
        raise ChatFormatError(f"{where} is {shown(message)}; a message is an object with role and content.")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLE_NAMES:
        raise ChatFormatError(f"{where}.role is {shown(role)}; it must be one of {', '.join(_ROLE_NAMES)}.")
    return None if role == _TOOL_ROLE else Role(role)


def _read_tool_result(message: Mapping[str, Any], where: str) -> Turn:
    call_id = _read_optional_text(message, "tool_call_id", where)
    block = Block(text=_read_content(message, where), tool_call_id=call_id)
    return Turn(role=Role.USER, blocks=[block])


def _read_turn(message: Mapping[str, Any], role: Role, where: str) -> Turn:
    content = _read_content(message, where)
    if role is Role.DEVELOPER and not content:
        raise ChatFormatError(f"{where}.content is empty; a developer message needs text.")
    if role is Role.LATEST_REMINDER and message.get("content") is None:
        raise ChatFormatError(f"{where}.content is missing; a latest_reminder message needs it.")
    turn = Turn(role=role, blocks=[Block(text=content)], task=_read_task(message, where))
    if role is not Role.USER:
        turn.tool_schemas = _read_tools(message, where)
    if role in (Role.SYSTEM, Role.DEVELOPER):
        turn.response_format = _read_response_format(message, where)
    if role is Role.ASSISTANT:
        turn.reasoning = _read_optional_text(message, "reasoning_content", where)
        turn.calls = _read_calls(message, where)
        turn.is_closed = not _read_flag(message, "wo_eos", where)
    return turn


def _read_content(message: Mapping[str, Any], where: str) -> str:
    """Content as one text; the parts of a list are paragraphs. Absent and null are ""."""
    content = message.get("content")
    where = f"{where}.content"
    if not isinstance(content, (list, tuple)):
        return "" if content is None else _require_text(content, where, "text, a list of parts or null")
    return "\n\n".join(_read_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _read_part(part: object, where: str) -> str:
    if not isinstance(part, Mapping):
        example = '{"type": "text", "text": "..."}'
        raise ChatFormatError(f"{where} is {shown(part)}; a part is an object such as {example}.")
    kind = _require_text(part.get("type"), f"{where}.type", "text")
    if kind != "text":
        return f"[Unsupported {kind}]"
    return _require_text(part.get("text", ""), f"{where}.text", "text")


def _read_task(message: Mapping[str, Any], where: str) -> str | None:
    task = message.get("task")
    if task is None:
        return None
    if not isinstance(task, str) or task not in PROTOCOL.tasks:
        raise ChatFormatError(
            f"{where}.task is {shown(task)}; it must be one of {', '.join(PROTOCOL.tasks)}."
        )
    return task


def _read_tools(message: Mapping[str, Any], where: str) -> tuple[str, ...]:
    tools = _read_objects(message, "tools", where)
    schemas = []
    for index, tool in enumerate(tools):
        at = f"{where}.tools[{index}].function"
        function = _require_object(tool.get("function"), at)
        _require_text(function.get("name"), f"{at}.name", "text")
        schemas.append(_to_json(function, at))
    return tuple(schemas)


def _read_response_format(message: Mapping[str, Any], where: str) -> str:
    response_format = message.get("response_format")
    if response_format is None or response_format == {}:
        return ""
    at = f"{where}.response_format"
    return _to_json(_require_object(response_format, at), at)


def _read_calls(message: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    calls = _read_objects(message, "tool_calls", where)
    return tuple(_read_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls))


def _read_call(call: Mapping[str, Any], where: str) -> ToolCall:
    at = f"{where}.function"
    function = _require_object(call.get("function"), at)
    return ToolCall(
        call_id=_read_optional_text(call, "id", where) or _read_optional_text(function, "id", at),
        name=_require_text(function.get("name"), f"{at}.name", "text"),
        parameters=_read_parameters(function.get("arguments"), f"{at}.arguments"),
    )


def _read_parameters(arguments: object, where: str) -> tuple[Parameter, ...]:
    if isinstance(arguments, str):
        text = _require_text(arguments, where, "text")
        try:
            arguments = read_json(text)
        except ValueError:
            # The protocol's way to show the model what it once wrote, whatever that was.
            return (Parameter(name="arguments", text=text, is_text=True),)
    if not isinstance(arguments, dict):
        raise ChatFormatError(f"{where} holds {shown(arguments)}; it must be a JSON object, written as text.")
    return tuple(_read_parameter(name, value, where) for name, value in arguments.items())


def _read_parameter(name: object, value: object, where: str) -> Parameter:
    name = _require_text(name, f"a key of {where}", "text")
    if isinstance(value, str):
        return Parameter(name=name, text=_require_text(value, f"{where}.{shown(name)}", "text"), is_text=True)
    return Parameter(name=name, text=_to_json(value, f"{where}.{shown(name)}"), is_text=False)


def _read_objects(owner: Mapping[str, Any], key: str, where: str) -> Sequence[Mapping[str, Any]]:
    items = owner.get(key)
    if items is None:
        return ()
    if not isinstance(items, (list, tuple)):
        raise ChatFormatError(f"{where}.{key} is {shown(items)}; it must be a list of objects or null.")
    return [_require_object(item, f"{where}.{key}[{index}]") for index, item in enumerate(items)]


def _read_optional_text(owner: Mapping[str, Any], key: str, where: str) -> str:
    value = owner.get(key)
    return "" if value is None else _require_text(value, f"{where}.{key}", "text or null")


def _read_flag(owner: Mapping[str, Any], key: str, where: str) -> bool:
    value = owner.get(key)
    if value is not None and not isinstance(value, bool):
        raise ChatFormatError(f"{where}.{key} is {shown(value)}; it must be true, false or null.")
    return bool(value)


def _require_object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ChatFormatError(f"{where} is {_shown_or_missing(value)}; it must be an object.")
    return value


def _require_text(value: object, where: str, wanted: str) -> str:
    if not isinstance(value, str):
        raise ChatFormatError(f"{where} is {_shown_or_missing(value)}; it must be {wanted}.")
    try:
        require_unicode(value)
    except ValueError as error:
        raise ChatFormatError(f"{where} {error}. Replace it: the prompt must be valid Unicode.") from None
    return value


def _shown_or_missing(value: object) -> str:
    return "missing" if value is None else shown(value)


def _to_json(value: object, where: str) -> str:
    try:
        return write_json(value)
    except ValueError as error:
        raise ChatFormatError(f"{where} {error}. Send plain JSON that is smaller or flatter.") from None
