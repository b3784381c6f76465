"""The fixed strings of the protocol, read once from `protocol.json`.

They are the model's training format, byte for byte: correct them against golden cases, never by taste.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType

from ascend_v4.errors import ChatFormatError


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Special tokens and fixed texts. The tokens are strings; their ids belong to a tokenizer."""

    bos: str
    eos: str
    user: str
    assistant: str
    latest_reminder: str
    think_start: str
    think_end: str
    dsml: str
    """Opens every tag of a tool call: `<` + dsml + `invoke`, `</` + dsml + `invoke>`."""
    tasks: Mapping[str, str]
    """Task name to its token."""
    efforts: Mapping[str, str]
    """Reasoning effort to the text it puts at the start of a thinking prompt."""
    tools_before: str
    tools_after: str
    response_format_before: str
    tool_result_open: str
    tool_result_close: str

    @property
    def tool_calls_open(self) -> str:
        """What ends the content of a completion that calls tools; the tag's own `>` comes after it."""
        return f"\n\n<{self.dsml}tool_calls"


def _load_protocol() -> Protocol:
    text = files("ascend_v4.chat").joinpath("protocol.json").read_text(encoding="utf-8")
    stored = json.loads(text)
    return Protocol(
        tasks=MappingProxyType(stored["tasks"]),
        efforts=MappingProxyType(stored["efforts"]),
        **stored["tokens"],
        **stored["texts"],
    )


PROTOCOL = _load_protocol()
"""The protocol of the release this package follows."""


def special_tokens() -> tuple[str, ...]:
    """Every string of the protocol that a tokenizer must hold as one token; BOS first, EOS second."""
    p = PROTOCOL
    tokens = (p.bos, p.eos, p.user, p.assistant, p.think_start, p.think_end, p.dsml, p.latest_reminder)
    return tokens + tuple(p.tasks.values())


def is_thinking(thinking_mode: str) -> bool:
    """Whether a thinking mode is "thinking" and not "chat". Raises ChatFormatError for anything else."""
    if not isinstance(thinking_mode, str) or thinking_mode not in ("chat", "thinking"):
        raise ChatFormatError(f'thinking_mode is {shown(thinking_mode)}; it must be "chat" or "thinking".')
    return thinking_mode == "thinking"


_SHOWN_CHARACTERS = 40
_SHOWN_BITS = 64


def shown(value: object) -> str:
    """A value for an error message, short and safe to print however large or nested it is."""
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_CHARACTERS else f"{value[:_SHOWN_CHARACTERS]!r}..."
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int) and value.bit_length() <= _SHOWN_BITS:
        return repr(value)
    return f"a {type(value).__name__}"
