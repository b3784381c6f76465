"""The `openai` Python client against a real server, used as its documentation says."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.serve.conftest import RunningServer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=20) as client:
        yield client


def test_the_client_chats(client):
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=8, seed=1)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens == 8


def test_the_client_streams_with_usage(client):
    stream = client.chat.completions.create(
        model="fake",
        messages=HELLO,
        max_completion_tokens=8,
        seed=1,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    whole = client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=8, seed=1, extra_body={"ignore_eos": True}
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_the_client_completes(client):
    answer = client.completions.create(model="fake", prompt="Once", max_tokens=5, logprobs=1, stop=["\x00"])
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)
    pieces = client.completions.create(model="fake", prompt=[1, 2, 3], max_tokens=5, stream=True)
    assert {piece.object for piece in pieces} == {"text_completion"}


def test_the_client_reads_logprobs(client):
    answer = client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert all(len(entry.top_logprobs) == 2 for entry in answer.choices[0].logprobs.content)


def test_the_client_lists_models(client):
    assert [model.id for model in client.models.list()] == ["fake", "other-name"]
    assert client.models.retrieve("fake").id == "fake"


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError) as wrong_model:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert wrong_model.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="fake", messages=HELLO, temperature=9)
    with pytest.raises(openai.APIError, match="not finite"):
        list(client.completions.create(model="fake", prompt=[299], stream=True))
