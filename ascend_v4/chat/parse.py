"""Whole completions: reasoning, content and tool calls of a text that ends with its end token.

Each scan starts where the last one stopped, so the time is linear in the text whatever it holds.
"""

from __future__ import annotations

import re
from typing import Any, NoReturn

from ascend_v4.chat.json_text import check_json, write_json_text
from ascend_v4.chat.protocol import PROTOCOL, is_thinking, shown
from ascend_v4.errors import CompletionFormatError

_DSML = PROTOCOL.dsml
_INVOKE_OPEN = f"<{_DSML}invoke"
_INVOKE_CLOSE = f"</{_DSML}invoke"
_PARAMETER_OPEN = f"<{_DSML}parameter"
# Without its "<": a value that ends in half a closing tag is malformed, not longer than it looks.
_PARAMETER_CLOSE = f"/{_DSML}parameter"
_TOOL_CALLS_CLOSE = f"</{_DSML}tool_calls>"


def _either(first: str, second: str) -> re.Pattern[str]:
    return re.compile(f"{re.escape(first)}|{re.escape(second)}")


# One pattern of both stops: two searches would each run to the end of the text for every call.
_REASONING_STOP = _either(PROTOCOL.think_end, PROTOCOL.tool_calls_open)
_CONTENT_STOP = _either(PROTOCOL.eos, PROTOCOL.tool_calls_open)
_HEADER_STOP = _either(_PARAMETER_OPEN, _INVOKE_CLOSE)
_NAME_END = re.compile(r'" string="(true|false)">')

_FORBIDDEN = (PROTOCOL.bos, PROTOCOL.eos, PROTOCOL.think_start, PROTOCOL.think_end, PROTOCOL.dsml)


def parse_completion(text: str, *, thinking_mode: str) -> dict[str, Any]:
    """Assistant message of a completion: role, content, reasoning_content, tool_calls (OpenAI form, no ids).

    The text is what follows the prompt, so in "thinking" mode it starts inside the thinking block. Absent
    parts are "" and []. The arguments of a call are JSON text in the completion's own order and spelling.

    Raises CompletionFormatError for anything else, a text without its end token included; ChatFormatError for
    an unknown thinking_mode.
    """
    thinking = is_thinking(thinking_mode)
    if not isinstance(text, str):
        raise CompletionFormatError(f"The completion is {shown(text)}; it must be text.")
    reader = _Reader(text)
    reasoning = reader.read_reasoning() if thinking else ""
    content, has_calls = reader.read_content()
    calls = reader.read_calls() if has_calls else []
    reader.read_end()
    _refuse_special_tokens(reasoning, "reasoning")
    _refuse_special_tokens(content, "content")
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _refuse_special_tokens(text: str, part: str) -> None:
    for token in _FORBIDDEN:
        at = text.find(token)
        if at >= 0:
            raise CompletionFormatError(f"Malformed completion: its {part} holds {token} at character {at}.")


class _Reader:
    """A position in a completion; every method reads one part and moves past it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def read_reasoning(self) -> str:
        """Text up to the end of thinking."""
        stop = _REASONING_STOP.search(self.text)
        if stop is None or stop.group() != PROTOCOL.think_end:
            self.fail(f"{PROTOCOL.think_end} is missing: thinking never ends")
        return self.read_to(stop)

    def read_content(self) -> tuple[str, bool]:
        """Text up to the end token, which stays, or up to the tool calls; and whether there are calls."""
        stop = _CONTENT_STOP.search(self.text, self.at)
        if stop is None:
            self.fail(f"the end token {PROTOCOL.eos} is missing: the completion was cut off")
        if stop.group() != PROTOCOL.eos:
            return self.read_to(stop), True
        content = self.text[self.at : stop.start()]
        self.at = stop.start()
        return content, False

    def read_calls(self) -> list[dict[str, Any]]:
        """Calls of a block whose opening tag has been read up to its `>`."""
        calls = []
        self.expect(">\n")
        while not self.skip(_TOOL_CALLS_CLOSE):
            self.expect(_INVOKE_OPEN)
            calls.append(self.read_call())
            self.expect(">\n")
        return calls

    def read_call(self) -> dict[str, Any]:
        """One call, from behind its opening tag's word to before the `>` of its closing tag."""
        name, has_parameters = self.read_header()
        arguments: dict[str, str] = {}
        while has_parameters:
            key, value = self.read_parameter()
            if key in arguments:
                self.fail(f"the parameter {shown(key)} is given twice")
            arguments[key] = value
            self.expect(">\n")
            has_parameters = self.skip(_PARAMETER_OPEN)
            if not has_parameters:
                self.expect(_INVOKE_CLOSE)
        joined = ", ".join(f"{write_json_text(key)}: {value}" for key, value in arguments.items())
        return {"type": "function", "function": {"name": name, "arguments": "{" + joined + "}"}}

    def read_header(self) -> tuple[str, bool]:
        """Name of the function called, and whether a parameter follows."""
        stop = _HEADER_STOP.search(self.text, self.at)
        if stop is None:
            self.fail("a tool call is not closed")
        start = self.at
        header = self.read_to(stop).lstrip()
        quoted = header.removeprefix('name="')
        # A call without arguments has an empty line where they would be.
        ending = '">\n\n' if quoted.endswith('">\n\n') else '">\n'
        name = quoted.removesuffix(ending)
        if len(quoted) == len(header) or len(name) == len(quoted):
            self.at = start
            self.fail('a tool call must start with name="...">')
        return name, stop.group() == _PARAMETER_OPEN

    def read_parameter(self) -> tuple[str, str]:
        """Name and JSON text of one parameter, up to before the `>` of its closing tag."""
        start = self.at
        self.expect(' name="')
        end = self.text.find(_PARAMETER_CLOSE, self.at)
        if end < 0 or self.text[end - 1] != "<":
            self.fail("a parameter is not closed")
        name_end = _NAME_END.search(self.text, self.at, end - 1)
        if name_end is None:
            self.fail('a parameter must start with name="..." string="true|false">')
        name = self.text[self.at : name_end.start()]
        value = self.text[name_end.end() : end - 1]
        self.at = end + len(_PARAMETER_CLOSE)
        if name_end.group(1) == "true":
            return name, write_json_text(value)
        try:
            check_json(value)
        except ValueError as error:
            self.at = start
            self.fail(f"the parameter {shown(name)} is marked as JSON and is not: {error}")
        return name, value

    def read_end(self) -> None:
        """The end token, with nothing behind it."""
        self.expect(PROTOCOL.eos)
        if self.at != len(self.text):
            self.fail("there is text behind the end token")

    def read_to(self, stop: re.Match[str]) -> str:
        """Text up to a match, which is passed over."""
        read = self.text[self.at : stop.start()]
        self.at = stop.end()
        return read

    def skip(self, expected: str) -> bool:
        """Pass over a string if it is here."""
        if not self.text.startswith(expected, self.at):
            return False
        self.at += len(expected)
        return True

    def expect(self, expected: str) -> None:
        """Pass over a string that must be here."""
        if not self.skip(expected):
            self.fail(f"expected {expected!r}")

    def fail(self, problem: str) -> NoReturn:
        """Raise CompletionFormatError for this position."""
        found = shown(self.text[self.at : self.at + 60]) if self.at < len(self.text) else "the end"
        raise CompletionFormatError(f"Malformed completion at character {self.at}: {problem}; found {found}.")
