"""Sequences get pages, take positions back, and give every page back: none of it shows in the logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_v4.cache.layout import ROLLBACK_TOKENS
from ascend_v4.engine.protocol import Chunk
from ascend_v4.errors import CacheFullError, ConfigError, RequestError
from tests.model.builders import all_rows, make_runner, require_same_rows, run, token_ids


@pytest.fixture(scope="module")
def shared_runner(checkpoint):
    """For tests that close every sequence they open."""
    return make_runner(checkpoint)


@pytest.fixture(scope="module")
def texts():
    return [token_ids(300, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def rows(shared_runner, texts):
    """Logits after each token of each text, prefilled whole."""
    return [all_rows(shared_runner, ids) for ids in texts]


def free_pages(runner) -> dict[str, int]:
    """Of every group, those of the MTP block included."""
    pools = {group.name: pool for group, pool in runner._pools.items()}
    if runner._mtp is not None:
        pools |= {f"mtp {group.name}": pool for group, pool in runner._mtp.pools.items()}
    return {name: pool.num_free for name, pool in pools.items()}


@pytest.mark.parametrize("start", [*range(1, 10), *range(118, 138), *range(252, 262)])
def test_rejected_tokens_leave_no_trace(shared_runner, texts, rows, start):
    sequence = shared_runner.open_sequence(300)
    run(shared_runner, (sequence, texts[0][:start]))
    position = start
    for rejected in (1, 4, ROLLBACK_TOKENS):
        # one right token, then wrong ones
        run(shared_runner, (sequence, [texts[0][position], *token_ids(rejected, seed=99)]))
        position += 1
        shared_runner.truncate(sequence, position)
        assert sequence.num_tokens == position
    streams = shared_runner.streams(Chunk(sequence, texts[0][position : position + 20]))
    found = shared_runner.logits(streams)
    shared_runner.close_sequence(sequence)
    require_same_rows(found, rows[0][position : position + 20])


@pytest.mark.parametrize("max_step_tokens", [64, 300])
def test_a_long_prefill_can_be_taken_back_at_its_end(checkpoint, texts, rows, max_step_tokens):
    runner = make_runner(checkpoint, max_step_tokens=max_step_tokens)
    sequence = runner.open_sequence(300)
    run(runner, (sequence, [*texts[0][:257], *token_ids(ROLLBACK_TOKENS, seed=99)]))
    runner.truncate(sequence, 257)
    require_same_rows(run(runner, (sequence, texts[0][257:300])), rows[0][299:])


def test_taking_back_more_than_was_kept_is_refused(runner, texts):
    sequence = runner.open_sequence(300)
    run(runner, (sequence, texts[0]))
    with pytest.raises(ValueError, match="16 of the newest"):
        runner.truncate(sequence, 300 - ROLLBACK_TOKENS - 1)
    with pytest.raises(ValueError, match="cannot be cut to 301"):
        runner.truncate(sequence, 301)
    assert sequence.num_tokens == 300


def test_rollbacks_in_a_row_are_refused_once_state_is_gone(runner, texts):
    sequence = runner.open_sequence(300)
    run(runner, (sequence, texts[0]))
    runner.truncate(sequence, 300 - ROLLBACK_TOKENS)
    run(runner, (sequence, [7]))
    with pytest.raises(ValueError, match=r"cannot be cut to 283: .* here down to 284"):
        runner.truncate(sequence, 300 - ROLLBACK_TOKENS - 1)
    runner.truncate(sequence, 300 - ROLLBACK_TOKENS)


@settings(max_examples=30)
@given(
    plan=st.lists(
        st.tuples(
            st.lists(st.integers(0, 60), min_size=3, max_size=3),
            st.lists(st.integers(0, ROLLBACK_TOKENS), min_size=3, max_size=3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_schedule_of_three_sequences_equals_each_alone(shared_runner, texts, rows, plan):
    before = free_pages(shared_runner)
    sequences = [shared_runner.open_sequence(300) for _ in texts]
    try:
        for wanted, wrong in plan:
            counts = [min(n, 280 - seq.num_tokens) for n, seq in zip(wanted, sequences, strict=True)]
            due = [index for index in range(3) if counts[index] > 0]
            if not due:
                continue
            ends = [sequences[index].num_tokens + counts[index] for index in due]
            right = [texts[index][end - counts[index] : end] for index, end in zip(due, ends, strict=True)]
            found = run(shared_runner, *zip([sequences[index] for index in due], right, strict=True))
            require_same_rows(
                found, torch.stack([rows[index][end - 1] for index, end in zip(due, ends, strict=True)])
            )
            guessed = [index for index in due if wrong[index] > 0]
            if guessed:
                run(shared_runner, *((sequences[i], token_ids(wrong[i], seed=7)) for i in guessed))
                for index in guessed:
                    shared_runner.truncate(sequences[index], sequences[index].num_tokens - wrong[index])
    finally:
        for sequence in sequences:
            shared_runner.close_sequence(sequence)
    assert free_pages(shared_runner) == before


def test_closing_gives_every_page_back(checkpoint, texts):
    runner = make_runner(checkpoint, mtp=True)
    before = free_pages(runner)
    sequences = [runner.open_sequence(300) for _ in texts]
    for sequence, ids in zip(sequences, texts, strict=True):
        streams = runner.streams(Chunk(sequence, ids[:200]))
        runner.mtp_logits(sequence, streams, ids[1:201])
        run(runner, (sequence, ids[200:203]))
        runner.truncate(sequence, 201)
    held = free_pages(runner)
    assert all(held[name] < free for name, free in before.items())
    for sequence in sequences:
        runner.close_sequence(sequence)
        runner.close_sequence(sequence)
    assert free_pages(runner) == before


def test_pages_of_a_closed_sequence_serve_the_next_one(checkpoint, texts, rows):
    runner = make_runner(checkpoint, cache_tokens=300, max_sequences=1)
    for _ in range(4):
        for ids, want in zip(texts, rows, strict=True):
            sequence = runner.open_sequence(300)
            found = run(runner, (sequence, ids))
            runner.close_sequence(sequence)
            require_same_rows(found, want[-1:])


def test_reserved_positions_can_always_be_filled(checkpoint, texts):
    runner = make_runner(checkpoint, cache_tokens=4 * 256, max_sequences=4, max_step_tokens=64)
    sequences = [runner.open_sequence(256) for _ in range(4)]
    for low, high in [(0, 100), (100, 230), *((low, low + 1) for low in range(230, 256))]:
        run(runner, *((sequence, texts[0][low:high]) for sequence in sequences))
    assert [sequence.num_tokens for sequence in sequences] == [256] * 4


def test_more_positions_than_are_free_are_not_promised(checkpoint):
    runner = make_runner(checkpoint, cache_tokens=512, max_sequences=2)
    first = runner.open_sequence(400)
    with pytest.raises(CacheFullError, match="300 cache positions are wanted"):
        runner.open_sequence(300)
    runner.close_sequence(first)
    assert runner.open_sequence(300).num_tokens == 0


def test_more_sequences_than_planned_are_not_opened(checkpoint):
    runner = make_runner(checkpoint, max_sequences=2)
    runner.open_sequence(1)
    second = runner.open_sequence(1)
    with pytest.raises(CacheFullError, match="2 of 2 sequences are open"):
        runner.open_sequence(1)
    runner.close_sequence(second)
    runner.open_sequence(1)


def test_a_sequence_longer_than_the_runner_takes_is_refused(runner):
    with pytest.raises(RequestError, match="1025 tokens are asked for; a sequence holds at most 1024"):
        runner.open_sequence(1025)


def test_a_runner_cannot_be_longer_than_its_model(checkpoint):
    with pytest.raises(ConfigError, match="the model takes 1 to 4096"):
        make_runner(checkpoint, max_sequence_tokens=4097)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5] * 129, "would grow to 139 tokens; 128 were reserved"),
        ([5, 320], "token id 320 at position 1 is outside the vocabulary of 320"),
        ([-1], "token id -1 at position 0"),
        ([], "no token ids"),
    ],
)
def test_a_refused_chunk_stops_the_step_before_anything_ran(shared_runner, texts, rows, ids, message):
    runner = shared_runner
    good, bad = runner.open_sequence(300), runner.open_sequence(100)
    run(runner, (good, texts[0][:100]), (bad, texts[1][:10]))
    with pytest.raises(RequestError, match=message):
        run(runner, (good, texts[0][100:150]), (bad, ids))
    assert (good.num_tokens, bad.num_tokens) == (100, 10)
    found = run(runner, (good, texts[0][100:150]), (bad, texts[1][10:60]))
    runner.close_sequence(good)
    runner.close_sequence(bad)
    require_same_rows(found, torch.stack([rows[0][149], rows[1][59]]))


def test_one_sequence_twice_in_a_step_is_our_bug(runner):
    sequence = runner.open_sequence(10)
    with pytest.raises(AssertionError, match="2 chunks of only 1 sequences"):
        run(runner, (sequence, [1]), (sequence, [2]))


def test_a_closed_sequence_cannot_run(runner):
    sequence = runner.open_sequence(10)
    runner.close_sequence(sequence)
    with pytest.raises(AssertionError, match="closed"):
        run(runner, (sequence, [1]))
