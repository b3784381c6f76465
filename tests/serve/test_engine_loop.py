"""The engine's thread: batches, cancellation, failures, shutdown."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from ascend_v4.engine.chat_text import ChatVocabulary
from ascend_v4.engine.engine import FAILED_STEPS_UNTIL_UNHEALTHY, Engine
from ascend_v4.engine.requests import (
    EngineStoppedError,
    Event,
    FailEvent,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    QueueFullError,
    SamplingParams,
    TokenEvent,
)
from ascend_v4.engine.text import TextDelta
from ascend_v4.errors import CacheFullError, RequestError
from tests.serve.conftest import DEADLINE_S, wait_until
from tests.serve.fakes import EOS_ID, FAILING_ID, NAN_ID, FakeRunner, FakeTokenizer, make_engine

VOCABULARY = ChatVocabulary.of(FakeTokenizer())


def request(
    prompt: str | list[int], *, max_tokens: int = 8, stops=(), ignore_eos: bool = True, **sampling
) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=FakeTokenizer().encode(prompt) if isinstance(prompt, str) else prompt,
        max_tokens=max_tokens,
        output=VOCABULARY.raw_output(eos_token_ids=[EOS_ID], stops=stops),
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        ignore_eos=ignore_eos,
    )


def answer(events: list[Event]) -> str:
    last = events[-1]
    assert isinstance(last, FinishEvent), last
    return "".join(delta.text for delta in deltas(events))


def deltas(events: list[Event]) -> list[TextDelta]:
    return [delta for event in events if not isinstance(event, FailEvent) for delta in event.deltas]


def run(engine: Engine, wanted: GenerationRequest) -> list[Event]:
    return list(engine.generate(wanted))


def failure(engine: Engine, wanted: GenerationRequest) -> Exception:
    last = run(engine, wanted)[-1]
    assert isinstance(last, FailEvent), last
    return last.error


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(max_step_tokens=16)


@pytest.fixture
def engine(runner: FakeRunner) -> Iterator[Engine]:
    engine = make_engine(runner, max_num_seqs=4, max_num_batched_tokens=16)
    yield engine
    runner.gate.set()
    engine.stop()
    assert engine.join(DEADLINE_S)
    assert runner.num_open == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_what_else_runs(engine, runner, temperature):
    def wanted(index: int) -> GenerationRequest:
        return request(f"prompt {index} " * (index + 1), max_tokens=12, temperature=temperature, seed=index)

    alone = [answer(run(engine, wanted(index))) for index in range(8)]
    queues: list[queue.SimpleQueue] = [queue.SimpleQueue() for _ in range(8)]
    for index in range(8):
        engine.submit(wanted(index), queues[index].put)
    together = []
    for events in queues:
        got = [events.get(timeout=DEADLINE_S)]
        while isinstance(got[-1], TokenEvent):
            got.append(events.get(timeout=DEADLINE_S))
        together.append(answer(got))

    assert together == alone
    assert runner.most_open == 4


def test_max_tokens_ends_an_answer(engine):
    events = run(engine, request("abc", max_tokens=5))
    end = events[-1]
    assert isinstance(end, FinishEvent)
    assert (end.reason, end.num_prompt_tokens, end.num_completion_tokens) == (FinishReason.LENGTH, 3, 5)
    assert end.prefill_s > 0
    assert end.decode_s > 0


@pytest.mark.parametrize(("ignore_eos", "text", "num_tokens"), [(False, "ab", 3), (True, "abab", 6)])
def test_eos_ends_an_answer_unless_it_is_ignored(runner, engine, ignore_eos, text, num_tokens):
    runner.script = [ord("a"), ord("b"), EOS_ID]
    events = run(engine, request("x", max_tokens=6, ignore_eos=ignore_eos))
    end = events[-1]
    assert answer(events) == text
    assert isinstance(end, FinishEvent)
    assert end.num_completion_tokens == num_tokens
    assert end.ended_by_eos is not ignore_eos


def test_a_stop_string_across_tokens_ends_an_answer(runner, engine):
    runner.script = list(b"one two three")
    events = run(engine, request("x", max_tokens=13, stops=["wo th"]))
    end = events[-1]
    assert answer(events) == "one t"
    assert isinstance(end, FinishEvent)
    assert (end.reason, end.num_completion_tokens) == (FinishReason.STOP, 10)


def test_text_that_looked_like_a_stop_string_is_given_at_the_end(runner, engine):
    runner.script = list(b"abc")
    assert answer(run(engine, request("x", max_tokens=3, stops=["bcd"]))) == "abc"


def test_a_character_of_several_tokens_comes_whole(runner, engine):
    runner.script = list("天".encode())
    events = run(engine, request("x", max_tokens=3))
    assert [delta.text for delta in deltas(events)] == ["天"]


def test_cancelling_frees_the_sequence(runner, engine):
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    request_id = engine.submit(request("abc", max_tokens=400), events.put)
    assert isinstance(events.get(timeout=DEADLINE_S), TokenEvent)
    assert runner.num_open == 1
    engine.cancel(request_id)
    wait_until(lambda: runner.num_open == 0)
    assert engine.num_unfinished == 0
    assert runner.free_tokens == runner.cache_tokens


def test_leaving_the_events_early_cancels(runner, engine):
    events = engine.generate(request("abc", max_tokens=400))
    next(events)
    events.close()
    wait_until(lambda: runner.num_open == 0)


def test_a_waiting_request_can_be_cancelled(runner, engine):
    runner.gate.clear()
    ids = [engine.submit(request("abc"), lambda event: None) for _ in range(6)]
    for request_id in ids:
        engine.cancel(request_id)
    runner.gate.set()
    wait_until(lambda: engine.num_unfinished == 0)


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on(engine):
    assert "fake device is on fire" not in str(failure(engine, request([FAILING_ID])))
    assert engine.is_healthy
    assert answer(run(engine, request("abc")))


def test_steps_that_keep_failing_are_unhealthy_until_one_succeeds(engine):
    for _ in range(FAILED_STEPS_UNTIL_UNHEALTHY):
        failure(engine, request([FAILING_ID]))
    assert not engine.is_healthy
    run(engine, request("abc"))
    assert engine.is_healthy


def test_logits_that_are_not_finite_fail_one_request_only(runner, engine):
    runner.gate.clear()
    broken: queue.SimpleQueue[Event] = queue.SimpleQueue()
    sound: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request([NAN_ID]), broken.put)
    engine.submit(request("a", max_tokens=1), sound.put)
    runner.gate.set()
    first = broken.get(timeout=DEADLINE_S)
    assert isinstance(first, FailEvent)
    assert "not finite" in str(first.error)
    assert isinstance(sound.get(timeout=DEADLINE_S), TokenEvent)
    assert isinstance(sound.get(timeout=DEADLINE_S), FinishEvent)


def test_a_request_waits_for_cache_space_and_then_runs():
    runner = FakeRunner(cache_tokens=100)
    engine = make_engine(runner, max_num_seqs=4)
    threads = []
    ends: list[Event] = []
    for _ in range(3):
        wanted = request("a" * 50, max_tokens=20)
        threads.append(threading.Thread(target=lambda wanted=wanted: ends.append(run(engine, wanted)[-1])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert [type(end) for end in ends] == [FinishEvent] * 3
    assert runner.most_open == 1
    engine.stop()
    assert engine.join(DEADLINE_S)


def test_a_request_that_can_never_have_cache_space_fails():
    engine = make_engine(FakeRunner(cache_tokens=50))
    error = failure(engine, request("a" * 50, max_tokens=20))
    assert isinstance(error, CacheFullError)
    assert "70 cache positions" in str(error)
    engine.stop()
    assert engine.join(DEADLINE_S)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"),
    [
        ([], 5, "no tokens"),
        ([5] * 512, 5, "has 512 tokens; this model's context holds 512"),
        ([5] * 500, 13, "holds 512 tokens; the prompt has 500 and max_tokens asks for 13"),
        ([300], 5, r"token id 300; the vocabulary is \[0, 300\)"),
        ([-1], 5, "token id -1"),
        ([5], 0, "max_tokens is 0"),
    ],
    ids=["empty", "long", "with-answer", "above", "below", "no-answer"],
)
def test_prompts_that_do_not_fit_are_refused(engine, prompt, max_tokens, words):
    with pytest.raises(RequestError, match=words):
        engine.submit(request(prompt, max_tokens=max_tokens), lambda event: None)


def test_a_full_queue_refuses_and_holds_what_it_has():
    runner = FakeRunner()
    engine = make_engine(runner, max_num_seqs=1, max_waiting=2)
    runner.gate.clear()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request("a", max_tokens=1), events.put)
    wait_until(lambda: runner.num_open == 1)
    for _ in range(2):
        engine.submit(request("a", max_tokens=1), events.put)
    with pytest.raises(QueueFullError):
        engine.submit(request("a"), events.put)
    runner.gate.set()
    got = [events.get(timeout=DEADLINE_S) for _ in range(6)]
    assert sum(isinstance(event, FinishEvent) for event in got) == 3
    engine.stop()
    assert engine.join(DEADLINE_S)


def test_stopping_fails_everybody_and_takes_no_more(runner, engine):
    runner.gate.clear()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    for _ in range(6):
        engine.submit(request("abc"), events.put)
    engine.stop()
    got = [events.get(timeout=DEADLINE_S) for _ in range(6)]
    assert all(isinstance(event, FailEvent) for event in got)
    assert not engine.is_healthy
    with pytest.raises(EngineStoppedError):
        engine.submit(request("abc"), events.put)
    runner.gate.set()
    assert engine.join(DEADLINE_S)
    assert runner.num_open == 0
