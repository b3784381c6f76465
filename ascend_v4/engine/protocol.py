"""What the engine asks of whatever runs the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class SequenceHandle(Protocol):
    """One sequence's place in the caches. Only the runner that made it knows what it holds."""

    @property
    def num_tokens(self) -> int:
        """Tokens whose cache entries are written."""
        ...


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one sequence: a piece of its prompt, or the token it was just given."""

    sequence: SequenceHandle
    token_ids: list[int]


class Runner(Protocol):
    """The model with its caches. Called from one thread at a time."""

    @property
    def vocab_size(self) -> int:
        """Rows of the output head; token ids are below it."""
        ...

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence the caches may hold, prompt and completion together."""
        ...

    def open_sequence(self, reserve_tokens: int) -> SequenceHandle:
        """An empty sequence that is promised `reserve_tokens` positions.

        Raises CacheFullError when the pools cannot promise them now.
        """
        ...

    def close_sequence(self, sequence: Any) -> None:  # noqa: ANN401 - each runner has its own handles
        """Give a sequence's positions back; the handle, one that `open_sequence` made, is dead after."""
        ...

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Logits after the last token of each chunk, float32 [len(chunks), vocab_size].

        Chunks of prompts and of single new tokens may be mixed; a sequence appears at most once.
        """
        ...
