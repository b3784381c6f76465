"""Page ids and offsets that do not fit in 32 bits: the same step in a huge cache and in a small one.

The huge caches are anonymous memory of which only the touched pages exist.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import TokenBatch, rows_of
from ascend_v4.operators.contracts.cache import write_index_keys, write_kv
from ascend_v4.operators.contracts.compressor import CompressorWeights, compress, plan_compression
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.quantize import IndexFormat, KvFormat, StoredWeight, WeightFormat
from ascend_v4.operators.contracts.rope import rope_frequencies
from ascend_v4.operators.select import select

CPU = torch.device("cpu")
WHICH = pytest.mark.parametrize("which", ["reference", "selected"])


def untouched(pages: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A zero-filled cache that takes memory only where it is written."""
    memory = mmap.mmap(-1, pages * rows * width * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(pages, rows, width)


def chosen(which: str, operator):
    """The plan and the call of the reference, or of what the CPU selects."""
    if which == "reference":
        return operator.plan, operator.reference
    table = select("cpu")
    return table.plan(operator), table[operator]


@WHICH
def test_attention_and_writes_reach_past_two_to_the_31_elements(which):
    pages, width = 33_000, 512
    huge = untouched(pages, 128, width, torch.bfloat16)
    assert huge.numel() > 2**31
    small = torch.zeros(4, 128, width, dtype=torch.bfloat16)
    tables = {"huge": torch.tensor([[32_999, 29_078, 32_768]]), "small": torch.tensor([[3, 1, 2]])}
    rows, q = torch.randn(302, width).to(torch.bfloat16), torch.randn(3, 2, width).to(torch.bfloat16)
    outputs = {}
    for name, cache in (("huge", huge), ("small", small)):
        table = tables[name]
        slots = rows_of(table, torch.zeros(302, dtype=torch.int64), torch.arange(302), per_page=128)
        write_kv(cache, rows, slots, nope_dim=448, format=KvFormat.FP8_GROUP)
        outputs[name] = attend(which, q, cache, table)
    assert torch.equal(outputs["huge"], outputs["small"])
    for huge_page, small_page in zip(tables["huge"][0], tables["small"][0], strict=True):
        assert torch.equal(huge[huge_page], small[small_page])
    assert not huge[0].any()
    # where ids or offsets that wrapped at 32 bits would have ended up
    for wrapped in ((32_999 * 65536) % 2**31 // 65536, (32_999 * 131072) % 2**32 // 131072):
        assert not huge[wrapped].any()


def attend(which: str, q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    batch = TokenBatch(starts=(299,), counts=(len(q),), device=CPU)
    plan, call = chosen(which, sparse_attention)
    planned = plan(
        batch,
        ratio=0,
        window_tokens=128,
        window_table=table,
        window_page_tokens=128,
        compressed_table=None,
        entries_per_page=0,
        num_heads=q.shape[1],
        head_dim=512,
        topk=0,
    )
    return call(
        q,
        cache,
        window_table_BP=table,
        compressed_cache_CSD=None,
        compressed_table_BP=None,
        selected_TK=None,
        sinks_H=torch.zeros(q.shape[1]),
        batch=batch,
        plan=planned,
        ratio=0,
        window_tokens=128,
        scale=512**-0.5,
        sink_in_peak=False,
    )


@WHICH
def test_index_keys_are_found_past_two_to_the_31_elements(which):
    huge, small = untouched(530_000, 32, 128, torch.bfloat16), torch.zeros(3, 32, 128, dtype=torch.bfloat16)
    assert huge.numel() > 2**31
    batch = TokenBatch(starts=(250,), counts=(1,), device=CPU)
    keys, q = torch.randn(62, 128).to(torch.bfloat16), torch.randn(1, 8, 128).to(torch.bfloat16)
    weights = torch.randn(1, 8).to(torch.bfloat16)
    plan, call = chosen(which, select_entries)
    picked = []
    for cache, table in ((huge, torch.tensor([[529_999, 524_288]])), (small, torch.tensor([[2, 1]]))):
        slots = rows_of(table, torch.zeros(62, dtype=torch.int64), torch.arange(62), per_page=32)
        write_index_keys(cache, keys, slots, format=IndexFormat.FP4_GROUP)
        settings = {"batch": batch, "ratio": 4, "topk": 20}
        planned = plan(**settings, key_table=table, keys_per_page=32, num_heads=8, head_dim=128)
        picked.append(
            call(
                q,
                weights,
                key_cache_CSD=cache,
                key_table_BP=table,
                plan=planned,
                format=IndexFormat.FP4_GROUP,
                **settings,
            )
        )
    assert torch.equal(picked[0], picked[1])


def test_compressor_state_is_kept_past_two_to_the_32_bytes():
    width = 512
    huge, small = untouched(70_000, 8, 4 * width, torch.float32), torch.zeros(4, 8, 4 * width)
    assert huge.numel() * 4 > 2**32
    weights = CompressorWeights(
        tuple(StoredWeight(torch.randn(2 * width, 8), None, WeightFormat.PLAIN) for _ in range(2)),
        torch.randn(4, 2 * width),
        torch.ones(width),
    )
    x = torch.randn(12, 8)
    entries = []
    for cache, table in ((huge, torch.tensor([[69_999, 65_536]])), (small, torch.tensor([[3, 1]]))):
        parts = []
        for start, count in ((0, 7), (7, 5)):
            plan = plan_compression(
                TokenBatch(starts=(start,), counts=(count,), device=CPU),
                ratio=4,
                overlap=True,
                state_table=table,
                state_page_tokens=8,
                entry_table=torch.tensor([[1]]),
                entries_per_page=32,
                frequencies=rope_frequencies(64, theta=160000.0),
            )
            parts.append(
                compress(
                    x[start : start + count],
                    weights,
                    cache,
                    plan,
                    overlap=True,
                    eps=1e-6,
                    rounded_once=False,
                )
            )
        entries.append(torch.cat(parts))
    assert torch.equal(entries[0], entries[1])
    assert torch.equal(huge[[69_999, 65_536]], small[[3, 1]])
    assert not huge[(69_999 * 65536) % 2**32 // 65536].any()
