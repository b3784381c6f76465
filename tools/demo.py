"""The whole way once: make a small checkpoint, serve it, ask it one streamed question, stop the server.

Run by `make demo` with the project's own Python. Everything happens in a temporary folder and on a free local
port; any failure ends with a non-zero status after the server is stopped.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai

START_SECONDS = 180.0
STOP_SECONDS = 20.0
ANSWER_TOKENS = 64
QUESTION = "What does a sliding window of 128 tokens buy?"
LAST_LINES = 20


class DemoError(Exception):
    """A step did not do what it should; printed as one message."""


def main() -> int:
    """Make, serve, ask, stop; 0 when all four worked."""
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with tempfile.TemporaryDirectory(prefix="ascend-v4-demo-") as folder:
            checkpoint = Path(folder) / "checkpoint"
            step("making a small random checkpoint (configs/model/tiny.yaml)")
            make_checkpoint(checkpoint)
            step("starting the server")
            with server(checkpoint, log=Path(folder) / "server.log") as url:
                step(f"asking, through the openai client at {url}: {QUESTION}")
                ask(url)
            step("server stopped; done")
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def step(text: str) -> None:
    """One progress line."""
    print(f"[demo] {text}", flush=True)


def make_checkpoint(path: Path) -> None:
    """A checkpoint of the tiny model with the byte tokenizer, by the same command a user would type."""
    command = ["make-checkpoint", str(path), "--config", "tiny", "--tokenizer", "bytes"]
    done = subprocess.run([sys.executable, "-m", "ascend_v4", *command], check=False)
    if done.returncode != 0:
        raise DemoError(
            f"'ascend-v4 {' '.join(command)}' ended with {done.returncode}; its message is above."
        )


@contextmanager
def server(checkpoint: Path, *, log: Path) -> Iterator[str]:
    """Address of a running server, which is stopped however the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "ascend_v4", "serve", str(checkpoint), "--port", str(port)]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(process, url=url)
        yield url
    except DemoError as error:
        stop(process)
        raise DemoError(f"{error}{tail_of(log)}") from None
    except BaseException:
        stop(process)
        raise
    status = stop(process)
    if status != 0:
        raise DemoError(f"the server ended with {status} instead of 0 after Ctrl-C.{tail_of(log)}")


def free_port() -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], *, url: str) -> None:
    """Return once /health answers 200. Raises DemoError when the server ends first or takes too long."""
    # Proxy settings of the machine must not catch a request to this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    started = time.monotonic()
    told_s = 0.0
    while True:
        waited_s = time.monotonic() - started
        if process.poll() is not None:
            raise DemoError(f"the server ended with {process.returncode} while starting.")
        try:
            with opener.open(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    step(f"server ready after {waited_s:.1f} s")
                    return
        except OSError:
            # Not listening yet, or /health is still 503 (HTTPError is an OSError): ask again.
            pass
        if waited_s > START_SECONDS:
            raise DemoError(f"/health was not 200 within {START_SECONDS:.0f} s.")
        if waited_s - told_s >= 2:
            told_s = waited_s
            step(f"waiting for /health, {waited_s:.0f} s")
        time.sleep(0.2)


def ask(url: str) -> None:
    """Stream one chat answer to stdout and print its speed. Raises DemoError when none comes."""
    step(f"the weights are random, so the answer is gibberish; at most {ANSWER_TOKENS} tokens:")
    client = openai.OpenAI(
        base_url=f"{url}/v1",
        api_key="demo",
        max_retries=0,
        timeout=120,
        http_client=openai.DefaultHttpxClient(trust_env=False),
    )
    usage = None
    first_s = last_s = None
    started = time.monotonic()
    try:
        with client:
            stream = client.chat.completions.create(
                model=client.models.list().data[0].id,
                messages=[{"role": "user", "content": QUESTION}],
                max_tokens=ANSWER_TOKENS,
                seed=0,
                stream=True,
                stream_options={"include_usage": True},
            )
            for chunk in stream:
                usage = chunk.usage or usage
                if chunk.choices and chunk.choices[0].delta.content:
                    last_s = time.monotonic()
                    first_s = first_s or last_s
                    print(chunk.choices[0].delta.content, end="", flush=True)
    except openai.OpenAIError as error:
        raise DemoError(f"the chat request failed: {error}") from None
    finally:
        print(flush=True)
    if usage is None or first_s is None or last_s is None:
        raise DemoError("the stream ended without text or without usage.")
    report(
        usage.prompt_tokens, usage.completion_tokens, prefill_s=first_s - started, decode_s=last_s - first_s
    )


def report(num_prompt: int, num_answer: int, *, prefill_s: float, decode_s: float) -> None:
    """Tokens per second as the client saw them."""
    decode = f", then {(num_answer - 1) / decode_s:.1f} tokens/s" if num_answer > 1 and decode_s > 0 else ""
    step(
        f"{num_prompt} prompt tokens, first text after {prefill_s * 1e3:.0f} ms; {num_answer} tokens{decode}"
    )


def stop(process: subprocess.Popen[bytes]) -> int:
    """Exit status of the server after Ctrl-C, killed if it does not heed it."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(timeout=STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def tail_of(log: Path) -> str:
    """The end of the server's own output, for an error message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    return "\nThe server's last lines:\n  " + "\n  ".join(lines) if lines else " It printed nothing."


if __name__ == "__main__":
    raise SystemExit(main())
