"""Which tokens of which requests run in the next step. Integers only: no torch, no threads, no text.

A request waits, then runs until it is removed. It is admitted only when its whole length has been promised by
the caches, so that a running request never has to be put back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ascend_v4.engine.requests import QueueFullError
from ascend_v4.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerLimits:
    """How much runs at once."""

    max_num_seqs: int = 16
    """Requests that run at the same time."""
    max_num_batched_tokens: int = 2048
    """Tokens of one step, over all requests."""
    max_waiting: int = 256
    """Requests that may wait; the next one is refused."""

    def __post_init__(self) -> None:
        highest = {"max_num_seqs": 4096, "max_num_batched_tokens": 1 << 20, "max_waiting": 1 << 20}
        for name, high in highest.items():
            value = getattr(self, name)
            if not 1 <= value <= high:
                raise ConfigError(f"{name} is {value}; it must be in [1, {high}].")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs "
                f"({self.max_num_seqs}), and every running request needs one token per step. "
                "Raise the first or lower the second."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Tokens [start, start + num_tokens) of one request, to run in this step."""

    request_id: int
    start: int
    num_tokens: int
    is_last: bool
    """Whether nothing known of the request is left to run, so that its logits give the next token."""


@dataclass(kw_only=True, slots=True)
class _Progress:
    num_prompt_tokens: int
    num_known_tokens: int
    num_scheduled_tokens: int = 0

    @property
    def num_pending_tokens(self) -> int:
        return self.num_known_tokens - self.num_scheduled_tokens

    @property
    def decodes(self) -> bool:
        return self.num_known_tokens > self.num_prompt_tokens


class Scheduler:
    """Continuous batching, first come first served.

    New tokens of answers come before prompts, and prompts fill what is left of the step in the order of
    arrival. Since a prompt being read occupies a place among `max_num_seqs`, at least one token of every step
    is left to it: nobody starves.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self._waiting: OrderedDict[int, _Progress] = OrderedDict()
        self._running: OrderedDict[int, _Progress] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold cache space."""
        return len(self._running)

    def add(self, request_id: int, num_prompt_tokens: int) -> None:
        """Put a request at the end of the queue. Raises QueueFullError."""
        assert request_id not in self._waiting, f"request {request_id} is already waiting"
        assert request_id not in self._running, f"request {request_id} is already running"
        assert num_prompt_tokens > 0, f"request {request_id} has {num_prompt_tokens} prompt tokens"
        if len(self._waiting) >= self.limits.max_waiting:
            raise QueueFullError(
                f"{len(self._waiting)} requests are waiting, and the queue holds {self.limits.max_waiting}. "
                "Try again later."
            )
        self._waiting[request_id] = _Progress(
            num_prompt_tokens=num_prompt_tokens, num_known_tokens=num_prompt_tokens
        )

    def remove(self, request_id: int) -> None:
        """Forget a request, wherever it is; an unknown one is no error."""
        self._waiting.pop(request_id, None)
        self._running.pop(request_id, None)

    def append_token(self, request_id: int) -> None:
        """Tell that a running request was given its next token."""
        self._running[request_id].num_known_tokens += 1

    def first_waiting(self) -> int | None:
        """The request that is next in the queue."""
        return next(iter(self._waiting), None)

    def schedule(self, admit: Callable[[int], bool]) -> list[Slice]:
        """The next step, at most `max_num_batched_tokens` tokens, each request at most once.

        `admit` is asked for the first of the queue whether the caches take it now. When it says no, those
        behind wait too: a long request is never overtaken for ever by short ones.
        """
        budget_tokens = self.limits.max_num_batched_tokens
        slices: list[Slice] = []
        for wants_decode in (True, False):
            for request_id, progress in self._running.items():
                if progress.decodes is wants_decode and budget_tokens > 0:
                    budget_tokens -= _take(slices, request_id, progress, budget_tokens)
        while budget_tokens > 0 and self._waiting and len(self._running) < self.limits.max_num_seqs:
            request_id = next(iter(self._waiting))
            if not admit(request_id):
                break
            progress = self._running[request_id] = self._waiting.pop(request_id)
            budget_tokens -= _take(slices, request_id, progress, budget_tokens)
        return slices


def _take(slices: list[Slice], request_id: int, progress: _Progress, budget_tokens: int) -> int:
    num_tokens = min(progress.num_pending_tokens, budget_tokens)
    if num_tokens:
        start = progress.num_scheduled_tokens
        progress.num_scheduled_tokens += num_tokens
        slices.append(
            Slice(
                request_id=request_id,
                start=start,
                num_tokens=num_tokens,
                is_last=progress.num_pending_tokens == 0,
            )
        )
    return num_tokens
