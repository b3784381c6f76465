"""However tokens are grouped into steps, their logits are those of one sequence alone, token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_v4.engine.protocol import Chunk
from tests.model.builders import all_rows, make_model, make_runner, require_same_rows, run, token_ids

LENGTHS = (1, 5, 127, 128, 129, 300)
"""Before, on and behind the edges of a 128-token block."""


@pytest.fixture(scope="module")
def shared_runner(checkpoint):
    """For tests that close every sequence they open."""
    return make_runner(checkpoint)


@pytest.fixture(scope="module")
def long_ids():
    return token_ids(320, seed=1)


@pytest.fixture(scope="module")
def long_rows(shared_runner, long_ids):
    """Logits after each of `long_ids`, prefilled whole."""
    return all_rows(shared_runner, long_ids)


def test_prefilling_whole_equals_one_token_at_a_time(runner, long_ids, long_rows):
    sequence = runner.open_sequence(len(long_ids))
    found = [run(runner, (sequence, [token_id])) for token_id in long_ids]
    require_same_rows(torch.cat(found), long_rows)


def test_sequences_of_different_lengths_in_one_step_equal_each_alone(runner):
    prompts = [token_ids(length, seed=length) for length in LENGTHS]
    alone = torch.stack([all_rows(runner, ids)[-1] for ids in prompts])
    together = [(runner.open_sequence(len(ids)), ids) for ids in prompts]
    require_same_rows(run(runner, *together), alone)


def test_decoding_several_sequences_at_once_equals_each_alone(runner):
    texts = [token_ids(length + 20, seed=length) for length in LENGTHS]
    alone = [all_rows(runner, ids) for ids in texts]
    sequences = [runner.open_sequence(len(ids)) for ids in texts]
    pairs = list(zip(sequences, texts, strict=True))
    run(runner, *((sequence, ids[:-20]) for sequence, ids in pairs))
    for back in range(-20, 0):
        found = run(runner, *((sequence, [ids[back]]) for sequence, ids in pairs))
        require_same_rows(found, torch.stack([rows[back] for rows in alone]))


def test_order_of_sequences_in_a_step_does_not_matter(runner):
    prompts = [token_ids(length, seed=length) for length in LENGTHS]
    forward = run(runner, *((runner.open_sequence(len(ids)), ids) for ids in prompts[:3]))
    backward = run(runner, *((runner.open_sequence(len(ids)), ids) for ids in prompts[2::-1]))
    require_same_rows(backward.flip(0), forward)


def test_prompts_and_single_new_tokens_share_a_step(runner):
    first, second, third = (token_ids(length, seed=length) for length in (140, 300, 9))
    rows = [all_rows(runner, ids) for ids in (first, second, third)]
    a, b, c = (runner.open_sequence(300) for _ in range(3))
    run(runner, (a, first[:130]))
    mixed = run(runner, (b, second[:200]), (a, first[130:131]), (c, third[:4]))
    require_same_rows(mixed, torch.stack([rows[1][199], rows[0][130], rows[2][3]]))
    mixed = run(runner, (a, first[131:134]), (c, third[4:9]), (b, second[200:]))
    require_same_rows(mixed, torch.stack([rows[0][133], rows[2][8], rows[1][299]]))


@settings(max_examples=25)
@given(cuts=st.sets(st.integers(1, 299), max_size=12))
def test_chunks_of_any_size_equal_the_whole(shared_runner, long_ids, long_rows, cuts):
    edges = [0, *sorted(cuts), 300]
    sequence = shared_runner.open_sequence(300)
    try:
        found = [
            shared_runner.logits(shared_runner.streams(Chunk(sequence, long_ids[low:high])))
            for low, high in itertools.pairwise(edges)
        ]
    finally:
        shared_runner.close_sequence(sequence)
    require_same_rows(torch.cat(found), long_rows[:300])


@pytest.mark.parametrize("per_step", [2, 3, 5, 8, 9, 16])
def test_decoding_several_tokens_of_a_sequence_at_once_equals_one_by_one(
    runner, long_ids, long_rows, per_step
):
    other_ids = token_ids(260, seed=2)
    other_rows = all_rows(runner, other_ids)
    sequence, other = runner.open_sequence(320), runner.open_sequence(260)
    run(runner, (sequence, long_ids[:120]), (other, other_ids[:100]))
    for step in range(144 // per_step):
        low = per_step * step
        streams = run(
            runner,
            (sequence, long_ids[120 + low : 120 + low + per_step]),
            (other, other_ids[100 + low : 100 + low + per_step]),
        )
        last = low + per_step - 1
        require_same_rows(streams, torch.stack([long_rows[120 + last], other_rows[100 + last]]))


@pytest.mark.parametrize("max_step_tokens", [1, 7, 64, 129])
def test_steps_split_at_their_bound_equal_the_whole(checkpoint, long_ids, long_rows, max_step_tokens):
    runner = make_runner(checkpoint, max_step_tokens=max_step_tokens)
    other_ids = token_ids(90, seed=2)
    first, second = runner.open_sequence(300), runner.open_sequence(100)
    found = run(runner, (first, long_ids[:200]), (second, other_ids))
    require_same_rows(found, torch.stack([long_rows[199], all_rows(runner, other_ids)[-1]]))
    found = run(runner, (second, [5]), (first, long_ids[200:300]))
    require_same_rows(found, torch.stack([all_rows(runner, [*other_ids, 5])[-1], long_rows[299]]))


@pytest.mark.parametrize("topk", [1, 4])
def test_few_chosen_among_many_entries_are_the_same_in_every_grouping(tmp_path, topk):
    # beyond DENSE_FACTOR times topk entries the CPU's attention gathers what it masked before
    runner = make_runner(make_model(tmp_path / "model", index_topk=topk, index_n_heads=64))
    ids = token_ids(320, seed=3)
    rows = all_rows(runner, ids)
    sequence = runner.open_sequence(320)
    found = [runner.logits(runner.streams(Chunk(sequence, ids[:250])))]
    found += [run(runner, (sequence, [token_id])) for token_id in ids[250:300]]
    found += [runner.logits(runner.streams(Chunk(sequence, ids[300:])))]
    require_same_rows(torch.cat(found), rows)


def test_a_window_that_slid_through_many_pages_equals_a_fresh_prefill(runner):
    ids = token_ids(900, seed=4)
    rows = all_rows(runner, ids)
    sequence, neighbour = runner.open_sequence(900), runner.open_sequence(900)
    neighbour_ids = token_ids(900, seed=5)
    for low in range(0, 900, 60):
        found = run(runner, (sequence, ids[low : low + 60]), (neighbour, neighbour_ids[low : low + 60]))
        require_same_rows(found[0], rows[low + 59])
