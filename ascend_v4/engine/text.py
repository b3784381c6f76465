"""Token ids to the text a user sees: stop strings, hidden tokens, reasoning apart from the answer.

Everything here is incremental and independent of where token borders fall.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from ascend_v4.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024


class TextDecoder(Protocol):
    """Text of ids that come one at a time; never half of a character."""

    def push(self, token_id: int, /) -> str:
        """Text that is complete with this token."""
        ...

    def flush(self) -> str:
        """Text of what is left."""
        ...


class Channel(Enum):
    """Which part of an answer a text belongs to."""

    REASONING = "reasoning"
    CONTENT = "content"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of text to be appended to its channel; never empty."""

    channel: Channel
    text: str


class StopMatcher:
    """Cuts a text that arrives in pieces before the first stop string.

    First is the stop string that is complete first; of several complete with the same character, the longest.
    So the result does not depend on the pieces. Text that may still become a stop string is held back. Each
    character costs amortised constant time per stop string (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._borders = tuple(_border_table(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""
        self.rest = ""
        """What was pushed from the start of the stop string on; it grows no more after that push."""

    def push(self, text: str) -> str:
        """The text that is certain to stay. Nothing may be pushed once `found` is set."""
        assert self.found is None, f"text pushed after the stop string {self.found!r}"
        if not self._stops:
            return text
        buffered = self._held + text
        for index in range(len(self._held), len(buffered)):
            longest = self._advance(buffered[index])
            if longest is not None:
                cut = index + 1 - len(longest)
                self.found, self.rest, self._held = longest, buffered[cut:], ""
                return buffered[:cut]
        cut = len(buffered) - max(self._matched)
        self._held = buffered[cut:]
        return buffered[:cut]

    def flush(self) -> str:
        """The text held back, for when nothing more comes."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        longest: str | None = None
        for which, stop in enumerate(self._stops):
            num_matched = self._matched[which]
            while num_matched and stop[num_matched] != character:
                num_matched = self._borders[which][num_matched - 1]
            num_matched += stop[num_matched] == character
            self._matched[which] = num_matched
            if num_matched == len(stop) and (longest is None or len(stop) > len(longest)):
                longest = stop
        return longest


def _border_table(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    matched = 0
    for index in range(1, len(stop)):
        while matched and stop[matched] != stop[index]:
            matched = table[matched - 1]
        matched += stop[matched] == stop[index]
        table[index] = matched
    return table


def check_stops(stops: Sequence[str]) -> None:
    """Raises RequestError for stop strings that are empty, too many or too long."""
    if len(stops) > MAX_STOP_STRINGS:
        raise RequestError(
            f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS} are allowed.", field="stop"
        )
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise RequestError(
                f"a stop string has {len(stop)} characters; it must have 1 to {MAX_STOP_CHARS}.", field="stop"
            )


class OutputText:
    """One answer's text, token by token.

    Tokens of `hidden_ids` give no text. Where `reasoning_end_id` is given the answer starts in the reasoning
    channel and changes to content at that token; stop strings are looked for in both, never across the
    border.
    """

    def __init__(
        self,
        new_decoder: Callable[[], TextDecoder],
        *,
        stops: Sequence[str] = (),
        hidden_ids: frozenset[int] = frozenset(),
        reasoning_end_id: int | None = None,
    ) -> None:
        check_stops(stops)
        self._new_decoder = new_decoder
        self._stops = tuple(stops)
        self._hidden_ids = hidden_ids
        self._reasoning_end_id = reasoning_end_id
        self._channel = Channel.CONTENT if reasoning_end_id is None else Channel.REASONING
        self._decoder = new_decoder()
        self._matcher = StopMatcher(self._stops)
        self.num_reasoning_tokens = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer."""
        return self._matcher.found

    def push(self, token_id: int) -> tuple[TextDelta, ...]:
        """Text that is certain with this token."""
        if self._channel is Channel.REASONING:
            if token_id == self._reasoning_end_id:
                return self._end_reasoning()
            self.num_reasoning_tokens += 1
        if token_id in self._hidden_ids:
            return ()
        return self._delta(self._matcher.push(self._decoder.push(token_id)))

    def flush(self) -> tuple[TextDelta, ...]:
        """Text held back, for when no token follows."""
        if self._matcher.found is not None:
            return ()
        certain = self._matcher.push(self._decoder.flush())
        return self._delta(certain + self._matcher.flush())

    def _end_reasoning(self) -> tuple[TextDelta, ...]:
        deltas = self.flush()
        if self._matcher.found is None:
            self._channel = Channel.CONTENT
            self._decoder = self._new_decoder()
            self._matcher = StopMatcher(self._stops)
        return deltas

    def _delta(self, text: str) -> tuple[TextDelta, ...]:
        return (TextDelta(self._channel, text),) if text else ()
