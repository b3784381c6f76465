"""Cache writes against the contracts, on simulated chips: layouts, skipped rows, reserved pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.errors import ContractError
from ascend_v4.operators import simulator
from ascend_v4.operators.contracts.cache import write_index_keys, write_kv
from ascend_v4.operators.contracts.quantize import IndexFormat, KvFormat
from ascend_v4.operators.npu.index_keys import fp8_pages, int8_pages, key_storage, rotate_index
from ascend_v4.operators.npu.pages import scatter_by_vllm
from ascend_v4.operators.npu.rows import kv_storage, row_bytes
from tests.npu.expert_blocks import candidate
from tests.npu.paged_scenes import INDEX_FORMAT, KV_FORMAT, NOPE, WIDTH, install

PAGES, ROWS = 6, 32
CANDIDATES = [(chip, name) for chip in Chip for name in ("vllm-ascend", "cann-recipes", "torch_npu")]
KEY_CANDIDATES = [pair for pair in CANDIDATES if pair != (Chip.A950, "cann-recipes")]


def described(pair) -> str:
    return f"{pair[0].value}-{pair[1]}"


@pytest.fixture(params=CANDIDATES, ids=described)
def kv_writer(request):
    chip, provider = request.param
    install(chip)
    yield chip, candidate(write_kv, provider, chip)
    simulator.uninstall()


@pytest.fixture(params=KEY_CANDIDATES, ids=described)
def key_writer(request):
    chip, provider = request.param
    install(chip)
    yield chip, candidate(write_index_keys, provider, chip)
    simulator.uninstall()


def slots(count: int, *, skipped: tuple[int, ...] = ()) -> torch.Tensor:
    """Distinct rows outside page 0; -1 where a row is skipped."""
    drawn = torch.randperm((PAGES - 1) * ROWS)[:count] + ROWS
    drawn[list(skipped)] = -1
    return drawn


COUNTS = [(0, ()), (1, ()), (7, (0, 3, 6)), (3, (0, 1, 2)), (150, (5,))]


@pytest.mark.parametrize(("count", "skipped"), COUNTS)
def test_rows_of_key_values_agree_with_the_contract(kv_writer, count, skipped):
    chip, writer = kv_writer
    settings: dict[str, Any] = {"nope_dim": NOPE, "format": KV_FORMAT[chip]}
    storage = kv_storage(width=WIDTH, dtype=torch.bfloat16, **settings)
    before = storage.pack(torch.randn(PAGES, ROWS, WIDTH).bfloat16())
    kv_TD, slots_T = torch.randn(count, WIDTH).mul(20).bfloat16(), slots(count, skipped=skipped)
    want = storage.unpack(before)
    write_kv.reference(want, kv_TD, slots_T, **settings)
    got = before.clone()
    writer.call(got, kv_TD, slots_T, **settings)
    assert torch.equal(storage.unpack(got), want)
    assert torch.equal(got[0].view(torch.uint8), before[0].view(torch.uint8))


@pytest.mark.parametrize(("count", "skipped"), COUNTS)
def test_index_keys_agree_with_the_contract(key_writer, count, skipped):
    chip, writer = key_writer
    storage = key_storage(width=128, format=INDEX_FORMAT[chip], dtype=torch.bfloat16)
    before = storage.pack(torch.randn(PAGES, ROWS, 128))
    keys_TD, slots_T = torch.randn(count, 128).bfloat16(), slots(count, skipped=skipped)
    want = storage.unpack(before)
    write_index_keys.reference(want, keys_TD, slots_T, format=INDEX_FORMAT[chip])
    got = before.clone()
    writer.call(got, keys_TD, slots_T, format=INDEX_FORMAT[chip])
    writer.tolerance.require(storage.unpack(got), want)
    other = torch.ones(PAGES * ROWS, dtype=torch.bool)
    other[slots_T[slots_T >= 0]] = False
    unpacked, kept = storage.unpack(got).view(-1, 128), storage.unpack(before).view(-1, 128)
    assert torch.equal(unpacked[other], kept[other])


def test_keys_are_rotated_once_and_scaled(key_writer):
    chip, writer = key_writer
    storage = key_storage(width=128, format=INDEX_FORMAT[chip], dtype=torch.bfloat16)
    cache = torch.zeros(PAGES, ROWS, storage.width, dtype=torch.uint8)
    key_1D = torch.zeros(1, 128, dtype=torch.bfloat16)
    key_1D[0, 0] = 2.0
    writer.call(cache, key_1D, torch.tensor([ROWS + 3]), format=INDEX_FORMAT[chip])
    got = storage.unpack(cache)[1, 3]
    # the first row of the Walsh-Hadamard matrix is all ones
    torch.testing.assert_close(got, torch.full((128,), 2.0 * 128**-0.5), rtol=2**-7, atol=0.0)


def test_a_key_of_zeros_stays_zeros(key_writer):
    chip, writer = key_writer
    storage = key_storage(width=128, format=INDEX_FORMAT[chip], dtype=torch.bfloat16)
    cache = storage.pack(torch.randn(PAGES, ROWS, 128))
    keys_TD = torch.zeros(2, 128, dtype=torch.bfloat16)
    writer.call(cache, keys_TD, torch.tensor([ROWS, ROWS + 1]), format=INDEX_FORMAT[chip])
    assert bool((storage.unpack(cache)[1, :2] == 0).all())


def test_key_values_may_have_gaps_between_rows(kv_writer):
    chip, writer = kv_writer
    settings: dict[str, Any] = {"nope_dim": NOPE, "format": KV_FORMAT[chip]}
    storage = kv_storage(width=WIDTH, dtype=torch.bfloat16, **settings)
    wide = torch.randn(9, 2 * WIDTH).bfloat16()
    packed, strided = (storage.pack(torch.zeros(PAGES, ROWS, WIDTH)) for _ in range(2))
    slots_T = slots(9)
    writer.call(strided, wide[:, :WIDTH], slots_T, **settings)
    writer.call(packed, wide[:, :WIDTH].contiguous(), slots_T, **settings)
    assert torch.equal(packed.view(torch.uint8), strided.view(torch.uint8))


def test_rows_of_950_have_rope_first_then_codes_then_scales():
    storage = kv_storage(width=512, nope_dim=448, format=KvFormat.FP8_GROUP, dtype=torch.bfloat16)
    assert storage.width == row_bytes(512, 448) == 640
    numbers = torch.zeros(1, 1, 512)
    numbers[..., 448:] = torch.arange(64)
    numbers[..., 64:128] = 448.0
    row = storage.pack(numbers)[0, 0].view(torch.uint8)
    assert torch.equal(row[:128].view(torch.bfloat16).float(), torch.arange(64.0))
    assert torch.equal(row[128 + 64 : 128 + 128].view(torch.float8_e4m3fn).float(), torch.full((64,), 448.0))
    # 448 fits with a scale of 1, whose exponent byte is 127; the others have the smallest scale
    assert row[577] == 127
    assert row[576] == row[578] == row[582] < 127
    assert not bool(row[583:].any())
    assert torch.equal(storage.unpack(storage.pack(numbers)), numbers)


def test_int8_keys_have_all_codes_before_all_scales():
    storage = key_storage(width=128, format=IndexFormat.INT8, dtype=torch.bfloat16)
    cache = torch.arange(2 * 16 * storage.width).to(torch.uint8).view(2, 16, storage.width)
    codes, scales = int8_pages(cache)
    assert codes.shape == (2, 16, 128)
    assert torch.equal(codes.reshape(-1).view(torch.uint8), cache.view(-1)[: 2 * 16 * 128])
    assert torch.equal(scales.reshape(-1).view(torch.uint8), cache.view(-1)[2 * 16 * 128 :])
    assert codes.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()


def test_fp8_keys_have_each_pages_codes_before_its_scales():
    storage = key_storage(width=128, format=IndexFormat.FP8, dtype=torch.bfloat16)
    cache = torch.arange(2 * 32 * storage.width).to(torch.uint8).view(2, 32, storage.width)
    codes, scales = fp8_pages(cache)
    pages = cache.view(2, -1)
    assert torch.equal(codes[1].reshape(-1).view(torch.uint8), pages[1, : 32 * 128])
    assert torch.equal(scales[1].view(torch.uint8), pages[1, 32 * 128 :])


@pytest.mark.parametrize("format", [IndexFormat.INT8, IndexFormat.FP8])
def test_packed_keys_read_back_within_one_code(format):
    storage = key_storage(width=128, format=format, dtype=torch.bfloat16)
    keys = torch.randn(3, 16, 128)
    codes = 127 if format is IndexFormat.INT8 else 16
    assert bool(
        ((storage.unpack(storage.pack(keys)) - keys).abs() <= keys.abs().amax(-1, True) / codes).all()
    )


def test_rotating_twice_gives_the_input_back():
    keys_TD = torch.randn(5, 128).bfloat16()
    torch.testing.assert_close(rotate_index(rotate_index(keys_TD)), keys_TD, rtol=0.03, atol=0.03)


def test_a_cache_beyond_32_bit_offsets_is_refused():
    rows_ND = torch.empty((1 << 22) + 1, 512, dtype=torch.bfloat16, device="meta")
    update_TD = torch.empty(1, 512, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ContractError, match="32 bits"):
        scatter_by_vllm(rows_ND, update_TD, torch.tensor([1]))


FLASH = {"row_width": 512, "rope_dim": 64, "nope_dim": 448, "index_head_dim": 128, "csa_block": 32}
OUTSIDE = [
    (write_kv, Chip.A3, "cann-recipes", "row_width", 256),
    (write_kv, Chip.A950, "vllm-ascend", "row_width", 576),
    (write_kv, Chip.A950, "cann-recipes", "rope_dim", 32),
    (write_kv, Chip.A950, "torch_npu", "nope_dim", 416),
    (write_index_keys, Chip.A3, "cann-recipes", "index_head_dim", 64),
    (write_index_keys, Chip.A950, "vllm-ascend", "index_head_dim", 64),
    (write_index_keys, Chip.A950, "torch_npu", "csa_block", 16),
]


@pytest.mark.parametrize(("declared", "chip", "provider", "size", "value"), OUTSIDE)
def test_sizes_just_outside_a_writer_are_refused(declared, chip, provider, size, value):
    target = Target(device="sim", chip=chip, packages=simulator.packages(chip))
    implementation = candidate(declared, provider, chip)
    assert implementation.refusal(target, FLASH) is None
    assert size in (implementation.refusal(target, {**FLASH, size: value}) or "")
