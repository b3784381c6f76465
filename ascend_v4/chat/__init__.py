"""The chat protocol as pure text: messages to a prompt, a completion to a message.

Tokens, ids and streaming live elsewhere. `docs/chat.md` has the grammar.
"""

from __future__ import annotations

from ascend_v4.chat.encode import encode_messages
from ascend_v4.chat.parse import parse_completion
from ascend_v4.chat.protocol import PROTOCOL, Protocol, special_tokens

__all__ = ["PROTOCOL", "Protocol", "encode_messages", "parse_completion", "special_tokens"]
