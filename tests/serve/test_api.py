"""The HTTP API: answers, streams, refusals in OpenAI's shape."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from ascend_v4.chat import PROTOCOL, encode_messages
from tests.serve.conftest import RunningServer, wait_until
from tests.serve.fakes import (
    EOS_ID,
    FAILING_ID,
    NAN_ID,
    SPECIALS,
    THINK_END_ID,
    FakeRunner,
    FakeTokenizer,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
CALL_TEXT = (
    f'Look.{PROTOCOL.tool_calls_open}>\n<{PROTOCOL.dsml}invoke name="f">\n'
    f'<{PROTOCOL.dsml}parameter name="x" string="false">1</{PROTOCOL.dsml}parameter>\n'
    f"</{PROTOCOL.dsml}invoke>\n</{PROTOCOL.dsml}tool_calls>"
)


def chunks_of(response: httpx.Response) -> list[dict]:
    """The JSON of each server-sent event; the stream must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks: list[dict], field: str) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get(field) or "" for delta in deltas)


def require_refusal(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return error


@pytest.fixture
def scripted(serve):
    """A server whose model says a given text, token by token."""

    def start(text: str, *more_ids: int) -> RunningServer:
        script = [*FakeTokenizer().encode(text), *more_ids]
        # The script counts forward passes, so the whole prompt must fit into one.
        runner = FakeRunner(script=script, max_sequence_tokens=8192, cache_tokens=8192)
        return serve(runner, max_num_batched_tokens=8192)

    return start


# Answers


def test_a_chat_answer_has_openai_s_form(server):
    body = server.post(CHAT, messages=HELLO, max_tokens=5, temperature=0).json()
    prompt = encode_messages(HELLO, thinking_mode="chat")
    assert body["object"] == "chat.completion"
    assert body["model"] == "fake"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] == "length"
    num_prompt_tokens = len(FakeTokenizer().encode(prompt))
    assert body["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": 5,
        "total_tokens": num_prompt_tokens + 5,
    }


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["e"]}], ids=str)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_streamed_chat_says_what_the_whole_answer_says(server, extra, thinking):
    fields = {"messages": HELLO, "max_tokens": 60, "seed": 3, "thinking": thinking, **extra}
    whole = server.post(CHAT, **fields).json()
    chunks = chunks_of(server.post(CHAT, stream=True, stream_options={"include_usage": True}, **fields))
    message = whole["choices"][0]["message"]
    assert joined(chunks, "content") == message["content"]
    assert joined(chunks, "reasoning_content") == message.get("reasoning_content", "")
    assert joined(chunks, "reasoning") == message.get("reasoning", "")
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    entries = [
        entry
        for chunk in chunks
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {}).get("content", [])
    ]
    assert entries == ((whole["choices"][0]["logprobs"] or {}).get("content") or [])


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"stop": "e"}, {"ignore_eos": True}], ids=str)
def test_a_streamed_completion_says_what_the_whole_answer_says(server, extra):
    fields = {"prompt": ["one", [5, 6, 7]], "max_tokens": 40, "seed": 4, **extra}
    whole = server.post(COMPLETIONS, **fields).json()
    chunks = chunks_of(
        server.post(COMPLETIONS, stream=True, stream_options={"include_usage": True}, **fields)
    )
    assert len(whole["choices"]) == 2
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        for name in choice["logprobs"] or {}:
            assert [entry for part in parts for entry in part["logprobs"][name]] == choice["logprobs"][name]
    assert chunks[-1]["usage"] == whole["usage"]


def test_streams_without_include_usage_have_no_usage(server):
    chunks = chunks_of(server.post(CHAT, messages=HELLO, max_tokens=3, stream=True))
    assert not any("usage" in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)


def test_logprobs_have_one_entry_per_token(server):
    body = server.post(
        CHAT, messages=HELLO, max_tokens=6, ignore_eos=True, logprobs=True, top_logprobs=3
    ).json()
    entries = body["choices"][0]["logprobs"]["content"]
    assert len(entries) == 6
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"]
        assert len(entry["bytes"]) >= 1


def test_the_same_seed_repeats_and_another_does_not(server):
    texts = [
        server.post(COMPLETIONS, prompt="abc", max_tokens=30, seed=seed).json()["choices"][0]["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_reasoning_comes_apart_under_both_names(scripted):
    server = scripted("Why not.</think>Because.", EOS_ID)
    body = server.post(CHAT, messages=HELLO, thinking={"type": "enabled"}, temperature=0).json()
    message = body["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "Why not."
    assert message["content"] == "Because."
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("Why not.")}


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False),
        ({"thinking": True}, True),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, False),
        ({"enable_thinking": True}, True),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "low"}, True),
        ({"reasoning_effort": "max"}, True),
        ({"reasoning_effort": "none"}, False),
    ],
    ids=str,
)
def test_thinking_is_off_unless_asked_for(server, fields, thinks):
    body = server.post(CHAT, messages=HELLO, max_tokens=1, **fields).json()
    prompt = encode_messages(
        HELLO,
        thinking_mode="thinking" if thinks else "chat",
        reasoning_effort="max" if fields.get("reasoning_effort") == "max" else None,
    )
    assert body["usage"]["prompt_tokens"] == len(FakeTokenizer().encode(prompt))
    assert ("reasoning_content" in body["choices"][0]["message"]) is thinks


def test_special_tokens_never_reach_the_content(scripted):
    server = scripted("a", *SPECIALS.values(), ord("b"))
    body = server.post(
        CHAT, messages=HELLO, max_tokens=len(SPECIALS) + 2, ignore_eos=True, temperature=0
    ).json()
    assert body["choices"][0]["message"]["content"] == "ab"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls_are_parsed(scripted, stream):
    server = scripted(CALL_TEXT, EOS_ID)
    response = server.post(CHAT, messages=HELLO, tools=TOOLS, temperature=0, stream=stream)
    if stream:
        chunks = chunks_of(response)
        calls = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
        content, reason = joined(chunks, "content"), chunks[-1]["choices"][0]["finish_reason"]
        assert [call.pop("index") for call in calls] == [0]
    else:
        choice = response.json()["choices"][0]
        calls, content = choice["message"]["tool_calls"], choice["message"]["content"]
        reason = choice["finish_reason"]
    assert (content, reason) == ("Look.", "tool_calls")
    assert len(calls) == 1
    assert calls[0].pop("id").startswith("call_")
    assert calls == [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_tool_call_is_content(scripted, stream):
    text = CALL_TEXT.replace("invoke>\n", "invoke>")
    server = scripted(text, EOS_ID)
    response = server.post(CHAT, messages=HELLO, tools=TOOLS, temperature=0, stream=stream)
    if stream:
        chunks = chunks_of(response)
        assert joined(chunks, "content") == text
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        choice = response.json()["choices"][0]
        assert choice["message"]["content"] == text
        assert choice["finish_reason"] == "stop"


def test_tools_reach_the_prompt_unless_the_choice_is_none(server):
    def num_prompt_tokens(**fields) -> int:
        return server.post(CHAT, messages=HELLO, max_tokens=1, **fields).json()["usage"]["prompt_tokens"]

    plain = num_prompt_tokens()
    assert num_prompt_tokens(tools=TOOLS, tool_choice="none") == plain
    # The fake context is short; the refusal tells how long the prompt would be.
    error = require_refusal(server.post(CHAT, messages=HELLO, tools=TOOLS), 400)
    assert "this model's context holds 512" in error["message"]


def test_a_json_schema_is_told_to_the_model_and_not_enforced(scripted):
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    response_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    response = scripted("no", EOS_ID).post(CHAT, messages=HELLO, response_format=response_format)
    told: list[dict] = [{"role": "system", "content": "", "response_format": schema}, *HELLO]
    prompt = encode_messages(told, thinking_mode="chat")
    assert response.json()["usage"]["prompt_tokens"] == len(FakeTokenizer().encode(prompt))
    assert response.headers["x-ascend-v4-ignored"] == "response_format"


def test_fields_without_effect_are_named_in_a_header(server):
    response = server.post(
        COMPLETIONS,
        prompt="a",
        max_tokens=1,
        top_k=40,
        frequency_penalty=0,
        user="me",
        **{"a\r\nb": 1, "what": 2},
    )
    assert response.status_code == 200
    assert response.headers["x-ascend-v4-ignored"] == "top_k, what"
    plain = server.post(COMPLETIONS, prompt="a", max_tokens=1)
    assert "x-ascend-v4-ignored" not in plain.headers


def test_models_are_listed_and_found(server):
    names = [card["id"] for card in server.http.get("/v1/models").json()["data"]]
    assert names == ["fake", "other-name"]
    assert server.http.get("/v1/models/other-name").json()["id"] == "other-name"
    assert server.post(COMPLETIONS, model="other-name", prompt="a").json()["model"] == "other-name"
    require_refusal(server.http.get("/v1/models/nobody/else"), 404)


def test_version_and_health_answer(server):
    assert server.http.get("/health").status_code == 200
    assert set(server.http.get("/version").json()) == {"version"}


# Refusals


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": []}, "stream_options"),
        ({"model": 7}, "model"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_bad_value_is_named(server, path, fields, param):
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": "a"}
    assert require_refusal(server.post(path, **prompt, **fields), 400)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 80]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": "a" * 600}, "prompt"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "logprobs": 99}, "logprobs"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_completion_is_refused(server, fields, param):
    assert require_refusal(server.post(COMPLETIONS, **fields), 400)["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"messages": []},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"role": "wizard", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": HELLO, "tools": "all"},
        {"messages": HELLO, "tools": [5]},
        {"messages": HELLO, "tools": TOOLS, "tool_choice": "required"},
        {"messages": HELLO, "tool_choice": 5},
        {"messages": HELLO, "response_format": {"type": "poem"}},
        {"messages": HELLO, "response_format": {"type": "json_schema"}},
        {"messages": HELLO, "reasoning_effort": "huge"},
        {"messages": HELLO, "thinking": "yes"},
        {"messages": HELLO, "thinking": {"type": "perhaps"}},
        {"messages": HELLO, "chat_template_kwargs": 5},
        {"messages": HELLO, "top_logprobs": 3},
    ],
    ids=str,
)
def test_a_bad_chat_is_refused(server, fields):
    require_refusal(server.post(CHAT, **fields), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": ' + b"[" * 80 + b"]" * 80 + b"}",
        b'{"a":' * 50_000,
    ],
    ids=lambda body: repr(body[:24]),
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_not_a_json_object_is_refused(server, path, body):
    response = server.http.post(path, content=body, headers={"content-type": "application/json"})
    require_refusal(response, 400)


def test_another_content_type_is_refused(server):
    response = server.http.post(COMPLETIONS, content=b"prompt=a", headers={"content-type": "text/plain"})
    require_refusal(response, 415)


def test_a_large_body_is_refused_before_it_is_read(server):
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1099511627776\r\n\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        # Only the announcement is sent: the answer must come without the body.
        connection.sendall(head.encode())
        assert connection.recv(64).startswith(b"HTTP/1.1 413")


def test_a_large_body_without_a_length_is_refused(server, monkeypatch):
    monkeypatch.setattr("ascend_v4.serve.app.read_body", _read_at_most_100_bytes)
    pieces = (b"x" * 60 for _ in range(5))
    response = server.http.post(COMPLETIONS, content=pieces, headers={"content-type": "application/json"})
    require_refusal(response, 413)


async def _read_at_most_100_bytes(request):
    from ascend_v4.serve.bodies import read_body

    return await read_body(request, max_bytes=100)


def test_unknown_paths_methods_and_models_are_refused(server):
    require_refusal(server.http.get("/nowhere"), 404)
    require_refusal(server.http.get(CHAT), 405)
    error = require_refusal(server.post(COMPLETIONS, model="gpt", prompt="a"), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_a_prompt_above_the_context_names_both_numbers(server):
    error = require_refusal(server.post(COMPLETIONS, prompt="a" * 600), 400)
    assert "600" in error["message"]
    assert "512" in error["message"]


def test_a_failure_of_the_model_is_a_server_error(server):
    require_refusal(server.post(COMPLETIONS, prompt=[FAILING_ID]), 500)
    error = require_refusal(server.post(COMPLETIONS, prompt=[NAN_ID]), 500)
    assert "not finite" in error["message"]
    chunks = chunks_of(server.post(COMPLETIONS, prompt=[NAN_ID], stream=True))
    assert chunks[-1]["error"]["type"] == "server_error"


def test_the_key_is_asked_for_when_there_is_one(serve):
    server = serve(FakeRunner(), api_key="sesame")
    require_refusal(server.post(COMPLETIONS, prompt="a"), 401)
    require_refusal(server.http.get("/v1/models", headers={"authorization": "Bearer simsim"}), 401)
    assert server.http.get("/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200
    assert server.http.get("/health").status_code == 200


def test_a_full_queue_answers_429(serve):
    server = serve(FakeRunner(), max_num_seqs=1, max_waiting=1)
    server.runner.gate.clear()
    streams = []
    for _ in range(2):
        request = server.http.build_request("POST", COMPLETIONS, json={"prompt": "a", "stream": True})
        streams.append(server.http.send(request, stream=True))
        wait_until(lambda: server.runner.num_open == 1)
    response = server.post(COMPLETIONS, prompt="a")
    assert require_refusal(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"
    server.runner.gate.set()
    for stream in streams:
        assert "[DONE]" in stream.read().decode()


def test_think_end_is_one_token_of_the_fake():
    assert FakeTokenizer().encode("</think>") == [THINK_END_ID]
