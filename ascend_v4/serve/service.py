"""What all HTTP calls share: the engine once it is there, the tokenizer, the names and limits."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ascend_v4.chat.protocol import shown
from ascend_v4.engine.chat_text import ChatVocabulary, TextCodec
from ascend_v4.engine.engine import Engine
from ascend_v4.serve.errors import HttpError

MAX_LOGGED_FIELDS = 256

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceSettings:
    """What the person who starts the server decides about its API."""

    model_names: tuple[str, ...]
    """Names clients may use; the first stands in the answers to a call without one."""
    api_key: str | None = None
    seed: int | None = None
    """Makes the answers to calls without a seed repeatable, in order of arrival."""


class Service:
    """The state behind the API. Made before the model is loaded; ready when it has an engine."""

    def __init__(self, settings: ServiceSettings, *, codec: TextCodec, eos_token_ids: Sequence[int]) -> None:
        self.settings = settings
        self.codec = codec
        self.vocabulary = ChatVocabulary.of(codec)
        self.eos_token_ids = tuple(eos_token_ids)
        self.created_s = int(time.time())
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._is_stopping = False
        self._num_drawn_seeds = 0
        self._logged_fields: set[str] = set()

    @property
    def is_ready(self) -> bool:
        """Whether a call sent now can expect an answer."""
        engine = self._engine
        return engine is not None and engine.is_healthy

    def set_engine(self, engine: Engine) -> None:
        """Become ready; the engine is stopped at once if the service already was."""
        with self._lock:
            self._engine = engine
            is_late = self._is_stopping
        if is_late:
            engine.stop()

    def engine(self) -> Engine:
        """The engine. Raises HttpError 503 until there is one."""
        engine = self._engine
        if engine is None:
            raise HttpError(503, "the model is still loading. Ask /health until it answers 200.")
        return engine

    def stop(self) -> None:
        """End every running answer. Returns at once."""
        with self._lock:
            self._is_stopping = True
            engine = self._engine
        if engine is not None:
            engine.stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for the engine's thread after `stop`; whether it ended in time."""
        return self._engine is None or self._engine.join(timeout_s)

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises HttpError 404 for a model that is not served here."""
        names = self.settings.model_names
        if asked is None:
            return names[0]
        if asked not in names:
            raise HttpError(
                404,
                f"the model {shown(asked)} is not served here; there is {', '.join(names)}.",
                field="model",
                code="model_not_found",
            )
        return asked

    def draw_seed(self) -> int:
        """A seed for a request that has none."""
        if self.settings.seed is None:
            return secrets.randbits(63)
        with self._lock:
            index = self._num_drawn_seeds
            self._num_drawn_seeds += 1
        digest = hashlib.sha256(f"{self.settings.seed}:{index}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def warn_ignored(self, names: Sequence[str]) -> None:
        """Say once per name that a field of requests has no effect here."""
        for name in names:
            if name not in self._logged_fields and len(self._logged_fields) < MAX_LOGGED_FIELDS:
                self._logged_fields.add(name)
                logger.warning("requests set %s, which has no effect here (said once)", shown(name))
