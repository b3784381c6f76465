"""Logarithms of probabilities in the two forms OpenAI has for them."""

from __future__ import annotations

from typing import Any

from ascend_v4.engine.chat_text import TextCodec
from ascend_v4.engine.requests import SampledToken


def chat_logprob(token: SampledToken, codec: TextCodec) -> dict[str, Any]:
    """One entry of `logprobs.content` of a chat answer."""
    assert token.logprob is not None, f"token {token.token_id} was sampled without logprobs"
    top = [_entry(token_id, logprob, codec) for token_id, logprob in token.top_logprobs]
    return {**_entry(token.token_id, token.logprob, codec), "top_logprobs": top}


def _entry(token_id: int, logprob: float, codec: TextCodec) -> dict[str, Any]:
    # The bytes tell more than the text where a token is a piece of a character.
    text, raw = codec.decode([token_id]), codec.token_bytes(token_id)
    return {"token": text, "logprob": logprob, "bytes": list(raw)}


class CompletionLogprobs:
    """`logprobs` of a plain completion: parallel lists over its tokens."""

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._offset_chars = 0

    def lists(self, tokens: list[SampledToken]) -> dict[str, Any]:
        """The lists for the next tokens; text offsets go on where the last call stopped."""
        texts = [self._codec.decode([token.token_id]) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset_chars)
            self._offset_chars += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: SampledToken) -> dict[str, float]:
        top = {self._codec.decode([token_id]): logprob for token_id, logprob in reversed(token.top_logprobs)}
        assert token.logprob is not None, f"token {token.token_id} was sampled without logprobs"
        top.setdefault(self._codec.decode([token.token_id]), token.logprob)
        return top
