"""What holds for every conversation and for any text at all."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_v4.chat import PROTOCOL, encode_messages, parse_completion, special_tokens
from ascend_v4.errors import ChatFormatError, CompletionFormatError

MODES = ("chat", "thinking")
NAME_END = ('" string="true">', '" string="false">')
NEAR_MISSES = (
    "<", ">", "/", "｜", "DSML", '"', "\n", "\n\n", ">\n", '">\n', "think>", " name=", ' string="true"',
    "tool_calls", "parameter", "invoke", "</", "\\", "{}", "[", "天", "\x00", "\u2028",
)  # fmt: skip


def holds_no_protocol_string(text):
    return not any(token in text for token in (*special_tokens(), *NAME_END))


TEXTS = st.one_of(
    st.text(max_size=20),
    st.lists(st.sampled_from(NEAR_MISSES), max_size=8).map("".join),
).filter(holds_no_protocol_string)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    lambda name, arguments: {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments)},
    },
    TEXTS,
    st.dictionaries(TEXTS, JSON, max_size=3),
)
TURNS = st.fixed_dictionaries(
    {"content": TEXTS, "reasoning_content": TEXTS, "tool_calls": st.lists(CALLS, max_size=3)}
)
OPENINGS = st.sampled_from([
    [{"role": "user", "content": "q"}],
    [{"role": "system", "content": "s", "tools": [{"type": "function", "function": {"name": "f"}}]},
     {"role": "user", "content": "q"},
     {"role": "assistant", "content": "", "reasoning_content": "r",
      "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]},
     {"role": "tool", "tool_call_id": "x", "content": "1"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"},
     {"role": "developer", "content": "d"}],
])  # fmt: skip


def completion_of(opening, turn, mode):
    """What the assistant would have generated to make this turn."""
    asked = encode_messages(opening, thinking_mode=mode)
    whole = encode_messages([*opening, {**turn, "role": "assistant"}], thinking_mode=mode)
    assert whole.startswith(asked)
    return whole[len(asked) :]


def comparable(message):
    """A message with its arguments as values and without ids."""
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message["tool_calls"]
    ]
    return message["content"], message["reasoning_content"], calls


@pytest.mark.parametrize("mode", MODES)
@given(opening=OPENINGS, turn=TURNS)
def test_last_turn_encoded_and_parsed_is_that_turn(mode, opening, turn):
    parsed = parse_completion(completion_of(opening, turn, mode), thinking_mode=mode)
    rendered = turn if mode == "thinking" else {**turn, "reasoning_content": ""}
    assert comparable(parsed) == comparable(rendered)


UNICODE_PIECES = st.sampled_from([
    *special_tokens(), PROTOCOL.tool_calls_open, ">\n", "\n", "</｜DSML｜tool_calls>", "</｜DSML｜invoke>\n",
    '<｜DSML｜invoke name="f">\n', '<｜DSML｜parameter name="k" string="true">', "</｜DSML｜parameter>\n",
    '<｜DSML｜parameter name="k" string="false">', "/｜DSML｜parameter", "1", "[", "]", "NaN", '"', "a",
])  # fmt: skip
PIECES = st.one_of(UNICODE_PIECES, st.just("\ud800"))


def parsed_or_refused(text, mode):
    """The message, or what the parser's own error says."""
    try:
        return parse_completion(text, thinking_mode=mode)
    except CompletionFormatError as refusal:
        return str(refusal)


def require_sound(text, mode):
    """A text is refused with a reason, or its message encodes to a completion of the same meaning."""
    outcome = parsed_or_refused(text, mode)
    if isinstance(outcome, str):
        assert outcome.startswith("Malformed completion")
    else:
        completion = completion_of([{"role": "user", "content": "q"}], outcome, mode)
        again = parse_completion(completion, thinking_mode=mode)
        assert repr(comparable(again)) == repr(comparable(outcome))


ANY_TEXT = st.one_of(st.text(), st.lists(UNICODE_PIECES, max_size=20).map("".join))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=300)
@given(start=st.sampled_from(["", "r</think>"]), text=ANY_TEXT, end=st.sampled_from(["", PROTOCOL.eos]))
def test_any_text_is_parsed_or_refused(mode, start, text, end):
    require_sound(start + text + end, mode)


@pytest.mark.parametrize("mode", MODES)
@given(text=st.lists(st.one_of(PIECES, st.text(st.characters(), max_size=5)), max_size=20).map("".join))
def test_any_text_with_surrogates_is_parsed_or_refused(mode, text):
    outcome = parsed_or_refused(text, mode)
    assert isinstance(outcome, dict) or outcome.encode()


@pytest.mark.parametrize("mode", MODES)
@given(
    turns=st.lists(TURNS, min_size=2, max_size=2),
    cuts=st.tuples(*[st.floats(0, 1)] * 3),
    piece=st.one_of(UNICODE_PIECES, st.text(max_size=3)),
)
def test_spliced_completion_is_parsed_or_refused(mode, turns, cuts, piece):
    first, second = (completion_of([{"role": "user", "content": "q"}], turn, mode) for turn in turns)
    start, end, other = (int(cut * len(text)) for cut, text in zip(cuts, (first, first, second), strict=True))
    require_sound(first[:start] + piece + first[end:], mode)
    require_sound(first[:start] + piece + second[other:], mode)
    require_sound(first[:start], mode)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def objects(**fields):
    """Objects with some of these fields, now and then holding junk."""
    return st.fixed_dictionaries({}, optional={name: st.one_of(good, JUNK) for name, good in fields.items()})


FUNCTIONS = objects(
    name=TEXTS, arguments=st.one_of(TEXTS, JSON, JSON.map(json.dumps)), parameters=JUNK, id=TEXTS
)
PARTS = st.lists(objects(type=st.sampled_from(["text", "image_url"]), text=TEXTS), max_size=2)
MESSAGES = st.builds(
    lambda role, rest: {**rest, "role": role},
    st.one_of(
        st.sampled_from(["system", "developer", "user", "assistant", "tool", "latest_reminder"]),
        st.text(max_size=3),
        JUNK,
    ),
    st.fixed_dictionaries(
        {"content": st.one_of(TEXTS, TEXTS, PARTS, JUNK)},
        optional={
            "reasoning_content": TEXTS,
            "task": st.sampled_from([*PROTOCOL.tasks, None, "no task"]),
            "wo_eos": st.booleans(),
            "mask": JUNK,
            "tool_call_id": st.sampled_from(["x", "y", 1]),
            "tools": st.lists(objects(type=st.just("function"), function=FUNCTIONS), max_size=2),
            "tool_calls": st.lists(objects(id=st.sampled_from(["x", "y"]), function=FUNCTIONS), max_size=2),
            "response_format": JUNK,
        },
    ),
)


def encoded_or_refused(messages, **options):
    """The prompt, or what the encoder's own error says."""
    try:
        return encode_messages(messages, **options)
    except ChatFormatError as refusal:
        return str(refusal)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=300)
@given(
    messages=st.one_of(st.lists(MESSAGES, max_size=4), st.lists(st.one_of(MESSAGES, JUNK), max_size=3), JUNK),
    drop_thinking=st.booleans(),
    reasoning_effort=st.sampled_from([None, "high", "max"]),
)
def test_any_messages_are_encoded_or_refused(mode, messages, drop_thinking, reasoning_effort):
    kept = copy.deepcopy(messages)
    outcome = encoded_or_refused(
        messages, thinking_mode=mode, drop_thinking=drop_thinking, reasoning_effort=reasoning_effort
    )
    assert outcome.startswith((PROTOCOL.bos, "messages", "a key of messages"))
    assert outcome.encode()
    assert repr(messages) == repr(kept)
