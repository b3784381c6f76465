"""Adapters over paged caches on tensors without values, at the sizes of Flash and Pro.

Meta tensors have nothing to read: an adapter that asks its inputs for a value fails here, and so would the
capture of a decoding step.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from ascend_v4.device.soc import Chip
from ascend_v4.operators import simulator
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import Plan, TokenBatch
from ascend_v4.operators.contracts.cache import write_index_keys, write_kv
from ascend_v4.operators.contracts.compressor import CompressorWeights, compress
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat
from ascend_v4.operators.contracts.rope import RopeFrequencies
from ascend_v4.operators.npu.index_keys import key_storage
from ascend_v4.operators.npu.rows import kv_storage
from ascend_v4.operators.select import load_backend
from tests.npu.paged_scenes import ENTRIES_PER_PAGE, INDEX_FORMAT, KV_FORMAT, STATE_PAGE, prepared_by

META = torch.device("meta")
WIDTH, NOPE, ROPE, INDEX_HEADS, INDEX_WIDTH, PAGES = 512, 448, 64, 64, 128, 30_000
BATCH = TokenBatch(starts=(65_000, 127, 0), counts=(1, 2, 300), device=META)


@dataclass(frozen=True)
class Size:
    hidden: int
    heads: int
    topk: int


SIZES = {"flash": Size(4096, 64, 512), "pro": Size(7168, 128, 1024)}


@pytest.fixture(params=Chip, ids=lambda chip: chip.value)
def chip(request):
    simulator.install(request.param)
    yield request.param
    simulator.uninstall()


@pytest.fixture(params=SIZES)
def size(request):
    return SIZES[request.param]


def on_chip(declared, chip: Chip) -> list[Any]:
    load_backend("npu")
    there = [each for each in declared.implementations if each.backend == "npu"]
    found = [each for each in there if chip in (each.needs.chips or tuple(Chip))]
    assert len(found) >= 2
    return found


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def table(pages: int) -> Tensor:
    return empty(len(BATCH.counts), pages, dtype=torch.int64)


def stored(storage, rows: int) -> Tensor:
    return empty(PAGES, rows, storage.width, dtype=storage.dtype)


def all_on_device(plan: Plan) -> Plan:
    """The plan, of which nothing may be left on the host."""
    parts = {field.name: getattr(plan, field.name) for field in fields(plan)}  # type: ignore[arg-type]
    left = [name for name, part in parts.items() if isinstance(part, Tensor) and part.device != META]
    assert left == [], f"{left} of the plan stayed on the host"
    return plan


@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_attention_asks_for_no_value(chip, size, ratio):
    storage = kv_storage(width=WIDTH, nope_dim=NOPE, format=KV_FORMAT[chip], dtype=torch.bfloat16)
    topk = size.topk if ratio == 4 else 0
    entries = table(512) if ratio else None
    for implementation in on_chip(sparse_attention, chip):
        plan = implementation.plan(
            BATCH,
            ratio=ratio,
            window_tokens=128,
            window_table=table(512),
            window_page_tokens=128,
            compressed_table=entries,
            entries_per_page=ENTRIES_PER_PAGE.get(ratio, 0),
            num_heads=size.heads,
            head_dim=WIDTH,
            topk=topk,
        )
        q_THD = empty(BATCH.num_tokens, size.heads, WIDTH)
        got = implementation.call(
            q_THD,
            stored(storage, 128),
            window_table_BP=table(512),
            compressed_cache_CSD=stored(storage, ENTRIES_PER_PAGE[ratio]) if ratio else None,
            compressed_table_BP=entries,
            selected_TK=empty(BATCH.num_tokens, topk, dtype=torch.int32) if topk else None,
            sinks_H=empty(size.heads, dtype=torch.float32),
            batch=BATCH,
            plan=all_on_device(plan),
            ratio=ratio,
            window_tokens=128,
            scale=WIDTH**-0.5,
            sink_in_peak=True,
        )
        assert (got.shape, got.dtype) == (q_THD.shape, torch.bfloat16)


def test_the_indexer_asks_for_no_value(chip, size):
    storage = key_storage(width=INDEX_WIDTH, format=INDEX_FORMAT[chip], dtype=torch.bfloat16)
    for implementation in on_chip(select_entries, chip):
        plan = implementation.plan(
            BATCH,
            ratio=4,
            topk=size.topk,
            key_table=table(512),
            keys_per_page=32,
            num_heads=INDEX_HEADS,
            head_dim=INDEX_WIDTH,
        )
        got = implementation.call(
            empty(BATCH.num_tokens, INDEX_HEADS, INDEX_WIDTH),
            empty(BATCH.num_tokens, INDEX_HEADS),
            key_cache_CSD=stored(storage, 32),
            key_table_BP=table(512),
            batch=BATCH,
            plan=all_on_device(plan),
            ratio=4,
            topk=size.topk,
            format=INDEX_FORMAT[chip],
        )
        assert (got.shape, got.dtype) == ((BATCH.num_tokens, size.topk), torch.int32)


@pytest.mark.parametrize(("ratio", "width"), [(4, WIDTH), (4, INDEX_WIDTH), (128, WIDTH)])
def test_the_compressor_asks_for_no_value(chip, size, ratio, width):
    half = width * (2 if ratio == 4 else 1)
    part = StoredWeight(empty(half, size.hidden), None, WeightFormat.PLAIN)
    weights = CompressorWeights((part, part), empty(ratio, half, dtype=torch.float32), empty(width))
    completed = sum(
        end // ratio - start // ratio for start, end in zip(BATCH.starts, BATCH.ends, strict=True)
    )
    for implementation in on_chip(compress, chip):
        plan = implementation.plan(
            BATCH,
            ratio=ratio,
            overlap=ratio == 4,
            state_table=table(9000),
            state_page_tokens=STATE_PAGE[ratio],
            entry_table=table(512),
            entries_per_page=ENTRIES_PER_PAGE[ratio],
            frequencies=RopeFrequencies(empty(ROPE // 2, dtype=torch.float32)),
        )
        got = implementation.call(
            empty(BATCH.num_tokens, size.hidden),
            prepared_by(implementation, weights),
            empty(PAGES, STATE_PAGE[ratio], 2 * half, dtype=torch.float32),
            all_on_device(plan),
            overlap=ratio == 4,
            eps=1e-6,
            rounded_once=True,
        )
        assert (got.shape, got.dtype) == ((completed, width), torch.bfloat16)


def test_cache_writes_ask_for_no_value(chip):
    kv_format, index_format = KV_FORMAT[chip], INDEX_FORMAT[chip]
    kv = kv_storage(width=WIDTH, nope_dim=NOPE, format=kv_format, dtype=torch.bfloat16)
    keys = key_storage(width=INDEX_WIDTH, format=index_format, dtype=torch.bfloat16)
    slots_T = empty(300, dtype=torch.int64)
    for writer in on_chip(write_kv, chip):
        writer.call(stored(kv, 128), empty(300, WIDTH), slots_T, nope_dim=NOPE, format=kv_format)
    for writer in on_chip(write_index_keys, chip):
        writer.call(stored(keys, 32), empty(300, INDEX_WIDTH), slots_T, format=index_format)
