"""The protocol's tokens in one tokenizer, and the texts of chat answers made with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ascend_v4.chat import PROTOCOL, special_tokens
from ascend_v4.engine.text import OutputText, TextDecoder
from ascend_v4.errors import RequestError, TokenizerError


class TextCodec(Protocol):
    """A tokenizer, as far as the engine and the server need one."""

    def encode(self, text: str, /) -> list[int]:
        """Token ids; a special token spelled out in the text becomes its own id."""
        ...

    def decode(self, token_ids: Sequence[int], /) -> str:
        """The text of ids."""
        ...

    def token_bytes(self, token_id: int, /) -> bytes:
        """The bytes of one token, possibly a piece of a character."""
        ...

    def stream_decoder(self) -> TextDecoder:
        """A decoder of ids that come one at a time."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatVocabulary:
    """Ids of the protocol's special tokens in one tokenizer; those it lacks are left out."""

    codec: TextCodec
    special_ids: frozenset[int]
    think_end_id: int | None
    dsml_id: int | None

    @staticmethod
    def of(codec: TextCodec) -> ChatVocabulary:
        """The special tokens a tokenizer holds as single tokens."""
        found = {token: ids[0] for token in special_tokens() if len(ids := codec.encode(token)) == 1}
        return ChatVocabulary(
            codec=codec,
            special_ids=frozenset(found.values()),
            think_end_id=found.get(PROTOCOL.think_end),
            dsml_id=found.get(PROTOCOL.dsml),
        )

    def encode_prompt(self, prompt: str) -> list[int]:
        """Ids of a rendered prompt.

        Raises RequestError when nobody is to answer it, TokenizerError when the tokenizer lacks the chat's
        tokens.
        """
        ends = (PROTOCOL.think_start, PROTOCOL.think_end, *PROTOCOL.tasks.values())
        if not prompt.endswith(ends):
            raise RequestError(
                "the conversation does not end with a question: the last message must be of role user, "
                "developer or tool.",
                field="messages",
            )
        if self.think_end_id is None:
            raise TokenizerError(
                f"the tokenizer has no token {PROTOCOL.think_end!r}, so it cannot render a chat. Use raw "
                "prompts (/v1/completions, generate --raw) or name the model's own with --tokenizer PATH."
            )
        return self.codec.encode(prompt)

    def chat_output(self, *, thinking: bool, keeps_tool_calls: bool, stops: Sequence[str]) -> OutputText:
        """Text of an answer in the chat: reasoning apart, special tokens hidden.

        With `keeps_tool_calls` the token of tool call markup stays in the content, for who parses it.
        """
        kept = {self.dsml_id} if keeps_tool_calls else set()
        return OutputText(
            self.codec.stream_decoder,
            stops=stops,
            hidden_ids=self.special_ids - kept,
            reasoning_end_id=self.think_end_id if thinking else None,
        )

    def raw_output(self, *, eos_token_ids: Sequence[int], stops: Sequence[str]) -> OutputText:
        """Text of a plain continuation: all tokens but end tokens, which ignore_eos lets pass."""
        return OutputText(self.codec.stream_decoder, stops=stops, hidden_ids=frozenset(eos_token_ids))
