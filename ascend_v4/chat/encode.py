"""Prompts: turns written out as the model was trained to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ascend_v4.chat.messages import Block, Parameter, Role, ToolCall, Turn, read_turns
from ascend_v4.chat.protocol import PROTOCOL, is_thinking, shown
from ascend_v4.errors import ChatFormatError


def encode_messages(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking_mode: str,
    drop_thinking: bool = True,
    reasoning_effort: str | None = None,
    add_bos: bool = True,
) -> str:
    """Prompt text of a conversation, up to where the assistant is to go on.

    `thinking_mode` is "chat" or "thinking". In the latter `drop_thinking` leaves out the reasoning and the
    developer messages from before the last question, unless the conversation offers tools. `reasoning_effort`
    is None, "high" (the same) or "max", which acts in thinking mode only. Texts go in raw: a special token
    spelled out in a message reads as that token.

    Raises ChatFormatError naming the message and field that cannot be rendered.
    """
    thinking = is_thinking(thinking_mode)
    effort_text = _effort_text(reasoning_effort)
    turns = read_turns(messages)
    drops = drop_thinking and not any(turn.tool_schemas for turn in turns)
    if thinking and drops:
        turns = _without_earlier_developers(turns)
    first_reasoned = _last_question(turns) if drops else 0
    parts = [PROTOCOL.bos if add_bos else "", effort_text if thinking and turns else ""]
    for index, turn in enumerate(turns):
        reasons = thinking and index >= first_reasoned
        answers_task = index > 0 and turns[index - 1].task is not None
        parts.append(_render_turn(turn, reasons=reasons and not answers_task))
        if index + 1 == len(turns) or turns[index + 1].role in (Role.ASSISTANT, Role.LATEST_REMINDER):
            parts.append(_render_transition(turn, thinking=thinking, reasons=reasons))
    return "".join(parts)


def _effort_text(effort: str | None) -> str:
    if effort is None:
        return ""
    if not isinstance(effort, str) or effort not in PROTOCOL.efforts:
        known = ", ".join(f'"{name}"' for name in PROTOCOL.efforts)
        raise ChatFormatError(f"reasoning_effort is {shown(effort)}; it must be {known} or None.")
    return PROTOCOL.efforts[effort]


def _last_question(turns: Sequence[Turn]) -> int:
    """Index of the last user or developer turn, -1 where there is none."""
    return max((index for index, turn in enumerate(turns) if turn.asks), default=-1)


def _without_earlier_developers(turns: Sequence[Turn]) -> list[Turn]:
    last = _last_question(turns)
    return [turn for index, turn in enumerate(turns) if index >= last or turn.role is not Role.DEVELOPER]


def _render_turn(turn: Turn, *, reasons: bool) -> str:
    """A turn without what follows it. `reasons`: an assistant's turn starts inside a thinking block."""
    content = "\n\n".join(_render_block(block) for block in turn.blocks)
    if turn.role is Role.ASSISTANT:
        thought = turn.reasoning + PROTOCOL.think_end if reasons else ""
        return thought + content + _render_calls(turn.calls) + (PROTOCOL.eos if turn.is_closed else "")
    if turn.role is Role.LATEST_REMINDER:
        return PROTOCOL.latest_reminder + content
    if turn.role is Role.USER:
        return PROTOCOL.user + content
    opening = PROTOCOL.user if turn.role is Role.DEVELOPER else ""
    return (
        opening + content + _render_tools(turn.tool_schemas) + _render_response_format(turn.response_format)
    )


def _render_block(block: Block) -> str:
    if block.tool_call_id is None:
        return block.text
    return PROTOCOL.tool_result_open + block.text + PROTOCOL.tool_result_close


def _render_tools(schemas: Sequence[str]) -> str:
    if not schemas:
        return ""
    return "\n\n" + PROTOCOL.tools_before + "\n".join(schemas) + PROTOCOL.tools_after


def _render_response_format(schema: str) -> str:
    return "\n\n" + PROTOCOL.response_format_before + schema if schema else ""


def _render_calls(calls: Sequence[ToolCall]) -> str:
    if not calls:
        return ""
    dsml = PROTOCOL.dsml
    invokes = "\n".join(
        f'<{dsml}invoke name="{call.name}">\n{_render_parameters(call.parameters)}\n</{dsml}invoke>'
        for call in calls
    )
    return f"{PROTOCOL.tool_calls_open}>\n{invokes}\n</{dsml}tool_calls>"


def _render_parameters(parameters: Sequence[Parameter]) -> str:
    dsml = PROTOCOL.dsml
    return "\n".join(
        f'<{dsml}parameter name="{parameter.name}" string="{"true" if parameter.is_text else "false"}">'
        f"{parameter.text}</{dsml}parameter>"
        for parameter in parameters
    )


def _render_transition(turn: Turn, *, thinking: bool, reasons: bool) -> str:
    """What hands over to the assistant after a turn; "" where the turn asks nothing."""
    if turn.task is not None and turn.task != "action":
        return PROTOCOL.tasks[turn.task]
    if turn.task is not None:
        return PROTOCOL.assistant + _think_token(is_open=thinking) + PROTOCOL.tasks[turn.task]
    return PROTOCOL.assistant + _think_token(is_open=reasons) if turn.asks else ""


def _think_token(*, is_open: bool) -> str:
    return PROTOCOL.think_start if is_open else PROTOCOL.think_end
