"""A real server on a free loopback port, over the fake runner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from ascend_v4.engine.engine import Engine
from ascend_v4.serve.app import create_app
from ascend_v4.serve.server import StoppingServer, bind
from ascend_v4.serve.service import Service
from tests.serve.fakes import FakeRunner, make_engine, make_service

DEADLINE_S = 20.0


def wait_until(is_true: Callable[[], bool], *, deadline_s: float = DEADLINE_S) -> None:
    """Wait for something that others do; fail after a while."""
    end_s = time.monotonic() + deadline_s
    while not is_true():
        assert time.monotonic() < end_s, "it did not come true in time"
        time.sleep(0.002)


@dataclass(kw_only=True)
class RunningServer:
    """A server in a thread, and what a test asks of it."""

    runner: FakeRunner
    engine: Engine
    service: Service
    url: str
    http: httpx.Client
    server: StoppingServer
    thread: threading.Thread

    def post(self, path: str, **body) -> httpx.Response:
        return self.http.post(path, json=body)

    def is_idle(self) -> bool:
        """Whether every request has given its cache space back."""
        return self.engine.num_unfinished == 0 and self.runner.num_open == 0


def start_server(runner: FakeRunner, *, api_key: str | None = None, **limits: int) -> RunningServer:
    engine = make_engine(runner, **limits)
    service = make_service(engine, api_key=api_key)
    listening = bind("127.0.0.1", 0)
    config = uvicorn.Config(create_app(service), log_config=None, timeout_graceful_shutdown=5)
    server = StoppingServer(config, service)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    http = httpx.Client(base_url=url, timeout=DEADLINE_S, trust_env=False)
    wait_until(lambda: server.started)
    return RunningServer(
        runner=runner, engine=engine, service=service, url=url, http=http, server=server, thread=thread
    )


def stop_server(running: RunningServer) -> None:
    running.runner.gate.set()
    running.http.close()
    running.server.should_exit = True
    running.thread.join(DEADLINE_S)
    assert not running.thread.is_alive()
    running.engine.stop()
    assert running.engine.join(DEADLINE_S)
    assert running.runner.num_open == 0
    assert running.runner.free_tokens == running.runner.cache_tokens


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server whose model is a hash; shared by a file, idle between its tests."""
    running = start_server(FakeRunner(), max_num_seqs=4, max_num_batched_tokens=64)
    yield running
    stop_server(running)


@pytest.fixture
def serve() -> Iterator[Callable[..., RunningServer]]:
    """Start servers of the test's own, stopped after it."""
    started: list[RunningServer] = []

    def start(runner: FakeRunner, **options) -> RunningServer:
        started.append(start_server(runner, **options))
        return started[-1]

    yield start
    for running in started:
        stop_server(running)


@pytest.fixture
def checkpoint(run_cli, tmp_path) -> Path:
    """A small random checkpoint of the test's own."""
    made = run_cli("make-checkpoint", tmp_path / "tiny", "--config", "tiny", "--tokenizer", "bytes")
    assert made.exit_code == 0, made.stderr
    return tmp_path / "tiny"
