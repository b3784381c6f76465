"""Rules of the prompt that the golden cases do not show, and every refusal."""

from __future__ import annotations

import copy
import json

import pytest

from ascend_v4.chat import encode_messages
from ascend_v4.errors import ChatFormatError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def user(content="q", **extra):
    return {"role": "user", "content": content, **extra}


def assistant(content="a", **extra):
    return {"role": "assistant", "content": content, **extra}


def developer(content="d", **extra):
    return {"role": "developer", "content": content, **extra}


def result(content, call_id):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def call(name="f", arguments="{}", **extra):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **extra}


def encode(*messages, mode="thinking", **options):
    return encode_messages(list(messages), thinking_mode=mode, add_bos=False, **options)


def invoke(parameters, name="f"):
    call_text = f'<｜DSML｜invoke name="{name}">\n{parameters}\n</｜DSML｜invoke>'
    return f"\n\n<｜DSML｜tool_calls>\n{call_text}\n</｜DSML｜tool_calls>"


def test_bos_starts_the_prompt_unless_left_out():
    with_bos = encode_messages([user()], thinking_mode="chat")
    without = encode_messages([user()], thinking_mode="chat", add_bos=False)
    assert with_bos == BOS + without == f"{BOS}{USER}q{ASSISTANT}</think>"


def test_no_messages_give_bos_alone_even_with_maximum_effort():
    assert encode_messages([], thinking_mode="thinking", reasoning_effort="max") == BOS


def test_messages_are_not_changed():
    messages = [
        {"role": "system", "content": "s", "tools": [TOOL], "response_format": {"type": "object"}},
        user(task="query"),
        assistant(tool_calls=[call(id="x", arguments={"k": [1]}), call(id="y")]),
        result([{"type": "text", "text": "two"}], "y"),
        result("one", "x"),
        user("more", task="action"),
    ]
    kept = copy.deepcopy(messages)
    encode(*messages)
    assert messages == kept


def test_developer_speaks_as_a_user_with_tools_and_format():
    prompt = encode(developer("d", tools=[TOOL], response_format={"type": "object"}), mode="chat")
    assert prompt.startswith(f"{USER}d\n\n## Tools\n\n")
    assert prompt.endswith(f'to reply:\n{{"type": "object"}}{ASSISTANT}</think>')


def test_developer_does_not_merge_with_the_users_around_it():
    assert encode(user("1"), developer("2"), user("3"), mode="chat") == (
        f"{USER}1{USER}2{USER}3{ASSISTANT}</think>"
    )


def test_earlier_developer_vanishes_when_thinking_is_dropped():
    prompt = encode(developer("old"), assistant("a", reasoning_content="r"), user("q"))
    assert prompt == f"a{EOS}{USER}q{ASSISTANT}<think>"


def test_last_developer_stays_and_opens_thinking():
    prompt = encode(user("q"), assistant("a", reasoning_content="r"), developer("d"))
    assert prompt == f"{USER}q{ASSISTANT}</think>a{EOS}{USER}d{ASSISTANT}<think>"


def test_earlier_developer_stays_in_chat_mode():
    prompt = encode(developer("old"), assistant("a"), user("q"), mode="chat")
    assert prompt == f"{USER}old{ASSISTANT}</think>a{EOS}{USER}q{ASSISTANT}</think>"


def test_dropping_leaves_the_last_turns_reasoning():
    prompt = encode(
        user("1"), assistant("a", reasoning_content="r1"), user("2"), assistant("b", reasoning_content="r2")
    )
    assert prompt == f"{USER}1{ASSISTANT}</think>a{EOS}{USER}2{ASSISTANT}<think>r2</think>b{EOS}"


def test_keeping_renders_all_reasoning():
    prompt = encode(user("1"), assistant("a", reasoning_content="r"), user("2"), drop_thinking=False)
    assert prompt == f"{USER}1{ASSISTANT}<think>r</think>a{EOS}{USER}2{ASSISTANT}<think>"


def test_tools_anywhere_keep_all_reasoning():
    prompt = encode(user("1"), assistant("a", reasoning_content="r"), developer("2", tools=[TOOL]))
    assert prompt.startswith(f"{USER}1{ASSISTANT}<think>r</think>a{EOS}{USER}2\n\n## Tools")


def test_tools_of_a_user_message_are_lost():
    assert encode(user("1"), assistant(), user("2", tools=[TOOL])) == encode(
        user("1"), assistant(), user("2")
    )


def test_reasoning_is_not_rendered_in_chat_mode():
    assert encode(user(), assistant("a", reasoning_content="r"), mode="chat") == (
        f"{USER}q{ASSISTANT}</think>a{EOS}"
    )


def test_wo_eos_leaves_the_turn_open():
    assert encode(user(), assistant("so far", wo_eos=True), mode="chat") == (
        f"{USER}q{ASSISTANT}</think>so far"
    )


def test_mask_changes_nothing():
    assert encode(user(mask=1), assistant(mask=0)) == encode(user(), assistant())


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_task_token_follows_the_message(task):
    assert encode(user(task=task)) == f"{USER}q<｜{task}｜>"


@pytest.mark.parametrize(("mode", "think"), [("chat", "</think>"), ("thinking", "<think>")])
def test_action_task_opens_the_assistants_turn(mode, think):
    assert encode(user(task="action"), mode=mode) == f"{USER}q{ASSISTANT}{think}<｜action｜>"


def test_answer_to_a_task_has_no_reasoning():
    prompt = encode(user(task="query"), assistant("a", reasoning_content="r"))
    assert prompt == f"{USER}q<｜query｜>a{EOS}"


def test_task_is_silent_before_another_question():
    assert encode(user("1", task="query"), user("2")) == f"{USER}1{USER}2{ASSISTANT}<think>"


def test_task_of_a_system_message_counts_where_the_assistant_follows():
    assert encode({"role": "system", "content": "s", "task": "title"}, assistant()) == f"s<｜title｜>a{EOS}"


def test_user_after_a_user_joins_the_turn():
    assert encode(user("1"), user("2"), mode="chat") == f"{USER}1\n\n2{ASSISTANT}</think>"


def test_appended_user_message_loses_its_own_task():
    assert encode(user("1"), user("2", task="query")) == f"{USER}1\n\n2{ASSISTANT}<think>"


def test_user_after_a_task_starts_a_turn_and_keeps_its_task():
    assert encode(user("1", task="query"), user("2", task="title")) == f"{USER}1{USER}2<｜title｜>"


def test_tool_result_joins_a_turn_that_carries_a_task():
    prompt = encode(user("1", task="query"), result("r", "x"))
    assert prompt == f"{USER}1\n\n<tool_result>r</tool_result><｜query｜>"


def test_tool_results_are_sorted_by_call_and_texts_stay():
    prompt = encode(
        user(),
        assistant("", tool_calls=[call(id="x"), call(id="y"), call(id="z")]),
        result("Z", "z"),
        user("between"),
        result("X", "x"),
        result("Y", "y"),
        mode="chat",
    )
    turn = prompt.rpartition(USER)[2]
    assert turn == (
        "<tool_result>X</tool_result>\n\nbetween\n\n<tool_result>Y</tool_result>\n\n<tool_result>Z</tool_result>"
        f"{ASSISTANT}</think>"
    )


def test_sort_of_tool_results_is_stable_and_unknown_calls_count_as_the_first():
    prompt = encode(
        assistant("", tool_calls=[call(id="x"), call(id="y")]),
        result("1", "y"),
        result("2", "unknown"),
        result("3", "x"),
        result("4", "y"),
        mode="chat",
    )
    order = [prompt.index(f"<tool_result>{text}<") for text in "2314"]
    assert order == sorted(order)


def test_order_of_calls_outlasts_an_assistant_that_calls_nothing():
    prompt = encode(
        assistant("", tool_calls=[call(id="x"), call(id="y")]),
        assistant("wait"),
        result("Y", "y"),
        result("X", "x"),
        mode="chat",
    )
    assert prompt.index("X</tool_result>") < prompt.index("Y</tool_result>")


def test_parts_of_a_list_are_paragraphs_and_others_are_named():
    parts = [
        {"type": "text", "text": "1"},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": "2"},
    ]
    joined = "1\n\n[Unsupported image_url]\n\n2"
    assert encode(user(parts), mode="chat") == f"{USER}{joined}{ASSISTANT}</think>"
    assert encode(result(parts, "x"), mode="chat") == (
        f"{USER}<tool_result>{joined}</tool_result>{ASSISTANT}</think>"
    )


def test_reminder_hands_over_to_the_assistant_before_it():
    prompt = encode(user("1"), {"role": "latest_reminder", "content": "now"}, user("2"), mode="chat")
    assert prompt == f"{USER}1{ASSISTANT}</think><｜latest_reminder｜>now{USER}2{ASSISTANT}</think>"


def test_effort_comes_after_bos_before_the_system_message():
    prompt = encode_messages(
        [{"role": "system", "content": "s"}, user()], thinking_mode="thinking", reasoning_effort="max"
    )
    assert prompt.startswith(f"{BOS}Reasoning Effort: Absolute maximum")
    assert prompt.endswith(f"left unchecked.\n\ns{USER}q{ASSISTANT}<think>")


@pytest.mark.parametrize(("mode", "effort"), [("thinking", "high"), ("thinking", None), ("chat", "max")])
def test_effort_is_silent_otherwise(mode, effort):
    assert encode(user(), mode=mode, reasoning_effort=effort) == encode(user(), mode=mode)


def test_call_without_arguments_has_an_empty_line():
    assert encode(assistant("a", tool_calls=[call()]), mode="chat") == f"a{invoke('')}{EOS}"


def test_strings_go_in_raw_and_the_rest_as_json():
    arguments = json.dumps({"s": 'a"<\n天', "n": 1.50, "l": [{"k": "天"}], "b": None})
    prompt = encode(assistant("", tool_calls=[call(arguments=arguments)]), mode="chat")
    assert prompt == EOS.join([
        invoke(
            '<｜DSML｜parameter name="s" string="true">a"<\n天</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="n" string="false">1.5</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="l" string="false">[{"k": "天"}]</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="b" string="false">null</｜DSML｜parameter>'
        ),
        "",
    ])  # fmt: skip


def test_arguments_may_be_an_object_already():
    as_text = encode(assistant("", tool_calls=[call(arguments='{"k": 1}')]))
    assert encode(assistant("", tool_calls=[call(arguments={"k": 1})])) == as_text


@pytest.mark.parametrize(
    "arguments",
    ["", "{", "not json", '{"k": "\\ud800"}', "[" * 100_000, '{"k": ' + "9" * 5_000 + "}"],
    ids=["empty", "cut", "words", "escaped surrogate", "deep", "long integer"],
)
def test_unparseable_arguments_become_one_parameter(arguments):
    prompt = encode(assistant("", tool_calls=[call(arguments=arguments)]), mode="chat")
    assert prompt == (
        invoke(f'<｜DSML｜parameter name="arguments" string="true">{arguments}</｜DSML｜parameter>') + EOS
    )


def test_nan_and_infinity_are_written_as_the_official_encoder_does():
    prompt = encode(assistant("", tool_calls=[call(arguments='{"k": [NaN, -Infinity, 1e999]}')]), mode="chat")
    assert 'string="false">[NaN, -Infinity, Infinity]<' in prompt


def test_tool_schemas_keep_their_key_order_one_per_line():
    tools = [
        {"type": "function", "function": {"z": 1, "name": "天", "a": "\n"}},
        {"type": "function", "function": {"name": "g"}},
    ]
    prompt = encode({"role": "system", "content": "s", "tools": tools})
    assert '\n\n{"z": 1, "name": "天", "a": "\\n"}\n{"name": "g"}\n\nYou MUST' in prompt


def nested(depth):
    value: object = 0
    for _ in range(depth):
        value = [value]
    return value


def looped():
    value: list[object] = []
    value.append(value)
    return value


REFUSED = {
    "not a list": ("hello", "messages is 'hello'"),
    "not an object": ([user(), 3], "messages[1] is 3"),
    "no role": ([{"content": "x"}], "messages[0].role is None"),
    "unknown role": ([user(), {"role": "function", "content": "x"}], "messages[1].role is 'function'"),
    "role of another type": ([{"role": ["user"]}], "messages[0].role is a list"),
    "content number": ([user(5)], "messages[0].content is 5"),
    "content object": ([user({"text": "x"})], "messages[0].content is a dict"),
    "part text": ([user(["x"])], "messages[0].content[0] is 'x'"),
    "part without type": ([user([{"text": "x"}])], "messages[0].content[0].type is missing"),
    "part text number": ([user([{"type": "text", "text": 1}])], "messages[0].content[0].text is 1"),
    "empty developer": ([developer("")], "messages[0].content is empty"),
    "empty reminder": ([{"role": "latest_reminder"}], "messages[0].content is missing"),
    "unknown task": ([user(task="sing")], "messages[0].task is 'sing'"),
    "task number": ([user(task=1)], "messages[0].task is 1"),
    "wo_eos text": ([assistant(wo_eos="yes")], "messages[0].wo_eos is 'yes'"),
    "reasoning list": ([assistant(reasoning_content=[])], "messages[0].reasoning_content is a list"),
    "tool id number": ([result("x", 7)], "messages[0].tool_call_id is 7"),
    "tools object": ([developer(tools={"a": 1})], "messages[0].tools is a dict"),
    "tool text": ([developer(tools=["f"])], "messages[0].tools[0] is 'f'"),
    "tool without function": ([developer(tools=[{}])], "messages[0].tools[0].function is missing"),
    "tool without name": (
        [developer(tools=[{"function": {}}])],
        "messages[0].tools[0].function.name is missing",
    ),
    "format text": ([developer(response_format="json")], "messages[0].response_format is 'json'"),
    "calls object": ([assistant(tool_calls={"a": 1})], "messages[0].tool_calls is a dict"),
    "call text": ([assistant(tool_calls=["f"])], "messages[0].tool_calls[0] is 'f'"),
    "call without function": (
        [assistant(tool_calls=[{"id": "x"}])],
        "messages[0].tool_calls[0].function is missing",
    ),
    "call without name": (
        [assistant(tool_calls=[{"function": {"arguments": "{}"}}])],
        "messages[0].tool_calls[0].function.name is missing",
    ),
    "call without arguments": (
        [assistant(tool_calls=[{"function": {"name": "f"}}])],
        "messages[0].tool_calls[0].function.arguments holds None",
    ),
    "arguments a JSON list": (
        [assistant(tool_calls=[call(arguments="[1]")])],
        "messages[0].tool_calls[0].function.arguments holds a list",
    ),
    "surrogate in content": ([user("ab\ud800")], "messages[0].content holds the lone surrogate U+D800"),
    "surrogate in tools": (
        [developer(tools=[{"function": {"name": "f", "\udfff": 1}}])],
        "messages[0].tools[0].function holds the lone surrogate U+DFFF",
    ),
    "deep format": ([developer(response_format={"k": nested(200_000)})], "is nested deeper than 128"),
    "looped format": ([developer(response_format={"k": looped()})], "is nested deeper than 128"),
    "huge integer": ([developer(response_format={"k": 10**5_000})], "more than 4000 digits"),
    "huge integer as content": ([user(10**5_000)], "messages[0].content is a int"),
    "deep role": ([{"role": nested(200_000)}], "messages[0].role is a list"),
    "not JSON": ([developer(response_format={"k": {1}})], "messages[0].response_format holds a set"),
    "key not text": (
        [developer(response_format={1: 2})],
        "messages[0].response_format has a key that is a int",
    ),
}


@pytest.mark.parametrize(("messages", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_messages_are_refused_with_their_place(messages, said):
    with pytest.raises(ChatFormatError) as refusal:
        encode_messages(messages, thinking_mode="chat")
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("mode", ["", "Thinking", None, 1, ["chat"]], ids=str)
def test_unknown_thinking_mode_is_refused(mode):
    with pytest.raises(ChatFormatError, match="thinking_mode is"):
        encode_messages([user()], thinking_mode=mode)


@pytest.mark.parametrize("effort", ["low", "", 3, ["max"]], ids=str)
def test_unknown_reasoning_effort_is_refused(effort):
    with pytest.raises(ChatFormatError, match=r"reasoning_effort is .*high.*max.*None"):
        encode_messages([user()], thinking_mode="chat", reasoning_effort=effort)
