"""Choosing tokens: greedy ties, temperature, top_p, seeds, logprobs, broken logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_v4.engine.requests import SamplingParams
from ascend_v4.engine.sampler import Sampler
from ascend_v4.errors import RequestError


def draw(logits: torch.Tensor, num_tokens: int, **params) -> list[int]:
    sampler = Sampler(SamplingParams(**params))
    return [sampler.sample(logits).token_id for _ in range(num_tokens)]


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0])
    assert draw(logits, 5, temperature=0.0) == [1] * 5


def test_the_same_seed_gives_the_same_tokens():
    logits = torch.randn(50)
    assert draw(logits, 30, seed=5) == draw(logits, 30, seed=5)
    assert draw(logits, 30, seed=5) != draw(logits, 30, seed=6)


def test_samples_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = torch.bincount(torch.tensor(draw(probabilities.log(), 4000, seed=1)), minlength=4)
    # Five standard deviations of a binomial count.
    bound = 5 * torch.sqrt(4000 * probabilities * (1 - probabilities))
    assert (counts - 4000 * probabilities).abs().le(bound).all()


def test_temperature_sharpens():
    logits = torch.tensor([0.0, 1.0])
    cold = sum(draw(logits, 1000, temperature=0.25, seed=2))
    warm = sum(draw(logits, 1000, temperature=2.0, seed=2))
    assert cold > 950
    assert 550 < warm < 700


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = torch.tensor([0.05, 0.5, 0.3, 0.15]).log()
    assert set(draw(logits, 500, top_p=0.79)) == {1, 2}
    assert set(draw(logits, 500, top_p=0.81)) == {1, 2, 3}
    assert set(draw(logits, 50, top_p=0.0)) == {1}


@given(
    logits=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
)
def test_any_finite_logits_give_a_token_of_the_vocabulary(logits, temperature, top_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, num_top_logprobs=3)
    token = Sampler(params).sample(torch.tensor(logits, dtype=torch.float32))
    assert 0 <= token.token_id < len(logits)
    assert len(token.top_logprobs) == min(3, len(logits))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(RequestError, match="1 of 3 logits are not finite"):
        draw(torch.tensor([0.0, bad, 1.0]), 1)


def test_logprobs_are_of_the_untempered_distribution():
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
    token = Sampler(SamplingParams(temperature=0.0, num_top_logprobs=3)).sample(logits)
    want = torch.log_softmax(logits.double(), dim=-1)
    assert token.logprob == pytest.approx(float(want[1]))
    assert [token_id for token_id, _ in token.top_logprobs] == [1, 3, 2]
    assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(want[[1, 3, 2]].tolist())


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 1.1},
        {"seed": 1 << 63},
        {"num_top_logprobs": 21},
    ],
    ids=str,
)
def test_parameters_out_of_bounds_are_refused(params):
    with pytest.raises(RequestError):
        SamplingParams(**params)
