"""Hyper-connections against the formulas of the report, stream by stream in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ascend_v4.operators.contracts.hyper_connections import (
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_pre,
    sinkhorn,
)
from tests.operators.number_formats import numpy_of

NORM_EPS, MIX_EPS = 0.5, 1e-3
"""Far apart and large: exchanged or forgotten, they show."""


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def balanced(logits: np.ndarray, *, iterations: int, eps: float) -> np.ndarray:
    """Row softmax plus eps; then columns; then rows and columns, `iterations` - 1 times."""
    size = len(logits)
    mix = np.exp(logits - logits.max(1, keepdims=True))
    mix = mix / mix.sum(1, keepdims=True) + eps
    for index in range(iterations):
        if index:
            for row in range(size):
                mix[row] /= mix[row].sum() + eps
        for column in range(size):
            mix[:, column] /= mix[:, column].sum() + eps
    return mix


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize("streams", [1, 2, 4, 8])
def test_sinkhorn_counts_column_passes(streams, iterations):
    logits = torch.randn(6, streams, streams) * 3
    got = numpy_of(sinkhorn(logits, iterations=iterations, eps=MIX_EPS))
    for token, square in enumerate(numpy_of(logits)):
        want = balanced(square, iterations=iterations, eps=MIX_EPS)
        np.testing.assert_allclose(got[token], want, rtol=1e-5)


def test_twenty_passes_are_nearly_doubly_stochastic():
    mix = sinkhorn(torch.randn(8, 4, 4), iterations=20, eps=1e-6)
    torch.testing.assert_close(mix.sum(-2), torch.ones(8, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(mix.sum(-1), torch.ones(8, 4), rtol=0, atol=1e-3)


def logits_by_loop(streams: np.ndarray, fn: np.ndarray) -> np.ndarray:
    flat = streams.reshape(-1)
    return fn @ flat / math.sqrt((flat**2).mean() + NORM_EPS)


@pytest.mark.parametrize("num_streams", [2, 4])
def test_pre_mixes_streams_and_makes_the_mixing_weights(num_streams):
    mixes = (2 + num_streams) * num_streams
    streams, fn = torch.randn(5, num_streams, 24), torch.randn(mixes, num_streams * 24) * 0.1
    scale, base = torch.tensor([0.5, 2.0, 1.3]), torch.randn(mixes)
    x, post, mix = hyper_connection_pre(
        streams, fn, scale, base, sinkhorn_iterations=20, norm_eps=NORM_EPS, mix_eps=MIX_EPS
    )
    bases, n = base.tolist(), num_streams
    for token, values in enumerate(numpy_of(streams)):
        logits = logits_by_loop(values, numpy_of(fn))
        want_x = sum((sigmoid(logits[j] * 0.5 + bases[j]) + MIX_EPS) * values[j] for j in range(n))
        want_post = [2 * sigmoid(logits[n + j] * 2.0 + bases[n + j]) for j in range(n)]
        square = np.array(
            [[logits[2 * n + n * j + k] * 1.3 + bases[2 * n + n * j + k] for k in range(n)] for j in range(n)]
        )
        np.testing.assert_allclose(numpy_of(x)[token], want_x, atol=2e-6)
        np.testing.assert_allclose(numpy_of(post)[token], want_post, rtol=1e-5)
        np.testing.assert_allclose(
            numpy_of(mix)[token], balanced(square, iterations=20, eps=MIX_EPS), rtol=1e-4, atol=1e-6
        )


def test_post_sums_over_the_first_index_of_the_mixing_matrix():
    output, streams = torch.randn(5, 24), torch.randn(5, 3, 24)
    post, mix = torch.randn(5, 3), torch.randn(5, 3, 3)
    got = numpy_of(hyper_connection_post(output, streams, post, mix))
    f, x, p, c = (numpy_of(part) for part in (output, streams, post, mix))
    for token in range(5):
        for k in range(3):
            want = p[token, k] * f[token] + sum(c[token, j, k] * x[token, j] for j in range(3))
            np.testing.assert_allclose(got[token, k], want, atol=2e-6)


def test_head_collapses_with_a_sigmoid_alone():
    streams, fn = torch.randn(5, 4, 24), torch.randn(4, 96) * 0.1
    scale, base = torch.tensor([1.7]), torch.randn(4)
    got = hyper_connection_head(streams, fn, scale, base, norm_eps=NORM_EPS, mix_eps=MIX_EPS)
    for token, values in enumerate(numpy_of(streams)):
        logits = logits_by_loop(values, numpy_of(fn))
        want = sum((sigmoid(logits[j] * 1.7 + base[j].item()) + MIX_EPS) * values[j] for j in range(4))
        np.testing.assert_allclose(numpy_of(got)[token], want, atol=2e-6)


def test_bfloat16_streams_give_a_bfloat16_input_and_float32_weights():
    streams, fn = torch.randn(3, 4, 24).to(torch.bfloat16), torch.randn(24, 96)
    x, post, mix = hyper_connection_pre(
        streams, fn, torch.ones(3), torch.zeros(24), sinkhorn_iterations=20, norm_eps=1e-6, mix_eps=1e-6
    )
    assert (x.dtype, post.dtype, mix.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert (x.shape, post.shape, mix.shape) == ((3, 24), (3, 4), (3, 4, 4))
