"""Writes into paged caches: what is stored, where, and what stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ascend_v4.operators.contracts.cache import write_index_keys, write_kv
from ascend_v4.operators.contracts.quantize import IndexFormat, KvFormat, quantize_index
from tests.operators.number_formats import fake_fp8, numpy_of


def test_quantised_key_values_keep_their_rope_channels():
    rows = torch.randn(3, 200) * 20
    # another size in every second group of 64: groups of any other width round differently
    rows[:, 64:128] *= 1e-4
    cache = torch.full((2, 4, 200), torch.nan)
    write_kv(cache, rows, torch.tensor([5, 4, 7]), nope_dim=136, format=KvFormat.FP8_GROUP)
    got = cache.view(8, 200)[[5, 4, 7]]
    np.testing.assert_array_equal(numpy_of(got[:, :136]), fake_fp8(numpy_of(rows[:, :136]), group=64))
    assert torch.equal(got[:, 136:], rows[:, 136:])
    assert torch.isnan(cache.view(8, 200)[[0, 1, 2, 3, 6]]).all()


def test_plain_key_values_are_copied():
    rows, cache = torch.randn(2, 24), torch.zeros(1, 4, 24)
    write_kv(cache, rows, torch.tensor([3, 1]), nope_dim=16, format=KvFormat.PLAIN)
    assert torch.equal(cache[0, [3, 1]], rows)


@pytest.mark.parametrize("slots", [[-1, 2, -1], [-1, -1, -1]])
def test_a_negative_slot_skips_its_row(slots):
    rows, cache = torch.ones(3, 8), torch.zeros(2, 2, 8)
    write_kv(cache, rows, torch.tensor(slots), nope_dim=4, format=KvFormat.PLAIN)
    written = cache.view(4, 8).sum(1)
    assert written.tolist() == [8.0 if slot in slots else 0.0 for slot in range(4)]


def test_index_keys_are_rotated_and_quantised_before_they_are_cached():
    keys, cache = torch.randn(3, 64), torch.zeros(2, 2, 64)
    write_index_keys(cache, keys, torch.tensor([2, 0, 3]), format=IndexFormat.FP4_GROUP)
    want = quantize_index(keys, format=IndexFormat.FP4_GROUP)
    assert not torch.equal(want, keys)
    assert torch.equal(cache.view(4, 64)[[2, 0, 3]], want)


def test_the_rows_given_are_not_quantised_in_place():
    rows = torch.randn(3, 72)
    before = rows.clone()
    write_kv(torch.zeros(1, 4, 72), rows, torch.tensor([0, 1, 2]), nope_dim=64, format=KvFormat.FP8_GROUP)
    assert torch.equal(rows, before)
