"""FRACTAL_NZ: the bytes are where the format says, and only a kernel that knows it reads them right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.errors import SimulatorError
from ascend_v4.operators import simulator
from ascend_v4.operators.simulator.formats import (
    MX_FP4_FRACTAL_BYTES,
    format_of,
    is_nz,
    pack_int4,
    to_nd,
    unpack_int4,
)

NZ = 29
ND = 2


@pytest.fixture(autouse=True)
def a3():
    simulator.install(Chip.A3)
    yield
    simulator.uninstall()


def cast(values, acl_format=NZ, **types):
    return torch.ops.npu.npu_format_cast(values, acl_format, **types)


def weight(*shape, dtype=torch.int8):
    return torch.randint(-100, 100, shape).to(dtype)


@pytest.mark.parametrize(("dtype", "width"), [(torch.int8, 32), (torch.bfloat16, 16), (torch.float16, 16)])
def test_every_number_is_where_the_format_says(dtype, width):
    w = weight(2, 48, 3 * width, dtype=dtype)
    stored = cast(w).flatten()
    rows, columns = w.shape[1:]
    for e, k, n in [
        (0, 0, 0),
        (0, 1, 0),
        (0, 17, 1),
        (1, 47, columns - 1),
        (1, 16, width),
        (0, 5, width - 1),
    ]:
        column, inner = divmod(n, width)
        band, row = divmod(k, 16)
        place = (((e * (columns // width) + column) * (rows // 16) + band) * 16 + row) * width + inner
        assert stored[place] == w[e, k, n]


def test_shape_dtype_and_original_stay():
    w = weight(16, 64)
    before = w.clone()
    nz = cast(w)
    assert nz.shape == w.shape
    assert nz.dtype is w.dtype
    assert nz.is_contiguous()
    assert torch.equal(w, before)
    assert not is_nz(w)
    assert format_of(nz) == NZ


def test_numbers_come_back_through_every_view_that_keeps_matrices():
    w = weight(3, 32, 64)
    nz = cast(w)
    assert torch.equal(to_nd(nz, "kernel"), w)
    assert torch.equal(to_nd(nz[1], "kernel"), w[1])
    assert torch.equal(to_nd(nz[1:], "kernel"), w[1:])
    assert torch.equal(to_nd(nz.transpose(1, 2), "kernel"), w.transpose(1, 2))
    assert torch.equal(to_nd(nz.view(torch.int32), "kernel"), w.view(torch.int32))
    assert torch.equal(to_nd(torch.nn.Parameter(nz, requires_grad=False), "kernel"), w)
    assert torch.equal(cast(nz, ND), w)


def test_a_row_major_tensor_is_given_back_as_it_is():
    w = weight(3, 5)
    assert to_nd(w, "kernel") is w


def test_a_view_that_cuts_matrices_is_refused():
    nz = cast(weight(32, 64))
    for view in (nz[:16], nz[:, :32], nz.view(16, 128)):
        with pytest.raises(SimulatorError, match="cuts through"):
            to_nd(view, "kernel")


def test_a_copy_forgets_the_format_and_is_scrambled():
    w = weight(32, 64)
    copy = cast(w).clone()
    assert not is_nz(copy)
    assert not torch.equal(to_nd(copy, "kernel"), w)


def test_a_cast_after_the_int32_view_is_another_layout():
    w = weight(32, 64)
    after = cast(w.view(torch.int32))
    before = cast(w).view(torch.int32)
    assert not torch.equal(after, before)
    with pytest.raises(SimulatorError, match="before any view as another type"):
        to_nd(after, "kernel")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((17, 32), torch.int8), ((16, 48), torch.int8), ((16, 24), torch.bfloat16), ((16, 8), torch.int32)],
)
def test_sizes_that_do_not_fill_fractals_are_refused(shape, dtype):
    with pytest.raises(SimulatorError, match="does not fill FRACTAL_NZ"):
        cast(weight(*shape, dtype=dtype))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (torch.zeros(0, 32, dtype=torch.int8), "empty"),
        (torch.zeros(32, dtype=torch.int8), "rank of 2"),
        (torch.zeros(64, 32, dtype=torch.int8).T, "contiguous"),
        (torch.zeros(16, 16), "no FRACTAL_NZ form"),
    ],
)
def test_what_cannot_be_cast_is_refused(values, problem):
    with pytest.raises(SimulatorError, match=problem):
        cast(values)


def test_an_unknown_format_is_refused():
    with pytest.raises(SimulatorError, match="format 4 is not simulated"):
        cast(weight(16, 32), 4)


def test_without_internal_formats_the_cast_warns_and_copies():
    patched: Any = torch
    patched.npu.config.allow_internal_format = False
    w = weight(16, 32)
    with pytest.warns(UserWarning, match="allow_internal_format"):
        copy = cast(w)
    assert torch.equal(copy, w)
    assert not is_nz(copy)


def test_types_of_the_cast_are_for_950():
    with pytest.raises(SimulatorError, match="for Ascend 950"):
        cast(weight(16, 32), customize_dtype=torch.int8)
    simulator.install(Chip.A950)
    assert is_nz(cast(weight(16, 32), customize_dtype=torch.int8))
    with pytest.raises(SimulatorError, match="cannot be cast with customize_dtype"):
        cast(weight(16, 32), customize_dtype=torch.float16)


def test_fp4_weights_take_fractals_of_their_activation():
    simulator.install(Chip.A950)
    w = torch.randint(0, 256, (2, 32, 64), dtype=torch.uint8)
    nz = cast(w, customize_dtype=torch.float8_e4m3fn, input_dtype=296)
    assert torch.equal(nz.flatten()[:16], w[0, 0, :16])
    assert torch.equal(nz.flatten()[16:32], w[0, 1, :16])
    assert torch.equal(
        to_nd(nz.transpose(1, 2), "kernel", fractal_bytes=MX_FP4_FRACTAL_BYTES), w.transpose(1, 2)
    )
    with pytest.raises(SimulatorError, match="fractals of 16 bytes, the kernel reads 32"):
        to_nd(nz, "kernel")
    with pytest.raises(SimulatorError, match="dtype number 45"):
        cast(w, customize_dtype=torch.float8_e4m3fn, input_dtype=45)
    with pytest.raises(SimulatorError, match="uint8"):
        cast(w.view(torch.int8), customize_dtype=torch.float8_e4m3fn, input_dtype=296)


def test_int4_values_pack_low_nibble_first():
    values = torch.arange(-8, 8).view(2, 8)
    packed = pack_int4(values)
    assert packed[1].item() == 0x76543210
    assert torch.equal(unpack_int4(packed), values.to(torch.int8))
    assert torch.equal(unpack_int4(packed.view(torch.int8)), values.to(torch.int8))


def test_the_packing_operator_takes_int32_of_two_axes():
    values = torch.randint(-8, 8, (3, 16), dtype=torch.int32)
    packed = torch.ops.npu.npu_convert_weight_to_int4pack(values)
    assert packed.shape == (3, 2)
    assert torch.equal(unpack_int4(packed), values.to(torch.int8))
    for wrong, problem in (
        (values.to(torch.int8), "must be int32"),
        (values[None], "two axes"),
        (values[:, :12], "multiple of 8"),
        (values + 9, "four bits"),
    ):
        with pytest.raises(SimulatorError, match=problem):
            torch.ops.npu.npu_convert_weight_to_int4pack(wrong)
