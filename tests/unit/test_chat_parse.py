"""The parser's strictness, clause by clause."""

from __future__ import annotations

import json

import pytest

from ascend_v4.chat import parse_completion
from ascend_v4.errors import ChatFormatError, CompletionFormatError

EOS = "<｜end▁of▁sentence｜>"
OPEN = "\n\n<｜DSML｜tool_calls>\n"
CLOSE = "\n</｜DSML｜tool_calls>"


def parse(text, mode="chat"):
    return parse_completion(text, thinking_mode=mode)


def parameter(name, value, *, string):
    return f'<｜DSML｜parameter name="{name}" string="{string}">{value}</｜DSML｜parameter>'


def invoke(*parameters, name="f"):
    lines = "\n".join(parameters)
    return f'<｜DSML｜invoke name="{name}">\n{lines}\n</｜DSML｜invoke>'


def calls(*invokes):
    return OPEN + "\n".join(invokes) + CLOSE + EOS


def arguments_of(text):
    (call,) = parse(text)["tool_calls"]
    return call["function"]["arguments"]


def test_absent_parts_are_empty_and_no_id_is_invented():
    assert parse(EOS) == {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": []}
    assert parse(calls(invoke()))["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]


def test_reasoning_ends_where_thinking_ends():
    message = parse(f"why\n</think>\nso{EOS}", "thinking")
    assert (message["reasoning_content"], message["content"]) == ("why\n", "\nso")


def test_call_without_arguments_may_lack_the_empty_line():
    assert arguments_of(OPEN + '<｜DSML｜invoke name="f">\n</｜DSML｜invoke>' + CLOSE + EOS) == "{}"


def test_text_is_json_encoded_and_json_is_passed_on_as_written():
    text = calls(invoke(parameter("s", 'a"\n天', string="true"), parameter("n", " 1.50e0", string="false")))
    assert arguments_of(text) == '{"s": "a\\"\\n天", "n":  1.50e0}'


def test_quotes_and_angles_in_names_and_texts_survive():
    text = calls(invoke(parameter('k"<', 'v" string="false">', string="true"), name='f">'))
    (call,) = parse(text)["tool_calls"]
    assert call["function"] == {"name": 'f">', "arguments": '{"k\\"<": "v\\" string=\\"false\\">"}'}


def test_long_numbers_are_passed_on():
    digits = "9" * 5_000
    assert arguments_of(calls(invoke(parameter("n", digits, string="false")))) == f'{{"n": {digits}}}'


def test_nan_and_infinity_are_passed_on_as_the_encoder_writes_them():
    text = calls(invoke(parameter("n", "[NaN, -Infinity]", string="false")))
    assert arguments_of(text) == '{"n": [NaN, -Infinity]}'


def test_lone_surrogates_of_a_completion_are_passed_on():
    assert parse(f"a\ud800{EOS}")["content"] == "a\ud800"
    assert json.loads(arguments_of(calls(invoke(parameter("k", "\ud800", string="true"))))) == {"k": "\ud800"}


def test_protocol_strings_inside_an_argument_belong_to_it():
    text = calls(invoke(parameter("k", "<think><｜DSML｜invoke>", string="true")))
    assert json.loads(arguments_of(text)) == {"k": "<think><｜DSML｜invoke>"}


def test_deepest_json_is_passed_on():
    value = "[" * 129 + "]" * 129
    assert arguments_of(calls(invoke(parameter("k", value, string="false")))) == f'{{"k": {value}}}'


def test_long_adversarial_texts_are_read():
    many = 20_000
    text = calls(*[invoke()] * many, invoke(*(parameter(f"p{k}", "<", string="true") for k in range(many))))
    message = parse("\n\n<" * many + "</｜" * many + text)
    assert len(message["tool_calls"]) == many + 1


MALFORMED = {
    "no end token": ("hello", "chat", "end token <｜end▁of▁sentence｜> is missing"),
    "empty": ("", "chat", "is missing"),
    "thinking never ends": (f"hello{EOS}", "thinking", "</think> is missing"),
    "calls inside thinking": (calls(invoke()), "thinking", "</think> is missing"),
    "calls in thinking, then its end": (f"a{OPEN}b</think>c{EOS}", "thinking", "</think> is missing"),
    "text behind the end": (f"a{EOS}b", "chat", "text behind the end token"),
    "two end tokens": (f"a{EOS}{EOS}", "chat", "text behind the end token"),
    "text behind the end of calls": (calls(invoke()) + "\n", "chat", "text behind the end token"),
    "text after calls": (OPEN + invoke() + CLOSE + "more" + EOS, "chat", "expected '<｜end▁of▁sentence｜>'"),
    "calls without end token": (OPEN + invoke() + CLOSE, "chat", "found the end"),
    "cut at the block": ("a\n\n<｜DSML｜tool_calls", "chat", "found the end"),
    "cut in a call": (OPEN + '<｜DSML｜invoke name="f">\n', "chat", "not closed"),
    "cut behind a call": (OPEN + invoke(), "chat", "expected '>\\n'"),
    "cut in a parameter": (
        OPEN + '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a',
        "chat",
        "not closed",
    ),
    "end token in a parameter": (
        OPEN + f'<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="true">b{EOS}',
        "chat",
        "not closed",
    ),
    "no line break in the block": (calls(invoke()).replace("calls>\n", "calls> "), "chat", "expected '>\\n'"),
    "text before a call": (calls("x" + invoke()), "chat", "expected '<｜DSML｜invoke'"),
    "blank line between calls": (calls(invoke(), "", invoke()), "chat", "expected '<｜DSML｜invoke'"),
    "call without name": (
        calls(invoke()).replace('name="f"', "f"),
        "chat",
        'must start with name="..."',
    ),
    "name without its word": (
        calls(invoke()).replace('name="f"', 'f"'),
        "chat",
        'must start with name="..."',
    ),
    "name without quote": (
        calls(invoke()).replace('name="f"', 'name="'),
        "chat",
        'must start with name="..."',
    ),
    "name without line break": (
        calls(invoke(parameter("a", "b", string="true"))).replace('"f">\n', '"f">'),
        "chat",
        'must start with name="..."',
    ),
    "parameter without string": (
        calls(invoke(parameter("a", "b", string="true"))).replace(' string="true"', ""),
        "chat",
        'string="true|false"',
    ),
    "string neither true nor false": (
        calls(invoke(parameter("a", "b", string="maybe"))),
        "chat",
        'string="true|false"',
    ),
    "two blanks before a name": (
        calls(invoke(parameter("a", "b", string="true"))).replace("parameter name", "parameter  name"),
        "chat",
        "expected ' name=\"'",
    ),
    "half a closing tag": (
        calls(invoke(parameter("a", "b/｜DSML｜parameter", string="true"))),
        "chat",
        "a parameter is not closed",
    ),
    "no line break after a parameter": (
        calls(invoke(parameter("a", "b", string="true") + " ")),
        "chat",
        "expected '>\\n'",
    ),
    "text after a parameter": (
        calls(invoke(parameter("a", "b", string="true"), "c")),
        "chat",
        "expected '</｜DSML｜invoke'",
    ),
    "duplicate parameter": (
        calls(invoke(parameter("a", "b", string="true"), parameter("a", "1", string="false"))),
        "chat",
        "the parameter 'a' is given twice",
    ),
    "not JSON": (calls(invoke(parameter("a", "b", string="false"))), "chat", "marked as JSON and is not"),
    "no JSON": (calls(invoke(parameter("a", "", string="false"))), "chat", "marked as JSON and is not"),
    "more than one JSON value": (
        calls(invoke(parameter("a", '1, "b": 2', string="false"))),
        "chat",
        "marked as JSON and is not",
    ),
    "deep JSON": (calls(invoke(parameter("a", "[" * 200_000, string="false"))), "chat", "nested deeper than"),
    "closed deep JSON": (
        calls(invoke(parameter("a", "[" * 130 + "]" * 130, string="false"))),
        "chat",
        "nested deeper than 128",
    ),
}


@pytest.mark.parametrize(("text", "mode", "said"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_completion_is_refused_with_its_place(text, mode, said):
    with pytest.raises(CompletionFormatError) as refusal:
        parse(text, mode)
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("token", ["<｜begin▁of▁sentence｜>", "<think>", "</think>", "｜DSML｜"])
def test_special_token_inside_content_is_refused(token):
    with pytest.raises(CompletionFormatError, match=f"content holds {token}"):
        parse(f"a{token}b{EOS}")


@pytest.mark.parametrize("token", ["<｜begin▁of▁sentence｜>", EOS, "<think>", "｜DSML｜"])
def test_special_token_inside_reasoning_is_refused(token):
    with pytest.raises(CompletionFormatError, match=f"reasoning holds {token}"):
        parse(f"a{token}b</think>c{EOS}", "thinking")


def test_completion_that_is_not_text_is_refused():
    with pytest.raises(CompletionFormatError, match="must be text"):
        parse(None)


def test_unknown_thinking_mode_is_the_callers_error():
    with pytest.raises(ChatFormatError, match="thinking_mode is 'auto'"):
        parse(EOS, "auto")
