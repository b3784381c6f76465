"""kill -9 at any moment: the next run goes on, and ends with the bytes of one that was never killed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascend_v4.errors import CheckpointError
from ascend_v4.repack.journal import JOURNAL_FILE
from ascend_v4.repack.manifest import MANIFEST_FILE
from ascend_v4.repack.verify import verify_output
from tests.repack.packs import tree

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 50
MAX_CALLS = 160
"""A whole run makes about so many of the calls that are counted."""

MAX_SECONDS = 0.15


class KillServer:
    """Sends orders to kill_server.py."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.repack.kill_server"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, output: Path, **kill) -> int:
        """Exit status of a repack: 0, or minus the signal."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"source": str(self.source), "output": str(output), **kill}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server(source) -> Iterator[KillServer]:
    started = KillServer(source)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("whole") / "out"
    assert server.run(output) == 0
    return tree(output)


def is_finished(output: Path) -> bool:
    return (output / MANIFEST_FILE).exists() and not (output / JOURNAL_FILE).exists()


def go_on_until_finished(server: KillServer, output: Path, kills: Iterator[dict]) -> int:
    """Kill one run after the other on the same output, then let one finish; how many died."""
    died = 0
    for kill in kills:
        if is_finished(output):
            break
        status = server.run(output, **kill)
        assert status in (0, -signal.SIGKILL)
        died += status != 0
        if not (output / MANIFEST_FILE).exists() and output.exists():
            with pytest.raises(CheckpointError):
                verify_output(output)
    if not is_finished(output):
        assert server.run(output) == 0
    return died


def test_killed_at_any_call_a_repack_ends_with_the_same_bytes(server, whole, tmp_path, seed):
    draw = random.Random(seed)
    died = 0
    for attempt in range(4 * NUM_KILLS):
        if died >= NUM_KILLS:
            break
        output = tmp_path / str(attempt)
        kills = iter([{"calls": draw.randrange(MAX_CALLS)} for _ in range(3)])
        died += go_on_until_finished(server, output, kills)
        assert tree(output) == whole
    assert died >= NUM_KILLS


def test_killed_at_any_moment_a_repack_ends_with_the_same_bytes(server, whole, tmp_path, seed):
    draw = random.Random(seed)
    died = 0
    for attempt in range(10):
        output = tmp_path / str(attempt)
        kills = iter([{"seconds": draw.uniform(0, MAX_SECONDS)} for _ in range(3)])
        died += go_on_until_finished(server, output, kills)
        assert tree(output) == whole
    assert died > 0
