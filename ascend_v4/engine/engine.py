"""The engine: one thread that runs the model for everybody who asks.

Requests come from any thread and their events go back through a callback each. The thread owns the runner; a
lock guards only the books (who waits, who runs), never a forward pass.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ascend_v4.engine.protocol import Chunk, Runner, SequenceHandle
from ascend_v4.engine.requests import (
    EngineStoppedError,
    Event,
    EventSink,
    FailEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    SampledToken,
    TokenEvent,
    check_request,
)
from ascend_v4.engine.sampler import Sampler
from ascend_v4.engine.scheduler import Scheduler, SchedulerLimits, Slice
from ascend_v4.engine.text import TextDelta
from ascend_v4.errors import AscendV4Error, CacheFullError, RequestError

FAILED_STEPS_UNTIL_UNHEALTHY = 3

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """One request with everything the engine keeps for it."""

    request_id: int
    request: GenerationRequest
    on_event: EventSink
    sampler: Sampler
    sequence: SequenceHandle | None = None
    token_ids: list[int] = field(default_factory=list)
    """Prompt and completion."""
    admitted_s: float = 0.0
    first_token_s: float = 0.0
    is_ended: bool = False

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_ids)


class Engine:
    """Runs requests in continuous batches on its own thread, from `start` to `stop`.

    A callback gets TokenEvents and then one FinishEvent or FailEvent. It is called on the engine's thread, or
    on the thread that stops the engine; it must return at once and not raise.
    """

    def __init__(self, runner: Runner, *, eos_token_ids: Sequence[int], limits: SchedulerLimits) -> None:
        self._runner = runner
        self._eos_token_ids = frozenset(eos_token_ids)
        self._scheduler = Scheduler(limits)
        self._wake = threading.Condition()
        self._jobs: dict[int, _Job] = {}
        self._cancelled: set[int] = set()
        self._refused: list[tuple[int, AscendV4Error]] = []
        self._next_id = 0
        self._is_stopping = False
        self._num_failed_steps = 0
        self._thread = threading.Thread(target=self._run, name="ascend-v4-engine", daemon=True)

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._runner.vocab_size

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and completion together."""
        return self._runner.max_sequence_tokens

    @property
    def is_healthy(self) -> bool:
        """Whether a request sent now can expect an answer."""
        alive = self._thread.is_alive() and not self._is_stopping
        return alive and self._num_failed_steps < FAILED_STEPS_UNTIL_UNHEALTHY

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        with self._wake:
            return len(self._jobs)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: GenerationRequest, on_event: EventSink) -> int:
        """Queue a request; its id, for `cancel`.

        Raises RequestError (the prompt does not fit), QueueFullError, EngineStoppedError; no event comes
        then.
        """
        check_request(request, vocab_size=self.vocab_size, max_sequence_tokens=self.max_sequence_tokens)
        sampler = Sampler(request.sampling)
        with self._wake:
            if self._is_stopping or not self._thread.is_alive():
                raise EngineStoppedError("the engine is shutting down and takes no more requests.")
            request_id = self._next_id
            self._scheduler.add(request_id, len(request.prompt_ids))
            self._next_id += 1
            self._jobs[request_id] = _Job(
                request_id=request_id,
                request=request,
                on_event=on_event,
                sampler=sampler,
                token_ids=list(request.prompt_ids),
            )
            self._wake.notify()
        return request_id

    def generate(self, request: GenerationRequest) -> Iterator[Event]:
        """The events of one request, for a caller that may wait; leaving the loop early cancels it."""
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        request_id = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if not isinstance(event, TokenEvent):
                    return
        finally:
            self.cancel(request_id)

    def cancel(self, request_id: int) -> None:
        """Drop a request before the next step; no more events are promised. A finished one is no error."""
        with self._wake:
            if request_id in self._jobs:
                self._cancelled.add(request_id)
                self._wake.notify()

    def stop(self) -> None:
        """Fail every request now and end the thread after the step it is in. Safe to call twice."""
        with self._wake:
            self._is_stopping = True
            jobs = [job for job in self._jobs.values() if not job.is_ended]
            for job in jobs:
                job.is_ended = True
            self._wake.notify()
        for job in jobs:
            job.on_event(FailEvent(EngineStoppedError("the server is shutting down.")))

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread after `stop`; whether it ended in time."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._is_stopping or self._cancelled or self._has_work()):
                        self._wake.wait()
                    if self._is_stopping:
                        break
                    steps = self._plan_step()
                if steps:
                    self._run_step(steps)
        finally:
            # Also when a bug ends the thread: nobody may wait for ever for an answer that cannot come.
            self.stop()
            self._close_all()

    def _has_work(self) -> bool:
        return self._scheduler.num_waiting + self._scheduler.num_running > 0

    def _plan_step(self) -> list[tuple[_Job, Slice]]:
        for request_id in self._cancelled & self._jobs.keys():
            self._drop(self._jobs[request_id])
        self._cancelled.clear()
        slices = self._scheduler.schedule(self._admit)
        first = self._scheduler.first_waiting()
        if not slices and not self._refused and first is not None and self._scheduler.num_running == 0:
            # Nothing runs, so nothing will ever make room for it.
            job = self._jobs[first]
            num_tokens = len(job.token_ids) + job.request.max_tokens
            error = CacheFullError(
                f"the request needs {num_tokens} cache positions, more than the caches hold even when empty. "
                "Ask for fewer tokens, or serve with a larger --cache-tokens."
            )
            self._refused.append((first, error))
        for request_id, reason in self._refused:
            self._fail(self._jobs[request_id], reason)
        self._refused.clear()
        return [(self._jobs[part.request_id], part) for part in slices]

    def _admit(self, request_id: int) -> bool:
        job = self._jobs[request_id]
        try:
            job.sequence = self._runner.open_sequence(len(job.token_ids) + job.request.max_tokens)
        except CacheFullError:
            return False
        except Exception as error:
            # Handed on to the requester and logged: one request's trouble must not end everybody's engine.
            self._refused.append((request_id, _shareable(error, "opening a sequence")))
            return False
        job.admitted_s = time.perf_counter()
        return True

    def _run_step(self, steps: list[tuple[_Job, Slice]]) -> None:
        chunks = []
        for job, part in steps:
            assert job.sequence is not None, f"request {job.request_id} runs without a sequence"
            chunks.append(Chunk(job.sequence, job.token_ids[part.start : part.start + part.num_tokens]))
        try:
            logits_KV = self._runner.forward(chunks)
        except Exception as error:
            # Handed on to everybody in the step and logged; /health tells when it keeps happening.
            self._num_failed_steps += 1
            shareable = _shareable(error, f"running {len(chunks)} sequences")
            with self._wake:
                for job, _ in steps:
                    self._fail(job, shareable)
            return
        self._num_failed_steps = 0
        for index, (job, part) in enumerate(steps):
            if not part.is_last:
                continue
            try:
                token = job.sampler.sample(logits_KV[index])
                self._accept(job, token)
            except Exception as error:
                # Handed on to the one requester it concerns, and logged.
                shareable = _shareable(error, f"choosing a token of request {job.request_id}")
                with self._wake:
                    self._fail(job, shareable)

    def _accept(self, job: _Job, token: SampledToken) -> None:
        """Book a new token and tell the requester."""
        now_s = time.perf_counter()
        if not job.num_completion_tokens:
            job.first_token_s = now_s
        job.token_ids.append(token.token_id)
        request, output = job.request, job.request.output
        if token.token_id in self._eos_token_ids and not request.ignore_eos:
            self._finish(job, output.flush(), FinishReason.STOP, now_s, ended_by_eos=True)
            return
        deltas = output.push(token.token_id)
        reason: FinishReason | None = None
        if output.stopped_by is None and job.num_completion_tokens >= request.max_tokens:
            reason = FinishReason.LENGTH
        if output.stopped_by is not None:
            reason = FinishReason.STOP
        if deltas or reason is None or token.logprob is not None:
            self._tell(job, TokenEvent(deltas, token))
        if reason is not None:
            self._finish(job, output.flush(), reason, now_s)
            return
        with self._wake:
            self._scheduler.append_token(job.request_id)

    def _finish(
        self,
        job: _Job,
        deltas: tuple[TextDelta, ...],
        reason: FinishReason,
        now_s: float,
        *,
        ended_by_eos: bool = False,
    ) -> None:
        event = FinishEvent(
            deltas=deltas,
            reason=reason,
            ended_by_eos=ended_by_eos,
            num_prompt_tokens=len(job.request.prompt_ids),
            num_completion_tokens=job.num_completion_tokens,
            num_reasoning_tokens=job.request.output.num_reasoning_tokens,
            prefill_s=job.first_token_s - job.admitted_s,
            decode_s=now_s - job.first_token_s,
        )
        with self._wake:
            self._drop(job)
        self._tell(job, event)
        job.is_ended = True

    def _fail(self, job: _Job, error: AscendV4Error) -> None:
        self._drop(job)
        self._tell(job, FailEvent(error))
        job.is_ended = True

    def _tell(self, job: _Job, event: Event) -> None:
        if not job.is_ended:
            job.on_event(event)

    def _drop(self, job: _Job) -> None:
        """Forget a job and give its cache space back."""
        self._scheduler.remove(job.request_id)
        self._jobs.pop(job.request_id, None)
        sequence, job.sequence = job.sequence, None
        if sequence is not None:
            self._runner.close_sequence(sequence)

    def _close_all(self) -> None:
        with self._wake:
            for job in list(self._jobs.values()):
                self._drop(job)


def _shareable(error: Exception, doing: str) -> AscendV4Error:
    """An error whose message may go to the requester; the original goes to the log."""
    if isinstance(error, AscendV4Error):
        logger.warning("error while %s: %s", doing, error)
        return error
    logger.error("unexpected error while %s", doing, exc_info=error)
    return RequestError(f"{type(error).__name__} while {doing}; the log has the details.")
