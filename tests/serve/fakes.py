"""A runner without a model and a tokenizer without a file, for tests of the engine and the server."""

from __future__ import annotations

import codecs
import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ascend_v4.chat import PROTOCOL, special_tokens
from ascend_v4.engine.engine import Engine
from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.scheduler import SchedulerLimits
from ascend_v4.errors import CacheFullError
from ascend_v4.serve.service import Service, ServiceSettings

VOCAB_SIZE = 300
SPECIALS = {token: 256 + index for index, token in enumerate(special_tokens())}
EOS_ID = SPECIALS[PROTOCOL.eos]
THINK_END_ID = SPECIALS[PROTOCOL.think_end]
FAILING_ID = 298
"""A prompt that holds it makes the forward pass raise."""
NAN_ID = 299
"""A prompt that holds it gives logits that are not finite."""


class FakeSequence:
    def __init__(self, reserve_tokens: int) -> None:
        self.reserve_tokens = reserve_tokens
        self.token_ids: list[int] = []
        self.num_runs = 0
        self.is_open = True

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


class FakeRunner:
    """Logits from a hash of all tokens so far, or the ids of `script` one after the other.

    Holds the engine to the runner's contract: one thread, no use after close, no sequence past its promise,
    no step above `max_step_tokens`.
    """

    vocab_size = VOCAB_SIZE

    def __init__(
        self,
        *,
        script: Sequence[int] = (),
        max_sequence_tokens: int = 512,
        cache_tokens: int = 4096,
        max_step_tokens: int = 1 << 30,
        step_delay_s: float = 0.0,
    ) -> None:
        self.max_sequence_tokens = max_sequence_tokens
        self.free_tokens = self.cache_tokens = cache_tokens
        self.max_step_tokens = max_step_tokens
        self.step_delay_s = step_delay_s
        self.script = list(script)
        self.most_open = 0
        self.num_open = 0
        self.gate = threading.Event()
        """Cleared by a test that wants forward passes to wait."""
        self.gate.set()
        self._thread: int | None = None

    def open_sequence(self, reserve_tokens: int) -> FakeSequence:
        self._require_one_thread()
        if reserve_tokens > self.free_tokens:
            raise CacheFullError(f"{reserve_tokens} positions are wanted, {self.free_tokens} are free.")
        self.free_tokens -= reserve_tokens
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        return FakeSequence(reserve_tokens)

    def close_sequence(self, sequence: FakeSequence) -> None:
        self._require_one_thread()
        assert sequence.is_open
        sequence.is_open = False
        self.free_tokens += sequence.reserve_tokens
        self.num_open -= 1

    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        self._require_one_thread()
        assert sum(len(chunk.token_ids) for chunk in chunks) <= self.max_step_tokens
        self.gate.wait()
        time.sleep(self.step_delay_s)
        rows = [self._row(chunk) for chunk in chunks]
        return torch.from_numpy(np.stack(rows))

    def _row(self, chunk: Chunk) -> np.ndarray:
        sequence = chunk.sequence
        assert isinstance(sequence, FakeSequence)
        assert sequence.is_open
        assert chunk.token_ids
        sequence.token_ids += chunk.token_ids
        assert sequence.num_tokens <= sequence.reserve_tokens
        if FAILING_ID in chunk.token_ids:
            raise RuntimeError("the fake device is on fire")
        if self.script:
            token_id = self.script[sequence.num_runs % len(self.script)]
            sequence.num_runs += 1
            row = np.zeros(VOCAB_SIZE, np.float32)
            row[token_id] = 50.0
        else:
            row = np.random.default_rng(sequence.token_ids).normal(size=VOCAB_SIZE).astype(np.float32)
            # The model never says what has a meaning of its own here.
            row[FAILING_ID:] = -50.0
        if NAN_ID in sequence.token_ids:
            row[7] = np.nan
        return row

    def _require_one_thread(self) -> None:
        here = threading.get_ident()
        assert self._thread in (None, here)
        self._thread = here


class FakeTokenizer:
    """One token per byte of UTF-8, and one per special token of the protocol."""

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            special = next((token for token in SPECIALS if text.startswith(token)), None)
            if special is not None:
                ids.append(SPECIALS[special])
                text = text[len(special) :]
            else:
                ids += text[0].encode("utf-8")
                text = text[1:]
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(token_id) for token_id in token_ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return next((text for text, special in SPECIALS.items() if special == token_id), "").encode("utf-8")

    def stream_decoder(self) -> FakeDecoder:
        return FakeDecoder(self)


class FakeDecoder:
    def __init__(self, tokenizer: FakeTokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


def make_engine(runner: FakeRunner, **limits: int) -> Engine:
    """A started engine; the test stops it."""
    engine = Engine(runner, eos_token_ids=[EOS_ID], limits=SchedulerLimits(**limits))
    engine.start()
    return engine


def make_service(engine: Engine | None, *, api_key: str | None = None, seed: int | None = 0) -> Service:
    service = Service(
        ServiceSettings(model_names=("fake", "other-name"), api_key=api_key, seed=seed),
        codec=FakeTokenizer(),
        eos_token_ids=[EOS_ID],
    )
    if engine is not None:
        service.set_engine(engine)
    return service
