"""Text to token ids and back, for byte-level BPE tokenizers, which is what DeepSeek releases.

Decoding goes token by token through bytes, so that a stream costs constant time per token and never shows
half of a character. Making tokenizer files is tokenizer_files.py.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ascend_v4.config import ModelConfig
from ascend_v4.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER_BYTES = 64 << 20
"""The release's tokenizer.json has 6 to 8 MB."""

REPLACEMENT = "\ufffd"


class Tokenizer:
    """A tokenizer that fits its model: every id it gives is below the model's vocabulary size."""

    def __init__(self, backend: tokenizers.Tokenizer, *, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._bytes_by_character = {character: byte for byte, character in enumerate(byte_characters())}
        self._added = backend.get_added_tokens_decoder()
        self._token_bytes: dict[int, bytes] = {}
        self.special_ids = special_ids
        """Ids that stand for no text of a user's, such as BOS and EOS."""

    @property
    def num_tokens(self) -> int:
        """Tokens that have an id, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens in it become their ids; none is added, not even BOS.

        Raises TokenizerError for a text with lone surrogates, which no UTF-8 can carry.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text has a lone surrogate at character {error.start}.") from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def token_id(self, token: str) -> int | None:
        """Id of one token by its spelling, such as `<think>`; None where the tokenizer lacks it."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8, and ids that are no token, become U+FFFD."""
        decoder = self.stream_decoder(skip_special=skip_special)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()

    def stream_decoder(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder for ids that come one at a time; its pieces joined are what `decode` gives."""
        return StreamDecoder(self, skip_special=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, possibly a part of a UTF-8 character."""
        if token_id not in self._token_bytes:
            self._token_bytes[token_id] = self._look_up(token_id)
        return self._token_bytes[token_id]

    def _look_up(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        spelling = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if spelling is None:
            return REPLACEMENT.encode()
        try:
            return bytes(self._bytes_by_character[character] for character in spelling)
        except KeyError:
            return str(spelling).encode()


class StreamDecoder:
    """Text of ids that come one at a time; never half of a character."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Text that is complete with this token."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Text of what is left: U+FFFD for a character that never was completed."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path, *, config: ModelConfig) -> Tokenizer:
    """Tokenizer from a tokenizer.json, or from the directory that holds one.

    Raises TokenizerError: no file, not a byte-level tokenizer, or ids that the model's vocabulary lacks.
    """
    file = Path(path)
    if file.is_dir():
        file = file / TOKENIZER_FILE
    text = _read_bounded(file)
    special_ids, largest_id = _check_layout(file, text)
    if largest_id >= config.vocab_size:
        raise TokenizerError(
            f"{file} has ids up to {largest_id}; the model's vocabulary has {config.vocab_size}. "
            "Name the model's own tokenizer with --tokenizer PATH."
        )
    return Tokenizer(_parse(file, text), special_ids=special_ids)


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _read_bounded(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_TOKENIZER_BYTES + 1)
    except FileNotFoundError:
        raise TokenizerError(
            f"{file} does not exist: the checkpoint has no tokenizer. Name one with --tokenizer PATH "
            f"(a {TOKENIZER_FILE} or a directory that holds one)."
        ) from None
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error.strerror}.") from None
    if len(raw) > MAX_TOKENIZER_BYTES:
        raise TokenizerError(f"{file} has more than {MAX_TOKENIZER_BYTES} bytes, the bound for a tokenizer.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8 at byte {error.start}.") from None


def _check_layout(file: Path, text: str) -> tuple[frozenset[int], int]:
    """Ids of special tokens and the largest id of a tokenizer.json, if it is a byte-level one."""
    try:
        layout = json.loads(text)
        decoder, vocabulary, added = layout["decoder"], layout["model"]["vocab"], layout["added_tokens"]
        ids = [*vocabulary.values(), *(token["id"] for token in added)]
        special_ids = frozenset(token["id"] for token in added if token["special"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__} {str(error)[:100]}"
        raise TokenizerError(f"{file} is not a tokenizer.json: {reason}.") from None
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        shown = str(decoder)[:80]
        raise TokenizerError(f"{file} has decoder {shown}; only byte-level tokenizers are supported.")
    if not ids or not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise TokenizerError(f"{file} has no ids, or ids that are not integers >= 0.")
    return special_ids, max(ids)


def _parse(file: Path, text: str) -> tokenizers.Tokenizer:
    try:
        import tokenizers
    except ImportError:
        raise TokenizerError(
            "the tokenizers package is not installed. Install it with: pip install tokenizers."
        ) from None
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        # the package raises plain Exception for whatever it cannot parse
        raise TokenizerError(f"{file} cannot be used as a tokenizer: {str(error)[:200]}.") from error
