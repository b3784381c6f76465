"""Whatever is sent, the server answers 2xx or 4xx and goes on answering."""

from __future__ import annotations

import json
import random
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.serve.conftest import RunningServer, wait_until
from tests.serve.fakes import FakeRunner

PATHS = ("/v1/chat/completions", "/v1/completions")
VALID = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 3,
    },
    "/v1/completions": {"prompt": "hi", "max_tokens": 3},
}
FIELDS = (
    "messages", "prompt", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed",
    "stop", "stream", "stream_options", "n", "logprobs", "top_logprobs", "tools", "tool_choice",
    "response_format", "thinking", "enable_thinking", "reasoning_effort", "chat_template_kwargs",
    "ignore_eos", "echo", "suffix", "best_of", "logit_bias", "no such field", "\n", "",
)  # fmt: skip
SCALARS = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e308, 10**40, -(10**40), 2**63, "", "a", "\x00", "天", "none",
    "auto", "max", "</think>", "<｜DSML｜tool_calls>", "x" * 2000,
)  # fmt: skip
KEYS = (
    "role",
    "content",
    "type",
    "text",
    "function",
    "name",
    "include_usage",
    "thinking",
    "tools",
    "task",
    "x",
)


def random_value(source: random.Random, depth: int = 0) -> object:
    kind = source.random()
    if depth < 3 and kind < 0.2:
        return [random_value(source, depth + 1) for _ in range(source.randrange(4))]
    if depth < 3 and kind < 0.45:
        return {source.choice(KEYS): random_value(source, depth + 1) for _ in range(source.randrange(4))}
    if kind < 0.55:
        return source.choice(("user", "assistant", "system", "tool", "developer"))
    return source.choice(SCALARS)


def random_body(source: random.Random, path: str) -> bytes:
    body = dict(VALID[path])
    for _ in range(source.randrange(1, 4)):
        body[source.choice(FIELDS)] = random_value(source)
    raw = json.dumps(body).encode()
    if source.random() < 0.3:
        index = source.randrange(len(raw))
        raw = raw[:index] + source.randbytes(source.randrange(3)) + raw[index + source.randrange(3) :]
    return raw


def require_answering(server: RunningServer) -> None:
    wait_until(server.is_idle)
    assert server.http.get("/health").status_code == 200
    answer = server.post("/v1/chat/completions", **VALID["/v1/chat/completions"])
    assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize("path", PATHS)
def test_random_bodies_leave_it_answering(server, seed, path):
    source = random.Random(seed)
    statuses = set()
    for _ in range(300):
        body = random_body(source, path)
        response = server.http.post(path, content=body, headers={"content-type": "application/json"})
        assert response.status_code < 500, (body, response.text)
        assert response.status_code != 422
        if response.status_code >= 400:
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}
        statuses.add(response.status_code)
    assert {200, 400} <= statuses
    require_answering(server)


def test_parallel_requests_all_have_their_own_answer(server):
    def ask(index: int) -> tuple[int, str]:
        body = {"prompt": f"number {index % 10}", "max_tokens": 20, "temperature": 0}
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=20, trust_env=False)
        return index % 10, response.json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    assert len(set(answers)) == 10
    require_answering(server)


def test_clients_that_leave_free_their_sequences(serve):
    server = serve(FakeRunner(step_delay_s=0.005), max_num_seqs=4)
    for stream in (True, False) * 4:
        body = json.dumps({"prompt": "abc", "max_tokens": 400, "stream": stream, "ignore_eos": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: server.runner.num_open == 1)
            if stream:
                assert connection.recv(64).startswith(b"HTTP/1.1 200")
        wait_until(server.is_idle)
    require_answering(server)


def test_broken_http_leaves_it_answering(server, seed):
    source = random.Random(seed)
    host, port = server.url.removeprefix("http://").split(":")
    starts = (
        b"",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nffffffffff\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000,
    )
    for index in range(30):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            try:
                connection.sendall(starts[index % len(starts)] + source.randbytes(source.randrange(200)))
            except ConnectionError:
                continue
    require_answering(server)
