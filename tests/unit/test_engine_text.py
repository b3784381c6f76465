"""Stop strings, hidden tokens and the border between reasoning and content."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_v4.engine.text import Channel, OutputText, StopMatcher, TextDelta
from ascend_v4.errors import RequestError

REASONING_END_ID = 300
HIDDEN_ID = 301


class CharacterDecoder:
    """One token per character."""

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


def cut(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; the longest of those that end together."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def push_all(output: OutputText, token_ids: list[int]) -> list[TextDelta]:
    deltas: list[TextDelta] = []
    for token_id in token_ids:
        if output.stopped_by is None:
            deltas += output.push(token_id)
    return deltas + list(output.flush())


def texts(deltas: list[TextDelta]) -> dict[Channel, str]:
    return {
        channel: "".join(delta.text for delta in deltas if delta.channel is channel) for channel in Channel
    }


@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4),
)
def test_a_text_in_pieces_is_cut_where_the_whole_text_would_be(pieces, stops):
    matcher = StopMatcher(stops)
    got = ""
    for piece in pieces:
        if matcher.found is None:
            got += matcher.push(piece)
            assert cut("".join(pieces), stops).startswith(got)
    if matcher.found is None:
        got += matcher.flush()
    assert got == cut("".join(pieces), stops)
    assert (matcher.found is not None) == any(stop in "".join(pieces) for stop in stops)


def test_text_that_cannot_become_a_stop_string_is_not_held_back():
    matcher = StopMatcher(["END"])
    assert [matcher.push(character) for character in "aENEND"] == ["a", "", "", "EN", "", ""]
    assert matcher.found == "END"


def test_rest_starts_with_the_stop_string():
    matcher = StopMatcher(["<x"])
    assert matcher.push("a<") == "a"
    assert matcher.push("x>b") == ""
    assert matcher.rest == "<x>b"


@given(text=st.text("ab", min_size=0, max_size=2000))
def test_a_long_periodic_stop_string_is_matched(text):
    stop = "ab" * 200
    matcher = StopMatcher([stop])
    got = matcher.push(text)
    assert got + (matcher.rest or matcher.flush()) == text
    assert (matcher.found is not None) == (stop in text)


def test_reasoning_ends_at_its_token():
    output = OutputText(CharacterDecoder, reasoning_end_id=REASONING_END_ID)
    deltas = push_all(output, [ord("a"), ord("b"), REASONING_END_ID, ord("c")])
    assert texts(deltas) == {Channel.REASONING: "ab", Channel.CONTENT: "c"}
    assert output.num_reasoning_tokens == 2


def test_text_held_back_before_the_end_of_reasoning_stays_reasoning():
    output = OutputText(CharacterDecoder, stops=["xyz"], reasoning_end_id=REASONING_END_ID)
    deltas = push_all(output, [ord("x"), ord("y"), REASONING_END_ID, ord("z")])
    assert texts(deltas) == {Channel.REASONING: "xy", Channel.CONTENT: "z"}
    assert output.stopped_by is None


def test_hidden_tokens_give_no_text():
    output = OutputText(CharacterDecoder, hidden_ids=frozenset({HIDDEN_ID, REASONING_END_ID}))
    deltas = push_all(output, [ord("a"), HIDDEN_ID, REASONING_END_ID, ord("b")])
    assert texts(deltas)[Channel.CONTENT] == "ab"


def test_stop_strings_end_an_answer_and_are_not_shown():
    output = OutputText(CharacterDecoder, stops=["bc"])
    deltas = push_all(output, [ord(character) for character in "abcd"])
    assert texts(deltas)[Channel.CONTENT] == "a"
    assert output.stopped_by == "bc"


@pytest.mark.parametrize("stops", [[""], ["a"] * 17, ["a" * 1025]], ids=["empty", "many", "long"])
def test_stop_strings_out_of_bounds_are_refused(stops):
    with pytest.raises(RequestError, match="stop"):
        OutputText(CharacterDecoder, stops=stops)
