"""The scheduler: budget, order, no starvation, bounded queue."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_v4.engine.requests import QueueFullError
from ascend_v4.engine.scheduler import Scheduler, SchedulerLimits
from ascend_v4.errors import ConfigError


def always(request_id: int) -> bool:
    return True


def make(*, num_seqs: int = 4, batched: int = 16, waiting: int = 64) -> Scheduler:
    return Scheduler(
        SchedulerLimits(max_num_seqs=num_seqs, max_num_batched_tokens=batched, max_waiting=waiting)
    )


def run_all(scheduler: Scheduler, answers: dict[int, int], prompts: dict[int, int]) -> list[list]:
    """Steps until everybody has had their tokens, each step checked against the limits."""
    steps = []
    covered = dict.fromkeys(prompts, 0)
    left = dict(answers)
    while scheduler.num_running + scheduler.num_waiting:
        slices = scheduler.schedule(always)
        assert slices, "work is left and nothing was scheduled"
        assert sum(part.num_tokens for part in slices) <= scheduler.limits.max_num_batched_tokens
        assert scheduler.num_running <= scheduler.limits.max_num_seqs
        assert len({part.request_id for part in slices}) == len(slices)
        for part in slices:
            assert part.num_tokens > 0
            assert part.start == covered[part.request_id]
            covered[part.request_id] += part.num_tokens
            if part.is_last:
                left[part.request_id] -= 1
                if left[part.request_id]:
                    scheduler.append_token(part.request_id)
                else:
                    scheduler.remove(part.request_id)
        steps.append(slices)
    assert covered == {request_id: prompts[request_id] + answers[request_id] - 1 for request_id in prompts}
    return steps


@given(
    prompts=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=12),
    num_seqs=st.integers(1, 6),
    extra_tokens=st.integers(0, 20),
)
def test_every_token_runs_once_within_the_budget(prompts, num_seqs, extra_tokens):
    scheduler = make(num_seqs=num_seqs, batched=num_seqs + extra_tokens)
    for request_id, (num_prompt_tokens, _) in enumerate(prompts):
        scheduler.add(request_id, num_prompt_tokens)
    run_all(
        scheduler,
        {request_id: answer for request_id, (_, answer) in enumerate(prompts)},
        {request_id: prompt for request_id, (prompt, _) in enumerate(prompts)},
    )


def test_tokens_of_answers_come_before_prompts():
    scheduler = make(batched=8)
    scheduler.add(0, 3)
    assert scheduler.schedule(always)[0].is_last
    scheduler.append_token(0)
    scheduler.add(1, 100)

    slices = scheduler.schedule(always)

    assert [(part.request_id, part.num_tokens, part.is_last) for part in slices] == [
        (0, 1, True),
        (1, 7, False),
    ]


def test_a_prompt_advances_in_every_step_however_many_answers_run():
    scheduler = make(num_seqs=3, batched=3)
    for request_id in range(3):
        scheduler.add(request_id, 1 if request_id < 2 else 50)
    progress = []
    for _ in range(20):
        slices = scheduler.schedule(always)
        progress.append(next((part.start for part in slices if part.request_id == 2), None))
        for part in slices:
            if part.is_last:
                scheduler.append_token(part.request_id)
    assert progress == list(range(20))


def test_the_first_of_the_queue_is_never_overtaken():
    scheduler = make()
    scheduler.add(0, 10)
    scheduler.add(1, 1)
    assert scheduler.schedule(lambda request_id: request_id != 0) == []
    assert [part.request_id for part in scheduler.schedule(always)] == [0, 1]


def test_a_full_queue_refuses():
    scheduler = make(waiting=2)
    scheduler.add(0, 1)
    scheduler.add(1, 1)
    with pytest.raises(QueueFullError, match="2 requests are waiting"):
        scheduler.add(2, 1)


def test_a_removed_request_is_forgotten():
    scheduler = make()
    scheduler.add(0, 5)
    scheduler.schedule(always)
    scheduler.add(1, 5)
    scheduler.remove(0)
    scheduler.remove(1)
    scheduler.remove(7)
    assert scheduler.schedule(always) == []
    assert scheduler.num_running + scheduler.num_waiting == 0


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": 0},
        {"max_waiting": 0},
        {"max_num_seqs": 9, "max_num_batched_tokens": 8},
    ],
    ids=str,
)
def test_limits_that_cannot_work_are_refused(limits):
    with pytest.raises(ConfigError):
        SchedulerLimits(**limits)
