"""Storage formats: FRACTAL_NZ really permutes the bytes of a storage, and the storage remembers it.

A tensor keeps its logical shape, as on the chip. An operator that does not know NZ reads permuted numbers;
a matmul kernel asks `to_nd` for them in order, and says how wide the fractals are that it reads. Views share
the storage and with it the format; a copy by any torch operator forgets it, and its numbers are scrambled.

Sources: FormatHelper.cpp of torch_npu (element sizes above two bytes count as two, hence the wide fractals of
INT32), aclnnNpuFormatCast of CANN (fractals of 32 bytes, or as additionalDtype says).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.simulator.dtypes import dtype_of
from ascend_v4.operators.simulator.kernels import ALL_CHIPS, kernel
from ascend_v4.operators.simulator.state import SimulatedChip, require

ND = 2
NCHW = 0
NCDHW = 30
FRACTAL_NZ = 29
BASE_FORMATS = (ND, NCHW, NCDHW)

FRACTAL_ROWS = 16
FRACTAL_BYTES = 32
"""Bytes of a fractal's row where the format follows the dtype of the values: 16 bf16, 32 int8, 64 int4."""
MX_FP4_FRACTAL_BYTES = 16
"""The same for FP4 weights cast with customize_dtype float8_e4m3fn: 32 values, which are half a byte each."""

NZ_DTYPES = (torch.int8, torch.uint8, torch.int32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
STORAGE_ATTRIBUTE = "_simulated_format"


@dataclass(frozen=True, slots=True)
class NzFormat:
    """How the bytes of one storage are permuted."""

    shape: tuple[int, ...]
    """Logical, in elements of the dtype that was cast."""
    itemsize: int
    fractal_bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one logical row."""
        return self.shape[-1] * self.itemsize


def nz_format_of(tensor: Tensor) -> NzFormat | None:
    """The permutation of the tensor's storage, or None for plain row-major bytes."""
    if tensor.device.type == "meta":
        return None
    return getattr(tensor.untyped_storage(), STORAGE_ATTRIBUTE, None)


def is_nz(tensor: Tensor) -> bool:
    """Whether the tensor's storage is FRACTAL_NZ."""
    return nz_format_of(tensor) is not None


def format_of(tensor: Tensor) -> int:
    """ACL format number, as torch_npu.get_npu_format returns it."""
    if is_nz(tensor):
        return FRACTAL_NZ
    return {4: NCHW, 5: NCDHW}.get(tensor.dim(), ND)


def to_nz(values: Tensor, operator: str, *, fractal_bytes: int, values_per_byte: int = 1) -> Tensor:
    """A tensor of the same shape and dtype whose storage is FRACTAL_NZ.

    The last two axes are cut into fractals of 16 rows by fractal_bytes, column of fractals after column.
    values_per_byte is 2 for packed FP4. Raises SimulatorError for a shape that does not fill whole fractals.
    """
    require(values.dim() >= 2, operator, f"a rank of 2 or more is needed, this is {tuple(values.shape)}")
    require(values.numel() > 0, operator, f"an empty tensor {tuple(values.shape)} cannot be cast")
    require(values.is_contiguous(), operator, "the values must be contiguous; call .contiguous() first")
    *_, rows, columns = values.shape
    row_bytes = columns * values.dtype.itemsize
    require(
        rows % FRACTAL_ROWS == 0 and row_bytes % fractal_bytes == 0,
        operator,
        f"{tuple(values.shape)} of {values.dtype} does not fill FRACTAL_NZ: the last axis but one must be a "
        f"multiple of {FRACTAL_ROWS}, the last of {fractal_bytes * values_per_byte // values.dtype.itemsize}",
    )
    found = NzFormat(tuple(values.shape), values.dtype.itemsize, fractal_bytes)
    plain = (
        values.detach()
        .view(torch.uint8)
        .reshape(-1, rows // FRACTAL_ROWS, FRACTAL_ROWS, row_bytes // fractal_bytes, fractal_bytes)
    )
    permuted = plain.permute(0, 3, 1, 2, 4).clone(memory_format=torch.contiguous_format)
    setattr(permuted.untyped_storage(), STORAGE_ATTRIBUTE, found)
    return permuted.view(-1).view(values.dtype).view(values.shape)


def to_nd(tensor: Tensor, operator: str, *, fractal_bytes: int = FRACTAL_BYTES) -> Tensor:
    """The tensor's numbers in row-major order: itself when it is not NZ, else an unpermuted copy.

    fractal_bytes is the width that the calling kernel reads: 32, or MX_FP4_FRACTAL_BYTES. Views by dtype, by
    leading axes and with the last two axes swapped are seen as they were meant.
    Raises SimulatorError for a storage permuted with other fractals (an INT32 view taken before the cast),
    and for a view that cuts through the matrices.
    """
    found = nz_format_of(tensor)
    if found is None:
        return tensor
    require(
        found.fractal_bytes == fractal_bytes,
        operator,
        f"the weight was cast to FRACTAL_NZ with fractals of {found.fractal_bytes} bytes, the kernel reads "
        f"{fractal_bytes}; cast it in the type of its values, before any view as another type",
    )
    rows = found.shape[-2]
    matrix_bytes = rows * found.row_bytes
    size, stride = tensor.shape[-2:], tensor.stride()[-2:]
    whole = sorted(zip(stride, size, strict=True)) == [
        (1, found.row_bytes // tensor.dtype.itemsize),
        (found.row_bytes // tensor.dtype.itemsize, rows),
    ]
    offset_bytes = tensor.storage_offset() * tensor.dtype.itemsize
    require(
        whole and offset_bytes % matrix_bytes == 0,
        operator,
        f"a view {tuple(tensor.shape)} with strides {tensor.stride()} cuts through FRACTAL_NZ matrices of "
        f"{found.shape[-2:]}; only whole matrices can be taken",
    )
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    permuted = storage.view(
        -1, found.row_bytes // fractal_bytes, rows // FRACTAL_ROWS, FRACTAL_ROWS, fractal_bytes
    )
    plain = permuted.permute(0, 2, 3, 1, 4).clone(memory_format=torch.contiguous_format)
    plain = plain.view(-1).view(tensor.dtype)
    return plain.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def unpack_int4(packed: Tensor) -> Tensor:
    """Signed 4-bit values as int8, last axis 8 times (int32) or 2 times (int8) as long, low nibble first."""
    codes = packed.contiguous().view(torch.uint8)
    pairs = torch.stack((codes & 0xF, codes >> 4), dim=-1).flatten(-2).to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs)


def pack_int4(values: Tensor) -> Tensor:
    """int32 that carry 8 signed 4-bit values each, the first in the lowest bits."""
    nibbles = values.to(torch.uint8) & 0xF
    return (nibbles[..., ::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32)


def _same(sim: SimulatedChip, *, input: Tensor, **_: object) -> Tensor:
    return torch.empty_like(input)


def _fractal_bytes(
    sim: SimulatedChip, operator: str, values: Tensor, customize_dtype: int | None, input_dtype: int | None
) -> tuple[int, int]:
    """Bytes of a fractal's row and values per byte."""
    if customize_dtype is None and input_dtype is None:
        require(
            values.dtype in NZ_DTYPES,
            operator,
            f"{values.dtype} has no FRACTAL_NZ form here; cast weights of {NZ_DTYPES}",
        )
        return FRACTAL_BYTES // min(values.dtype.itemsize, 2) * values.dtype.itemsize, 1
    require(
        sim.is_950,
        operator,
        "customize_dtype and input_dtype are for Ascend 950; cast without them on A2 and A3",
    )
    fp4 = input_dtype is not None and dtype_of(input_dtype, operator) is torch.float4_e2m1fn_x2
    if fp4:
        require(values.dtype is torch.uint8, operator, f"packed FP4 comes as uint8, this is {values.dtype}")
    width = dtype_of(customize_dtype, operator) if customize_dtype is not None else values.dtype
    if fp4:
        known = {torch.float8_e4m3fn: MX_FP4_FRACTAL_BYTES, torch.float4_e2m1fn_x2: FRACTAL_BYTES}
        require(
            customize_dtype is not None and width in known,
            operator,
            f"FP4 weights take customize_dtype float8_e4m3fn or float4_e2m1fn_x2, this is {width}",
        )
        return known[width], 2
    require(
        input_dtype is None or dtype_of(input_dtype, operator) is values.dtype,
        operator,
        f"input_dtype says {input_dtype} and the values are {values.dtype}",
    )
    if values.dtype is torch.int32:
        require(
            width in (torch.float16, torch.bfloat16),
            operator,
            f"INT32 takes customize_dtype float16 or bfloat16, this is {width}",
        )
        return FRACTAL_BYTES // width.itemsize * values.dtype.itemsize, 1
    require(width is values.dtype, operator, f"{values.dtype} cannot be cast with customize_dtype {width}")
    return FRACTAL_BYTES, 1


def _cast(
    sim: SimulatedChip,
    operator: str,
    values: Tensor,
    acl_format: int,
    *,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> Tensor:
    require(
        acl_format in (*BASE_FORMATS, FRACTAL_NZ),
        operator,
        f"format {acl_format} is not simulated; ND is {ND}, FRACTAL_NZ {FRACTAL_NZ}",
    )
    found = nz_format_of(values)
    if acl_format != FRACTAL_NZ:
        return (
            values.clone()
            if found is None
            else to_nd(values, operator, fractal_bytes=found.fractal_bytes).contiguous()
        )
    if found is not None:
        return values
    if not internal_format_allowed():
        warnings.warn(
            "torch.npu.config.allow_internal_format is off: the tensor stays in its base format", stacklevel=2
        )
        return values.clone()
    fractal_bytes, per_byte = _fractal_bytes(sim, operator, values, customize_dtype, input_dtype)
    return to_nz(values, operator, fractal_bytes=fractal_bytes, values_per_byte=per_byte)


def internal_format_allowed() -> bool:
    """What torch.npu.config says, where the simulator or the vendor has put it; True without it."""
    config = getattr(getattr(torch, "npu", None), "config", None)
    return bool(getattr(config, "allow_internal_format", True))


@kernel("npu::npu_format_cast", meta=_same, chips=ALL_CHIPS)
def npu_format_cast(
    sim: SimulatedChip,
    *,
    input: Tensor,
    acl_format: int,
    customize_dtype: int | None,
    input_dtype: int | None,
) -> Tensor:
    """A copy in another storage format; with internal formats off, a warning and a plain copy."""
    return _cast(
        sim, "npu_format_cast", input, acl_format, customize_dtype=customize_dtype, input_dtype=input_dtype
    )


@kernel("npu::npu_format_cast.Tensor", meta=_same)
def npu_format_cast_like(
    sim: SimulatedChip,
    *,
    input: Tensor,
    dst: Tensor,
    customize_dtype: int | None,
    input_dtype: int | None,
) -> Tensor:
    """A copy in the storage format of another tensor."""
    return _cast(
        sim,
        "npu_format_cast",
        input,
        format_of(dst),
        customize_dtype=customize_dtype,
        input_dtype=input_dtype,
    )


@kernel("npu::_npu_format_cast", meta=_same)
def _npu_format_cast(sim: SimulatedChip, *, input: Tensor, acl_format: int) -> Tensor:
    return _cast(sim, "_npu_format_cast", input, acl_format)


@kernel("npu::_npu_format_cast.aclnn", meta=_same)
def _npu_format_cast_aclnn(
    sim: SimulatedChip,
    *,
    input: Tensor,
    acl_format: int,
    customize_dtype: int,
) -> Tensor:
    return _cast(sim, "_npu_format_cast", input, acl_format, customize_dtype=customize_dtype)


@kernel("npu::_npu_format_cast.input_dtype", meta=_same)
def _npu_format_cast_input_dtype(
    sim: SimulatedChip,
    *,
    input: Tensor,
    acl_format: int,
    customize_dtype: int,
    input_dtype: int,
) -> Tensor:
    return _cast(
        sim, "_npu_format_cast", input, acl_format, customize_dtype=customize_dtype, input_dtype=input_dtype
    )


@kernel("npu::get_npu_format", meta=lambda sim, *, input: ND)
def get_npu_format(sim: SimulatedChip, *, input: Tensor) -> int:
    """ACL format number of a tensor's storage."""
    return format_of(input)


def _int4pack_shape(sim: SimulatedChip, *, weight: Tensor, inner_k_tiles: int) -> Tensor:
    return weight.new_empty((*weight.shape[:-1], weight.shape[-1] // 8), dtype=torch.int32)


@kernel("npu::npu_convert_weight_to_int4pack", meta=_int4pack_shape)
def npu_convert_weight_to_int4pack(sim: SimulatedChip, *, weight: Tensor, inner_k_tiles: int) -> Tensor:
    """int32 values in [-8, 7], two axes, to int32 that carry eight each."""
    name = "npu_convert_weight_to_int4pack"
    require(weight.dim() == 2, name, f"the weight must have two axes, this is {tuple(weight.shape)}")
    require(weight.dtype is torch.int32, name, f"the weight must be int32, this is {weight.dtype}")
    require(not is_nz(weight), name, "the weight must be row-major, this one is FRACTAL_NZ")
    require(weight.shape[-1] % 8 == 0, name, f"the last axis must be a multiple of 8, is {weight.shape[-1]}")
    require(bool(((weight >= -8) & (weight <= 7)).all()), name, "values outside [-8, 7] do not fit four bits")
    return pack_int4(weight)
