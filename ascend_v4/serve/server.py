"""From a checkpoint to a listening server: loads the model beside it and ends cleanly.

The server listens before the model is loaded, so that /health can say how far it is.
"""

from __future__ import annotations

import copy
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from ascend_v4.checkpoint.pack import require_finished
from ascend_v4.checkpoint.tokenizer import load_tokenizer
from ascend_v4.config import ModelConfig
from ascend_v4.device.target import ON_CPU, TargetRequest
from ascend_v4.engine.engine import Engine
from ascend_v4.engine.protocol import Runner
from ascend_v4.engine.scheduler import SchedulerLimits
from ascend_v4.errors import ConfigError
from ascend_v4.serve.app import create_app
from ascend_v4.serve.interrupt import Interrupt
from ascend_v4.serve.service import Service, ServiceSettings

DEFAULT_CONTEXT_TOKENS = 32768
"""Context served when nobody says; the caches for the million tokens of the release take gigabytes."""
DEFAULT_CACHED_CONTEXTS = 4
MAX_CACHE_TOKENS = 1 << 32
STOP_TIMEOUT_S = 10.0
"""How long a step of the model may take to end after the server has."""
LOADING_STOP_TIMEOUT_S = 2.0
"""The same for loading, which loses nothing when it is cut off."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Everything `ascend-v4 serve` was told."""

    checkpoint: Path
    tokenizer: Path | None = None
    """Where the tokenizer is; None means in the checkpoint."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port; the log tells which."""
    served_model_names: tuple[str, ...] = ()
    """Empty means the checkpoint's folder name."""
    max_model_tokens: int | None = None
    """Longest prompt and answer together; None is decided by `resolve_lengths`."""
    cache_tokens: int | None = None
    """Positions that all running requests together may hold."""
    limits: SchedulerLimits
    target: TargetRequest = ON_CPU
    """Where the model runs."""
    graphs: bool | None = None
    """Whether decoding steps are recorded; None means where the device gains by it."""
    allow_slow: bool = False
    """Serve on an NPU even with operators that are too slow to serve with."""
    numerics: str = "auto"
    quantize: str | None = None
    """Target the checkpoint is repacked to while it loads."""
    cache_dir: Path | None = None
    """Keeps what `quantize` makes; None means memory only."""
    seed: int | None = None
    api_key: str | None = None


def resolve_lengths(config: ServeConfig, *, model_tokens: int) -> tuple[int, int]:
    """Context and cache positions to serve with, for a model whose context is `model_tokens`.

    Raises ConfigError when they contradict each other or the model.
    """
    context_tokens = config.max_model_tokens
    if context_tokens is None:
        context_tokens = min(model_tokens, config.cache_tokens or model_tokens, DEFAULT_CONTEXT_TOKENS)
    if not 2 <= context_tokens <= model_tokens:
        raise ConfigError(
            f"--max-model-len is {context_tokens}; this model takes 2 to {model_tokens} tokens."
        )
    cache_tokens = config.cache_tokens or DEFAULT_CACHED_CONTEXTS * context_tokens
    if not context_tokens <= cache_tokens <= MAX_CACHE_TOKENS:
        raise ConfigError(
            f"--cache-tokens is {cache_tokens}; it must hold at least one context of {context_tokens} tokens "
            f"and be at most {MAX_CACHE_TOKENS}."
        )
    return context_tokens, cache_tokens


def run_server(config: ServeConfig, interrupt: Interrupt) -> None:
    """Serve until a signal comes, then return. Main thread only.

    Raises AscendV4Error when it cannot begin: no tokenizer, a busy port, a checkpoint that does not load.
    """
    server, service, listening = _prepare(config)
    interrupt.hand_over(server)
    loading = _Loading(lambda: _load_engine(config), service, server)
    loading.thread.start()
    with listening:
        server.run(sockets=[listening])
    service.stop()
    _end(loading, service)
    if loading.error is not None:
        raise loading.error


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the address cannot be had."""
    listening: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        if listening is not None:
            listening.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}. Choose another --host or --port."
        ) from None
    return listening


class StoppingServer(uvicorn.Server):
    """A uvicorn server that ends running answers first, so that it need not wait for them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn on its event loop once it was told to end."""
        self._service.stop()
        await super().shutdown(sockets)


def log_settings() -> dict[str, Any]:
    """Uvicorn's logging with everything on stderr, and this package's loggers beside it."""
    settings = copy.deepcopy(LOGGING_CONFIG)
    settings["handlers"]["access"]["stream"] = "ext://sys.stderr"
    settings["loggers"]["ascend_v4"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    return settings


def _prepare(config: ServeConfig) -> tuple[StoppingServer, Service, socket.socket]:
    """Everything that is quick, so that most mistakes show before the weights are read."""
    require_finished(config.checkpoint)
    model = ModelConfig.from_file(config.checkpoint)
    resolve_lengths(config, model_tokens=model.max_position_embeddings)
    tokenizer = load_tokenizer(config.tokenizer or config.checkpoint, config=model)
    names = config.served_model_names or (config.checkpoint.resolve().name,)
    service = Service(
        ServiceSettings(model_names=names, api_key=config.api_key, seed=config.seed),
        codec=tokenizer,
        eos_token_ids=model.eos_token_ids,
    )
    listening = bind(config.host, config.port)
    server = StoppingServer(
        uvicorn.Config(
            create_app(service), log_config=log_settings(), timeout_graceful_shutdown=int(STOP_TIMEOUT_S)
        ),
        service,
    )
    host, port = listening.getsockname()[:2]
    shown_host = f"[{host}]" if ":" in host else host
    logger.info("Listening on http://%s:%d as %s; loading the model", shown_host, port, ", ".join(names))
    return server, service, listening


def _load_engine(config: ServeConfig) -> Engine:
    # torch takes seconds to import; the server already listens by now.
    from ascend_v4.engine.runner import build_runner

    model = ModelConfig.from_file(config.checkpoint)
    context_tokens, cache_tokens = resolve_lengths(config, model_tokens=model.max_position_embeddings)
    runner: Runner = build_runner(
        config.checkpoint,
        device=config.target,
        numerics=config.numerics,
        quantize=config.quantize,
        cache_dir=config.cache_dir,
        max_sequence_tokens=context_tokens,
        cache_tokens=cache_tokens,
        max_sequences=config.limits.max_num_seqs,
        graphs=config.graphs,
        allow_slow=config.allow_slow,
    )
    logger.info("Context %d tokens, caches %d tokens", context_tokens, cache_tokens)
    return Engine(runner, eos_token_ids=model.eos_token_ids, limits=config.limits)


class _Loading:
    """Loads the engine on a thread of its own; a failure ends the server."""

    def __init__(self, load: Callable[[], Engine], service: Service, server: uvicorn.Server) -> None:
        self.error: BaseException | None = None
        self._load = load
        self._service = service
        self._server = server
        self.thread = threading.Thread(target=self._run, name="ascend-v4-loading", daemon=True)

    def _run(self) -> None:
        try:
            engine = self._load()
            engine.start()
            self._service.set_engine(engine)
            logger.info("Ready")
        except BaseException as error:
            # Kept for `run_server`, which raises it on the main thread once the server has ended.
            self.error = error
            self._server.should_exit = True


def _end(loading: _Loading, service: Service) -> None:
    """Wait a little for the threads; leave without them if they cannot be stopped."""
    loading.thread.join(LOADING_STOP_TIMEOUT_S)
    if not loading.thread.is_alive() and service.join(STOP_TIMEOUT_S):
        return
    # A thread inside a long torch call cannot be interrupted, and the interpreter's own end would pull the
    # libraries from under it.
    sys.stdout.flush()
    sys.stderr.flush()
    logging.shutdown()
    os._exit(0)
