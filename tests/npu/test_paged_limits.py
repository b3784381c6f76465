"""Limits of the kernels over paged caches, which are written twice: adapter and simulator refuse alike.

Every adapter runs once at the sizes of Flash with nothing waived, then one step outside of each limit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.errors import SimulatorError
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import Implementation, Operator
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.batch import TokenBatch
from ascend_v4.operators.contracts.cache import write_index_keys, write_kv
from ascend_v4.operators.contracts.compressor import CompressorWeights, compress
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.quantize import StoredWeight, WeightFormat
from ascend_v4.operators.contracts.rope import rope_frequencies
from ascend_v4.operators.npu.index_keys import key_storage
from ascend_v4.operators.npu.rows import kv_storage
from tests.npu.expert_blocks import candidate
from tests.npu.paged_scenes import CPU, INDEX_FORMAT, KV_FORMAT, planned_by, prepared_by

FLASH = {
    "hidden": 4096,
    "heads": 64,
    "head_dim": 512,
    "row_width": 512,
    "rope_dim": 64,
    "nope_dim": 448,
    "topk": 512,
    "index_heads": 64,
    "index_head_dim": 128,
    "window_block": 128,
    "csa_block": 32,
    "hca_block": 16,
}
BATCH = TokenBatch(starts=(0,), counts=(4,), device=CPU)
Sizes = Mapping[str, int]


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def table() -> torch.Tensor:
    return torch.ones(1, 1, dtype=torch.int64)


def attend(chosen: Implementation, chip: Chip, sizes: Sizes) -> None:
    width, topk = sizes["head_dim"], sizes["topk"]
    storage = kv_storage(width=width, nope_dim=width - 64, format=KV_FORMAT[chip], dtype=torch.bfloat16)
    window, entries = (storage.pack(zeros(2, sizes[block], width)) for block in ("window_block", "csa_block"))
    plan = planned_by(
        chosen,
        {
            "batch": BATCH,
            "ratio": 4,
            "window_tokens": 128,
            "window_table": table(),
            "window_page_tokens": sizes["window_block"],
            "compressed_table": table(),
            "entries_per_page": sizes["csa_block"],
            "num_heads": sizes["heads"],
            "head_dim": width,
            "topk": topk,
        },
    )
    selected = torch.full((4, topk), -1, dtype=torch.int32)
    selected[3, 0] = 0
    chosen.call(
        zeros(4, sizes["heads"], width),
        window,
        window_table_BP=table(),
        compressed_cache_CSD=entries,
        compressed_table_BP=table(),
        selected_TK=selected,
        sinks_H=torch.zeros(sizes["heads"]),
        batch=BATCH,
        plan=plan,
        ratio=4,
        window_tokens=128,
        scale=512**-0.5,
        sink_in_peak=True,
    )


def index(chosen: Implementation, chip: Chip, sizes: Sizes) -> None:
    heads, width, rows = sizes["index_heads"], sizes["index_head_dim"], sizes["csa_block"]
    storage = key_storage(width=width, format=INDEX_FORMAT[chip], dtype=torch.bfloat16)
    arguments = {
        "batch": BATCH,
        "ratio": 4,
        "topk": sizes["topk"],
        "key_table": table(),
        "keys_per_page": rows,
        "num_heads": heads,
        "head_dim": width,
    }
    chosen.call(
        torch.randn(4, heads, width).bfloat16(),
        zeros(4, heads),
        key_cache_CSD=storage.pack(torch.randn(2, rows, width)),
        key_table_BP=table(),
        batch=BATCH,
        plan=planned_by(chosen, arguments),
        ratio=4,
        topk=sizes["topk"],
        format=INDEX_FORMAT[chip],
    )


def pool(chosen: Implementation, chip: Chip, sizes: Sizes) -> None:
    for width in (sizes["head_dim"], sizes["index_head_dim"]):
        part = StoredWeight(zeros(2 * width, sizes["hidden"]), None, WeightFormat.PLAIN)
        weights = CompressorWeights((part, part), torch.zeros(4, 2 * width), zeros(width))
        arguments = {
            "batch": BATCH,
            "ratio": 4,
            "overlap": True,
            "state_table": table(),
            "state_page_tokens": 8,
            "entry_table": table(),
            "entries_per_page": 32,
            "frequencies": rope_frequencies(sizes["rope_dim"], theta=10000.0),
        }
        plan = planned_by(chosen, arguments)
        state = torch.zeros(2, 8, 4 * width)
        settings = {"overlap": True, "eps": 1e-6, "rounded_once": True}
        chosen.call(zeros(4, sizes["hidden"]), prepared_by(chosen, weights), state, plan, **settings)


def write_rows(chosen: Implementation, chip: Chip, sizes: Sizes) -> None:
    width, format = sizes["row_width"], KV_FORMAT[chip]
    storage = kv_storage(width=width, nope_dim=width - 64, format=format, dtype=torch.bfloat16)
    cache = storage.pack(zeros(2, 16, width))
    chosen.call(cache, zeros(1, width), torch.tensor([16]), nope_dim=width - 64, format=format)


def write_keys(chosen: Implementation, chip: Chip, sizes: Sizes) -> None:
    width = sizes["index_head_dim"]
    storage = key_storage(width=width, format=INDEX_FORMAT[chip], dtype=torch.bfloat16)
    cache = storage.pack(zeros(2, 32, width))
    chosen.call(cache, torch.randn(1, width).bfloat16(), torch.tensor([32]), format=INDEX_FORMAT[chip])


RUNS: dict[str, Callable[[Implementation, Chip, Sizes], None]] = {
    "sparse_attention": attend,
    "select_entries": index,
    "compress": pool,
    "write_kv": write_rows,
    "write_index_keys": write_keys,
}
BOTH, NEW = ("vllm-ascend", "cann-recipes"), (Chip.A3, Chip.A950)
WHERE: list[tuple[Operator, str, Chip]] = [
    *((sparse_attention, provider, chip) for provider in BOTH for chip in NEW),
    *((select_entries, provider, chip) for provider in (*BOTH, "torch_npu") for chip in NEW),
    *((compress, provider, chip) for provider in BOTH for chip in NEW),
    *((write_kv, "vllm-ascend", chip) for chip in NEW),
    (write_kv, "cann-recipes", Chip.A3),
    (write_index_keys, "vllm-ascend", Chip.A950),
]
OUTSIDE = {
    ("sparse_attention", Chip.A3): [("heads", 66), ("head_dim", 448), ("topk", 513), ("csa_block", 24)],
    ("sparse_attention", Chip.A950): [("heads", 32), ("head_dim", 448), ("topk", 256), ("csa_block", 24)],
    ("select_entries", Chip.A3): [("index_heads", 65), ("topk", 2049), ("csa_block", 24)],
    ("select_entries", Chip.A950): [("index_heads", 65), ("topk", 2049), ("csa_block", 24)],
    ("compress", Chip.A3): [("hidden", 4160), ("hidden", 512), ("head_dim", 256), ("rope_dim", 32)],
    ("compress", Chip.A950): [("hidden", 4160), ("hidden", 10752), ("index_head_dim", 64)],
    ("write_kv", Chip.A3): [("row_width", 256)],
    ("write_kv", Chip.A950): [("row_width", 576)],
    ("write_index_keys", Chip.A950): [("index_head_dim", 64)],
}
CASES = [
    pytest.param(
        declared, provider, chip, size, value, id=f"{declared.name}-{provider}-{chip.value}-{size}-{value}"
    )
    for declared, provider, chip in WHERE
    for size, value in OUTSIDE[declared.name, chip]
    if not (declared is write_kv and chip is Chip.A3 and provider == "vllm-ascend")
]


@pytest.fixture(autouse=True)
def without_simulator_afterwards():
    yield
    simulator.uninstall()


@pytest.mark.parametrize(
    ("declared", "provider", "chip"), WHERE, ids=[f"{d.name}-{p}-{c.value}" for d, p, c in WHERE]
)
def test_the_sizes_of_flash_are_taken_unwaived(declared, provider, chip):
    simulator.install(chip)
    implementation = candidate(declared, provider, chip)
    target = Target(device="sim", chip=chip, packages=simulator.packages(chip))
    assert implementation.refusal(target, FLASH) is None
    RUNS[declared.name](implementation, chip, FLASH)


@pytest.mark.parametrize(("declared", "provider", "chip", "size", "value"), CASES)
def test_adapter_and_simulator_refuse_the_same_sizes(declared, provider, chip, size, value):
    simulator.install(chip)
    implementation = candidate(declared, provider, chip)
    target = Target(device="sim", chip=chip, packages=simulator.packages(chip))
    sizes = {**FLASH, size: value}
    assert size in (implementation.refusal(target, sizes) or "")
    with pytest.raises(SimulatorError):
        RUNS[declared.name](implementation, chip, sizes)
