"""Simulated matrix products: quantised, batched with transposed axes, and fused with a cast.

Integer products are exact. Sources: npu_quant_matmul, npu_fused_matmul, npu_transpose_batchmatmul and
npu_transpose_quant_batchmatmul in op-plugin, aclnnTransposeBatchMatMul in ops-nn, torch_npu's Meta kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ascend_v4.operators.simulator.dtypes import FLOAT8_E8M0FNU, dtype_of
from ascend_v4.operators.simulator.elements import FP4, FP8, MX_PAIR, decode_fp4, format_named, mx_values
from ascend_v4.operators.simulator.formats import MX_FP4_FRACTAL_BYTES, is_nz, to_nd
from ascend_v4.operators.simulator.kernels import A2_A3, ONLY_950, kernel
from ascend_v4.operators.simulator.quantize import HALVES, offset_of_words, require_absent, scale_of_words
from ascend_v4.operators.simulator.state import HF32_MASK, SimulatedChip, require

AXIS_LIMIT = 65535
"""Largest last axis of a matrix product's operands on A2 and A3."""
EXACT_TERMS = 1024
"""Products of two int8 that float32 sums without rounding."""
BATCH_ALIGNMENT = 16
MX_GROUPS = ([1, 1, 32], [0, 0, 32], [0, 1, 32], [1, 0, 32])


def integer_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Exact int32 product of [..., M, K] and [..., K, N] whose values fit 8 bits or so."""
    left, right = left.float(), right.float()
    total = None
    for start in range(0, left.shape[-1], EXACT_TERMS):
        part = left[..., start : start + EXACT_TERMS] @ right[..., start : start + EXACT_TERMS, :]
        total = part.to(torch.int32) if total is None else total + part.to(torch.int32)
    assert total is not None, "an inner axis of no values"
    return total


def is_transposed(matrix: Tensor) -> bool:
    """Whether the last two axes of a tensor are a transposed view of row-major memory."""
    rows, columns = matrix.shape[-2:]
    return matrix.stride(-2) == 1 and matrix.stride(-1) == rows and (rows > 1 or columns > 1)


def require_scale_bytes(operator: str, name: str, scale: Tensor, number: int | None) -> None:
    """Refuses E8M0 scales that are not announced by torch_npu's number or not of one byte."""
    require(
        number == FLOAT8_E8M0FNU,
        operator,
        f"{name}_dtype is {number}; E8M0 scales need torch_npu.float8_e8m0fnu ({FLOAT8_E8M0FNU}), "
        "torch's own number is refused",
    )
    require(scale.dtype.itemsize == 1, operator, f"{name} must be of one byte each, is {scale.dtype}")


def require_shape(operator: str, name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    """Refuses a tensor whose shape is none of those allowed."""
    require(
        tuple(tensor.shape) in allowed,
        operator,
        f"{name} is {tuple(tensor.shape)}, want {' or '.join(map(str, allowed))}",
    )


def _output_type(output_dtype: int | None, operator: str) -> torch.dtype:
    return torch.int8 if output_dtype is None else dtype_of(output_dtype, operator)


def _quant_matmul_meta(
    sim: SimulatedChip, *, x1: Tensor, x2: Tensor, output_dtype: int | None, **_: object
) -> Tensor:
    batch = max(x1.shape[:-2], x2.shape[:-2], key=len)
    dtype = _output_type(output_dtype, "npu_quant_matmul")
    return x1.new_empty((*batch, x1.shape[-2], x2.shape[-1]), dtype=dtype)


@kernel("npu::npu_quant_matmul", meta=_quant_matmul_meta)
def npu_quant_matmul(
    sim: SimulatedChip,
    *,
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    output_dtype: int | None,
    x1_dtype: int | None,
    x2_dtype: int | None,
    pertoken_scale_dtype: int | None,
    scale_dtype: int | None,
    group_sizes: Sequence[int] | None,
    y_scale: Tensor | None,
) -> Tensor:
    """x1 [.., M, K] by x2 [.., K, N]: int8 with scales per channel and token, or MX on Ascend 950."""
    name = "npu_quant_matmul"
    require_absent(name, x1_dtype=x1_dtype, y_scale=y_scale)
    require(min(x1.numel(), x2.numel(), scale.numel()) > 0, name, "x1, x2 and scale may not be empty")
    for what, operand in (("x1", x1), ("x2", x2)):
        require(2 <= operand.dim() <= 6, name, f"{what} has {operand.dim()} axes, want 2 to 6")
        require(
            sim.is_950 or operand.shape[-1] <= AXIS_LIMIT,
            name,
            f"the last axis of {what} is {operand.shape[-1]}, the limit is {AXIS_LIMIT}; split it",
        )
    dtype = _output_type(output_dtype, name)
    if x1.dtype in FP8:
        require(sim.is_950, name, f"{sim.chip.value} has no FP8 units")
        require_absent(name, offset=offset, bias=bias)
        require(pertoken_scale is not None, name, "MX operands need pertoken_scale")
        assert pertoken_scale is not None
        require_scale_bytes(name, "scale", scale, scale_dtype)
        require_scale_bytes(name, "pertoken_scale", pertoken_scale, pertoken_scale_dtype)
        require(group_sizes is not None, name, "MX operands need group_sizes such as [1, 1, 32]")
        require(list(group_sizes or ()) in MX_GROUPS, name, f"group_sizes is {group_sizes}, want [1, 1, 32]")
        require(
            dtype in (*HALVES, torch.float32), name, f"MX operands give a float type, output_dtype is {dtype}"
        )
        return _mx_matmul(x1, x2, scale=scale, pertoken_scale=pertoken_scale, x2_dtype=x2_dtype).to(dtype)
    require_absent(name, x2_dtype=x2_dtype, scale_dtype=scale_dtype, group_sizes=group_sizes)
    require(
        x1.dtype is torch.int8 and x2.dtype is torch.int8,
        name,
        f"x1 is {x1.dtype} and x2 {x2.dtype}; int8 operands are simulated, and MX ones on 950",
    )
    return _int8_matmul(
        sim, x1, x2, scale=scale, offset=offset, pertoken_scale=pertoken_scale, bias=bias, dtype=dtype
    )


def _int8_matmul(
    sim: SimulatedChip,
    x1: Tensor,
    x2: Tensor,
    *,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    name = "npu_quant_matmul"
    inner, width = x1.shape[-1], x2.shape[-1]
    require(
        x2.shape[-2] == inner,
        name,
        f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} do not share K; x2 is [K, N], transpose the weight",
    )
    require_shape(name, "scale", scale, (width,), (1,))
    _require_int8_types(dtype, scale=scale, offset=offset, pertoken_scale=pertoken_scale, bias=bias)
    total = integer_matmul(x1, to_nd(x2, name))
    if bias is not None:
        require_shape(name, "bias", bias, (width,), (*total.shape[:-2], 1, width))
    if bias is not None and bias.dtype is torch.int32:
        total = total + bias
    if dtype is torch.int32:
        return total
    factors = scale_of_words(scale) if scale.dtype is torch.int64 else scale.float()
    through_words = dtype is torch.int8 or (dtype is torch.float16 and pertoken_scale is None)
    if through_words and not sim.is_ideal:
        factors = (factors.contiguous().view(torch.int32) & HF32_MASK).view(torch.float32)
    result = total.float() * factors
    if pertoken_scale is not None:
        require_shape(name, "pertoken_scale", pertoken_scale, (x1.shape[-2],))
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype is not torch.int32:
        result = result + bias.float()
    if dtype is not torch.int8:
        return result.to(dtype)
    if scale.dtype is torch.int64:
        result = result + offset_of_words(scale)
    elif offset is not None:
        require_shape(name, "offset", offset, (width,), (1,))
        result = result + offset
    return result.round().clamp(-128, 127).to(torch.int8)


def _require_int8_types(
    dtype: torch.dtype,
    *,
    scale: Tensor,
    offset: Tensor | None,
    pertoken_scale: Tensor | None,
    bias: Tensor | None,
) -> None:
    """The table of types that the document allows on A2 and A3, by the type of the result."""
    name = "npu_quant_matmul"
    per_token = pertoken_scale is not None
    scales, biases = {
        torch.int8: ((torch.int64, torch.float32), (torch.int32,)),
        torch.int32: ((torch.float32, torch.bfloat16), (torch.int32,)),
        torch.bfloat16: (
            (torch.float32, torch.bfloat16),
            (torch.int32, torch.bfloat16, torch.float32),
        ),
        torch.float16: (
            (torch.float32,) if per_token else (torch.int64, torch.float32),
            (torch.int32, torch.float16, torch.float32) if per_token else (torch.int32,),
        ),
    }.get(dtype, ((), ()))
    require(bool(scales), name, f"output_dtype {dtype} is not a result of int8 operands")
    require(
        scale.dtype in scales,
        name,
        f"scale is {scale.dtype}; a {dtype} result takes {scales} (None as output_dtype means int8)",
    )
    require(
        not per_token or dtype in HALVES,
        name,
        f"pertoken_scale cannot be given with a {dtype} result (None as output_dtype means int8)",
    )
    require(
        pertoken_scale is None or pertoken_scale.dtype is torch.float32,
        name,
        "pertoken_scale must be float32",
    )
    require(bias is None or bias.dtype in biases, name, f"bias with a {dtype} result must be one of {biases}")
    require(
        offset is None or (dtype is torch.int8 and offset.dtype is torch.float32),
        name,
        "offset is float32 and for int8 results",
    )


def _mx_matmul(
    x1: Tensor, x2: Tensor, *, scale: Tensor, pertoken_scale: Tensor, x2_dtype: int | None
) -> Tensor:
    name = "npu_quant_matmul"
    packed = x2_dtype is not None and dtype_of(x2_dtype, name) is FP4
    require_absent(name, **({} if packed else {"x2_dtype": x2_dtype}))
    require(x1.dim() == 2 and x2.dim() == 2, name, "MX operands with two axes each are simulated")
    require(packed or x2.dtype in FP8, name, f"x2 is {x2.dtype}; give FP8, or packed FP4 with x2_dtype")
    inner, width = x1.shape[-1], x2.shape[-1]
    require(
        x2.shape[-2] * (2 if packed else 1) == inner,
        name,
        f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} do not share K; x2 is [K, N], packed along K for FP4",
    )
    require(
        is_transposed(x2) or (is_nz(x2) and not packed),
        name,
        "MX weights are read as a transposed view of [N, K]; do not make the view contiguous",
    )
    num_pairs = -(-inner // MX_PAIR)
    require_shape(name, "scale", scale, (num_pairs, width, 2))
    require_shape(name, "pertoken_scale", pertoken_scale, (x1.shape[-2], num_pairs, 2))
    return mx_values(x1, pertoken_scale.contiguous()) @ mx_weight(name, x2, scale, packed=packed).mT


def mx_weight(name: str, weight: Tensor, scale: Tensor, *, packed: bool) -> Tensor:
    """Float32 [.., N, K] of a weight [.., K, N] and scale pairs [.., ceil(K/64), N, 2]."""
    if packed:
        rows = to_nd(weight, name, fractal_bytes=MX_FP4_FRACTAL_BYTES).mT.contiguous()
        values = decode_fp4(rows)
    else:
        values = to_nd(weight, name).mT
    return mx_values(values, scale.transpose(-3, -2).contiguous())


def _fused_matmul_meta(
    sim: SimulatedChip, *, x1: Tensor, x2: Tensor, fused_op_type: str, **_: object
) -> Tensor:
    dtype = torch.float32 if fused_op_type == "16cast32" else x1.dtype
    return x1.new_empty((*x1.shape[:-1], x2.shape[-1]), dtype=dtype)


@kernel("npu::npu_fused_matmul", meta=_fused_matmul_meta, chips=ONLY_950)
def npu_fused_matmul(
    sim: SimulatedChip,
    *,
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None,
    x3: Tensor | None,
    fused_op_type: str,
) -> Tensor:
    """x1 [M, K] by x2 [K, N] and one operation; `16cast32` returns the float32 sums."""
    name = "npu_fused_matmul"
    operations = ("", "16cast32", "relu", "add", "mul")
    require(fused_op_type in operations, name, f"fused_op_type {fused_op_type!r} is not among {operations}")
    require(x1.dim() == 2 and x2.dim() == 2, name, "operands with two axes each are simulated")
    require(
        x1.dtype in HALVES and x2.dtype is x1.dtype,
        name,
        f"x1 is {x1.dtype} and x2 {x2.dtype}; both must be float16 or bfloat16 (float32 would need HF32)",
    )
    require(
        x1.shape[1] == x2.shape[0],
        name,
        f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} do not share K; x2 is [K, N]",
    )
    with_x3 = fused_op_type in ("add", "mul")
    require((x3 is not None) == with_x3, name, "x3 is needed by 'add' and 'mul' and by nothing else")
    result = x1.float() @ to_nd(x2, name).float()
    if bias is not None:
        require_shape(name, "bias", bias, (x2.shape[1],), (1, x2.shape[1]))
        result = result + bias.float()
    if x3 is not None:
        require_shape(name, "x3", x3, (x1.shape[0], x2.shape[1]))
        result = result + x3.float() if fused_op_type == "add" else result * x3.float()
    if fused_op_type == "relu":
        result = result.relu()
    return result if fused_op_type == "16cast32" else result.to(x1.dtype)


def _order(perm: Sequence[int] | None, default: tuple[int, int, int]) -> tuple[int, ...]:
    return tuple(perm) if perm else default


def _transpose_bmm_meta(
    sim: SimulatedChip,
    *,
    input: Tensor,
    weight: Tensor,
    perm_x1: Sequence[int] | None,
    perm_x2: Sequence[int] | None,
    batch_split_factor: int | None,
    **_: object,
) -> Tensor:
    batch, rows, _inner = (input.shape[axis] for axis in _order(perm_x1, (0, 1, 2)))
    width = weight.shape[_order(perm_x2, (0, 1, 2))[2]]
    factor = batch_split_factor or 1
    shape = (rows, batch, width) if factor == 1 else (factor, rows, batch * width // factor)
    return input.new_empty(shape)


@kernel("npu::npu_transpose_batchmatmul", meta=_transpose_bmm_meta, chips=A2_A3)
def npu_transpose_batchmatmul(
    sim: SimulatedChip,
    *,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    perm_x1: Sequence[int] | None,
    perm_x2: Sequence[int] | None,
    perm_y: Sequence[int] | None,
    batch_split_factor: int | None,
) -> Tensor:
    """Products per batch of permuted operands, [B, M, K] by [B, K, N], returned as [M, B, N]."""
    name = "npu_transpose_batchmatmul"
    require_absent(name, bias=bias, scale=scale)
    require(input.dim() == 3 and weight.dim() == 3, name, "both operands need three axes")
    require(
        input.dtype in (*HALVES, torch.float32) and weight.dtype is input.dtype,
        name,
        f"input is {input.dtype} and weight {weight.dtype}; one float type of 16 or 32 bits is needed",
    )
    orders = (_order(perm_x1, (0, 1, 2)), _order(perm_x2, (0, 1, 2)), _order(perm_y, (1, 0, 2)))
    for what, order, allowed in (
        ("perm_x1", orders[0], ((0, 1, 2), (1, 0, 2))),
        ("perm_x2", orders[1], ((0, 1, 2), (0, 2, 1))),
        ("perm_y", orders[2], ((1, 0, 2),)),
    ):
        require(order in allowed, name, f"{what} is {order}, want one of {allowed}")
    left, right = input.permute(orders[0]), to_nd(weight, name).permute(orders[1])
    batch, rows, inner = left.shape
    width = right.shape[-1]
    require(
        right.shape[:2] == (batch, inner),
        name,
        f"operands {tuple(left.shape)} and {tuple(right.shape)} do not fit after their permutations",
    )
    require(min(batch, rows, inner, width) > 0, name, "operands may not be empty")
    require(max(inner, width) <= AXIS_LIMIT, name, f"K {inner} and N {width} may be {AXIS_LIMIT} at most")
    require(
        inner % BATCH_ALIGNMENT == 0 and width % BATCH_ALIGNMENT == 0,
        name,
        f"K {inner} and N {width} must be multiples of {BATCH_ALIGNMENT}",
    )
    factor = batch_split_factor or 1
    require(
        1 <= factor <= width and width % factor == 0,
        name,
        f"batch_split_factor {factor} must divide N {width}",
    )
    result = (left.float() @ right.float()).transpose(0, 1).to(input.dtype).contiguous()
    if factor == 1:
        return result
    return result.view(rows, factor, -1).transpose(0, 1).contiguous()


def _transpose_quant_bmm_meta(
    sim: SimulatedChip,
    *,
    x1: Tensor,
    x2: Tensor,
    dtype: int,
    perm_x1: Sequence[int] | None,
    perm_x2: Sequence[int] | None,
    **_: object,
) -> Tensor:
    name = "npu_transpose_quant_batchmatmul"
    batch, rows, _inner = (x1.shape[axis] for axis in _order(perm_x1, (1, 0, 2)))
    width = x2.shape[_order(perm_x2, (0, 1, 2))[2]]
    return x1.new_empty((rows, batch, width), dtype=dtype_of(dtype, name))


@kernel("npu::npu_transpose_quant_batchmatmul", meta=_transpose_quant_bmm_meta, chips=ONLY_950)
def npu_transpose_quant_batchmatmul(
    sim: SimulatedChip,
    *,
    x1: Tensor,
    x2: Tensor,
    dtype: int,
    bias: Tensor | None,
    x1_scale: Tensor | None,
    x2_scale: Tensor | None,
    group_sizes: Sequence[int] | None,
    perm_x1: Sequence[int] | None,
    perm_x2: Sequence[int] | None,
    perm_y: Sequence[int] | None,
    batch_split_factor: int | None,
    x1_dtype: int | None,
    x2_dtype: int | None,
) -> Tensor:
    """MX products per batch, x1 [M, B, K] by x2 [B, K, N] or [B, N, K], returned as [M, B, N]."""
    name = "npu_transpose_quant_batchmatmul"
    require_absent(name, bias=bias, x1_dtype=x1_dtype, x2_dtype=x2_dtype)
    kind = format_named(dtype, name, HALVES)
    require(batch_split_factor == 1, name, f"batch_split_factor is {batch_split_factor}, want 1")
    for what, perm, allowed in (
        ("perm_x1", perm_x1, ([1, 0, 2],)),
        ("perm_x2", perm_x2, ([0, 1, 2], [0, 2, 1])),
        ("perm_y", perm_y, ([1, 0, 2],)),
    ):
        require(list(perm or ()) in allowed, name, f"{what} is {perm}, want one of {allowed}")
    require(list(group_sizes or ()) in MX_GROUPS, name, f"group_sizes is {group_sizes}, want [0, 0, 32]")
    require(
        x1.dim() == 3 and x2.dim() == 3 and x1.dtype is x2.dtype is torch.float8_e4m3fn,
        name,
        f"x1 {tuple(x1.shape)} is {x1.dtype} and x2 {tuple(x2.shape)} {x2.dtype}; want three axes of E4M3",
    )
    require(x1_scale is not None and x2_scale is not None, name, "MX operands need x1_scale and x2_scale")
    assert x1_scale is not None
    assert x2_scale is not None
    require(
        x1_scale.dtype is x2_scale.dtype is torch.float8_e8m0fnu,
        name,
        f"scales are {x1_scale.dtype} and {x2_scale.dtype}; view them as torch.float8_e8m0fnu",
    )
    as_rows = list(perm_x2 or ()) == [0, 2, 1]
    rows, batch, inner = x1.shape
    width = x2.shape[1 if as_rows else 2]
    require(
        tuple(x2.shape) == ((batch, width, inner) if as_rows else (batch, inner, width)),
        name,
        f"x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} do not fit perm_x2 {perm_x2}",
    )
    require(inner % MX_PAIR == 0, name, f"K is {inner}, it must be a multiple of {MX_PAIR}")
    pairs = inner // MX_PAIR
    require_shape(name, "x1_scale", x1_scale, (rows, batch, pairs, 2))
    require_shape(
        name, "x2_scale", x2_scale, (batch, width, pairs, 2) if as_rows else (batch, pairs, width, 2)
    )
    require(min(rows, batch, width) > 0, name, "operands may not be empty")
    if as_rows:
        right = mx_values(to_nd(x2, name), x2_scale.contiguous())
    else:
        right = mx_weight(name, x2, x2_scale, packed=False)
    left = mx_values(x1, x1_scale.contiguous()).transpose(0, 1)
    return (left @ right.mT).transpose(0, 1).to(kind).contiguous()


def _nothing(sim: SimulatedChip, **_: object) -> None:
    return None


@kernel("_C_ascend::batch_matmul_transpose", meta=_nothing, chips=A2_A3)
def batch_matmul_transpose(
    sim: SimulatedChip,
    *,
    tensor_a: Tensor,
    tensor_b: Tensor,
    tensor_c: Tensor,
    format_mode: str | None,
    quant_mode: str | None,
) -> None:
    """Writes a [T, B, K] by b [B, K, N] per batch into c, [T, B, N] in memory."""
    name = "batch_matmul_transpose"
    require_absent(name, format_mode=format_mode, quant_mode=quant_mode)
    require(tensor_a.dim() == 3 and tensor_b.dim() == 3, name, "a and b need three axes")
    kinds = {tensor_a.dtype, tensor_b.dtype, tensor_c.dtype}
    require(len(kinds) == 1 and kinds <= {*HALVES}, name, f"types {kinds} must be one of float16 or bfloat16")
    rows, batch, inner = tensor_a.shape
    require(
        tensor_b.shape[:2] == (batch, inner),
        name,
        f"a {tuple(tensor_a.shape)} and b {tuple(tensor_b.shape)} do not fit; want [T, B, K] and [B, K, N]",
    )
    width = tensor_b.shape[2]
    require(
        tensor_c.is_contiguous() and tensor_c.numel() == rows * batch * width,
        name,
        f"c {tuple(tensor_c.shape)} must be contiguous with {rows} x {batch} x {width} values",
    )
    product = tensor_a.transpose(0, 1).float() @ to_nd(tensor_b, name).float()
    tensor_c.view(rows, batch, width).copy_(product.transpose(0, 1))
