"""Tool calls in an answer's text: held back, parsed at the end, given back as text when they do not parse."""

from __future__ import annotations

import uuid
from typing import Any

from ascend_v4.chat import PROTOCOL, parse_completion
from ascend_v4.engine.text import StopMatcher
from ascend_v4.errors import CompletionFormatError


class ToolGate:
    """Lets content through up to the tool call block and keeps the block."""

    def __init__(self) -> None:
        self._matcher = StopMatcher([PROTOCOL.tool_calls_open])
        self._block: list[str] = []

    def push(self, text: str) -> str:
        """The part of the text that is certainly content."""
        if self._matcher.found is not None:
            self._block.append(text)
            return ""
        content = self._matcher.push(text)
        if self._matcher.found is not None:
            self._block.append(self._matcher.rest)
        return content

    def end(self, *, is_complete: bool) -> tuple[str, list[dict[str, Any]]]:
        """What is left when no more text comes: content, and the calls in OpenAI's form.

        The block counts as calls only when the answer was ended by the model and the block parses.
        """
        if self._matcher.found is None:
            return self._matcher.flush(), []
        block = "".join(self._block)
        if not is_complete:
            return block, []
        try:
            message = parse_completion(block + PROTOCOL.eos, thinking_mode="chat")
        except CompletionFormatError:
            return block, []
        return "", [{"id": f"call_{uuid.uuid4().hex[:24]}", **call} for call in message["tool_calls"]]
