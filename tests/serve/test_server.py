"""Starting and ending the server: lengths, ports, readiness, and signals to the real command line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ascend_v4.engine.scheduler import SchedulerLimits
from ascend_v4.errors import ConfigError
from ascend_v4.serve.app import create_app
from ascend_v4.serve.server import ServeConfig, bind, resolve_lengths
from tests.serve.conftest import wait_until
from tests.serve.fakes import make_service

START_DEADLINE_S = 60.0


def config(**fields) -> ServeConfig:
    return ServeConfig(checkpoint=Path("model"), limits=SchedulerLimits(), **fields)


@pytest.mark.parametrize(
    ("fields", "model_tokens", "want"),
    [
        ({}, 4096, (4096, 16384)),
        ({}, 1 << 20, (32768, 131072)),
        ({"max_model_tokens": 100}, 4096, (100, 400)),
        ({"cache_tokens": 1000}, 4096, (1000, 1000)),
        ({"max_model_tokens": 1 << 20, "cache_tokens": 1 << 21}, 1 << 20, (1 << 20, 1 << 21)),
    ],
    ids=str,
)
def test_lengths_follow_the_model(fields, model_tokens, want):
    assert resolve_lengths(config(**fields), model_tokens=model_tokens) == want


@pytest.mark.parametrize(
    "fields",
    [{"max_model_tokens": 4097}, {"max_model_tokens": 1}, {"max_model_tokens": 100, "cache_tokens": 99}],
    ids=str,
)
def test_lengths_that_contradict_are_refused(fields):
    with pytest.raises(ConfigError, match="--"):
        resolve_lengths(config(**fields), model_tokens=4096)


def test_a_busy_port_is_a_clear_error():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}"):
            bind("127.0.0.1", port)


def test_an_unknown_host_is_a_clear_error():
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid"):
        bind("no.such.host.invalid", 0)


def test_nothing_is_ready_before_the_model_is():
    import asyncio

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(make_service(None)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            chat = {"messages": [{"role": "user", "content": "a"}]}
            return [
                await client.get("/health"),
                await client.get("/v1/models"),
                await client.post("/v1/chat/completions", json=chat),
            ]

    health, models, chat = asyncio.run(ask())
    assert (health.status_code, models.status_code, chat.status_code) == (503, 200, 503)
    assert "still loading" in chat.json()["error"]["message"]


class ServeProcess:
    """`ascend-v4 serve` as a user starts it, its stderr read by a thread."""

    def __init__(self, checkpoint: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "ascend_v4", "serve", str(checkpoint), "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += iter(self.process.stderr.readline, "")

    @property
    def url(self) -> str | None:
        found = re.search(r"Listening on (\S+)", "".join(self.lines))
        return found.group(1) if found else None

    def status(self) -> int | None:
        try:
            return httpx.get(f"{self.url}/health", trust_env=False).status_code if self.url else None
        except httpx.TransportError:
            return None

    def end(self, signal_number: int | None = None) -> tuple[int, str, str]:
        """Exit status, stdout and stderr after an optional signal."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        status = self.process.wait(START_DEADLINE_S)
        self._reader.join(START_DEADLINE_S)
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        stdout = self.process.stdout.read()
        self.process.stdout.close()
        self.process.stderr.close()
        return status, stdout, "".join(self.lines)


@pytest.fixture
def start() -> Iterator:
    """Start serve processes; whatever is left of them is killed."""
    started: list[ServeProcess] = []

    def start_process(checkpoint: Path, *flags: str) -> ServeProcess:
        started.append(ServeProcess(checkpoint, *flags))
        return started[-1]

    yield start_process
    for process in started:
        if process.process.poll() is None:
            process.process.kill()
            process.end()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly_while_a_stream_runs(start, checkpoint, signal_number):
    serving = start(checkpoint, "--served-model-name", "small")
    wait_until(lambda: serving.status() == 200, deadline_s=START_DEADLINE_S)
    body = {"model": "small", "prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True}
    url = f"{serving.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=START_DEADLINE_S, trust_env=False) as response:
        lines = response.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        status, stdout, stderr = serving.end(signal_number)
        rest = list(lines)

    assert first["model"] == "small"
    assert status == 0, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "Application startup complete." in stderr
    assert any("shutting down" in line for line in rest)
    assert rest[-2] == "data: [DONE]"


def test_a_signal_ends_it_while_the_model_loads(start, checkpoint):
    serving = start(checkpoint)
    wait_until(lambda: "Application startup complete." in "".join(serving.lines), deadline_s=START_DEADLINE_S)
    status, _, stderr = serving.end(signal.SIGINT)
    assert status == 0, stderr
    assert "Traceback" not in stderr


def test_a_checkpoint_that_does_not_load_ends_it_with_one_error(start, checkpoint):
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    status, stdout, stderr = start(checkpoint).end()
    assert status == 2
    assert stdout == ""
    assert "Traceback" not in stderr
    assert "error: " in stderr


def test_a_checkpoint_without_tokenizer_is_refused_at_once(run_cli, checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    refused = run_cli("serve", checkpoint, "--port", "0")
    assert refused.exit_code == 2
    assert "--tokenizer PATH" in refused.stderr
