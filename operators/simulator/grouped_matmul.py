"""Simulated grouped matrix products: rows of one tensor, group after group, each with its own weight.

What the groups do not cover is poison. Sources: npu_grouped_matmul in op-plugin, aclnnGroupedMatmulV4 and V5
in ops-transformer, torch_npu's Meta kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ascend_v4.operators.simulator.dtypes import dtype_of
from ascend_v4.operators.simulator.elements import FP4, FP8, MX_PAIR, mx_values
from ascend_v4.operators.simulator.formats import to_nd, unpack_int4
from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.matmul import (
    integer_matmul,
    is_transposed,
    mx_weight,
    require_scale_bytes,
    require_shape,
)
from ascend_v4.operators.simulator.quantize import (
    HALVES,
    offset_of_words,
    require_absent,
    scale_of_words,
)
from ascend_v4.operators.simulator.state import SimulatedChip, require, undefined

LIST_LIMIT = 128
"""Tensors that one list may hold."""
GROUP_LIMIT = 1024
INNER_LIMIT = 65536
"""The last axis of x and of a weight must be smaller, on A2 and A3."""
CUMULATIVE = 0
COUNTS = 1
KEYED_COUNTS = 2
SPLIT_ROWS = 0
ONE_OUTPUT = (2, 3)
INT4_PER_INT32 = 8
INT4_SHIFT = 8
"""The kernel for int4 weights computes with x - 8 and leaves the 8 to the bias."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows [start, end) and the weight that they meet."""

    index: int
    start: int
    end: int


def groups_of(operator: str, group_list: Tensor, kind: int, *, num_rows: int, num_groups: int) -> list[Group]:
    """The groups that are not empty. Raises SimulatorError for a list that does not fit rows or weights."""
    require(group_list.dtype is torch.int64, operator, f"group_list must be int64, is {group_list.dtype}")
    require(
        kind in (CUMULATIVE, COUNTS, KEYED_COUNTS),
        operator,
        f"group_list_type is {kind}, want 0 (cumulative), 1 (counts) or 2 (pairs)",
    )
    wanted = (num_groups, 2) if kind == KEYED_COUNTS else (num_groups,)
    require_shape(operator, "group_list", group_list, wanted)
    require(num_groups <= GROUP_LIMIT, operator, f"{num_groups} groups, at most {GROUP_LIMIT} are taken")
    rows = group_list.tolist()
    if kind == KEYED_COUNTS:
        indices, counts = [row[0] for row in rows], [row[1] for row in rows]
        used = [index for index, count in zip(indices, counts, strict=True) if count]
        require(
            all(counts[: len(used)])
            and used == sorted(used)
            and all(0 <= each < num_groups for each in used),
            operator,
            f"group_list {rows} must hold the groups with rows first, in order",
        )
    else:
        indices = list(range(num_groups))
        counts = (
            rows if kind == COUNTS else [end - start for start, end in zip([0, *rows], rows, strict=False)]
        )
    require(
        min(counts, default=0) >= 0,
        operator,
        f"group_list {rows} of type {kind} has a group of negative size; cumulative lists must rise",
    )
    total = sum(counts)
    require(total <= num_rows, operator, f"group_list {rows} covers {total} rows, there are {num_rows}")
    found, start = [], 0
    for index, count in zip(indices, counts, strict=True):
        if count:
            found.append(Group(index, start, start + count))
        start += count
    return found


def _require_unlike_counts(operator: str, kind: int | None) -> None:
    require(kind == COUNTS, operator, f"int4 weights take group_list_type 1 (counts), this is {kind}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedCall:
    """One call with its lists taken apart."""

    name: str
    sim: SimulatedChip
    x: Tensor
    """[M, K]."""
    weights: Sequence[Tensor]
    """One [E, K, N], or E of [K, N]."""
    bias: Sequence[Tensor] | None = None
    scale: Sequence[Tensor] | None = None
    antiquant_scale: Sequence[Tensor] | None = None
    per_token_scale: Sequence[Tensor] | None = None
    output_dtype: torch.dtype | None = None
    weight_dtype: int | None = None
    scale_dtype: int | None = None
    per_token_scale_dtype: int | None = None
    group_list_type: int | None = COUNTS

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds all weights."""
        return len(self.weights) == 1 and self.weights[0].dim() == 3

    @property
    def num_groups(self) -> int:
        """Weights."""
        return self.weights[0].shape[0] if self.stacked else len(self.weights)

    @property
    def packed_fp4(self) -> bool:
        """Whether weight_dtype says packed FP4."""
        return self.weight_dtype is not None and dtype_of(self.weight_dtype, self.name) is FP4

    @property
    def width(self) -> int:
        """N."""
        columns = self.weights[0].shape[-1]
        return columns * INT4_PER_INT32 if self.weights[0].dtype is torch.int32 else columns

    @property
    def result_type(self) -> torch.dtype:
        """Dtype of the result."""
        return self.x.dtype if self.output_dtype is None else self.output_dtype

    def table(self, name: str, given: Sequence[Tensor] | None, *shape: int) -> Sequence[Tensor] | None:
        """A per-weight argument as one tensor per weight, each of the given shape."""
        if given is None:
            return None
        if self.stacked:
            require(len(given) == 1, self.name, f"{name} has {len(given)} tensors for one weight")
            require_shape(self.name, name, given[0], (self.num_groups, *shape))
            return list(given[0])
        require(len(given) == len(self.weights), self.name, f"{name} and weight differ in length")
        for each in given:
            require_shape(self.name, name, each, shape)
        return given

    def only(self, name: str, given: Sequence[Tensor] | None) -> Tensor | None:
        """The one tensor of a per-x argument."""
        require(given is None or len(given) == 1, self.name, f"{name} must hold one tensor, as x does")
        return given[0] if given else None


def require_operands(call: GroupedCall) -> None:
    """The rules that every grouped product shares."""
    name, x = call.name, call.x
    require(
        0 < len(call.weights) <= LIST_LIMIT,
        name,
        f"weight has {len(call.weights)} tensors, a list may hold {LIST_LIMIT}",
    )
    require(x.dim() == 2, name, f"x must have two axes, this is {tuple(x.shape)}")
    dims = {weight.dim() for weight in call.weights}
    require(
        call.stacked or dims == {2},
        name,
        f"weight must be one tensor of three axes or many of two, not {dims}",
    )
    kinds = {weight.dtype for weight in call.weights}
    require(len(kinds) == 1, name, f"weights differ in type: {kinds}")
    inner = call.weights[0].shape[-2] * (2 if call.packed_fp4 else 1)
    shapes = {tuple(weight.shape[-2:]) for weight in call.weights}
    require(
        shapes == {tuple(call.weights[0].shape[-2:])} and inner == x.shape[1],
        name,
        f"x {tuple(x.shape)} does not fit weights {sorted(shapes)}; they are [K, N], transpose them",
    )
    require(x.shape[1] > 0, name, "K is 0")
    if not call.sim.is_950:
        sizes = (x.shape[1], *call.weights[0].shape[-2:][::-1][:1])
        require(
            max(sizes) < INNER_LIMIT, name, f"the last axes of x and weight are {sizes}, want < {INNER_LIMIT}"
        )


def grouped_product(call: GroupedCall, groups: list[Group]) -> Tensor:
    """The result [M, N], poison where no group covers the rows.

    Raises SimulatorError for mixtures of types that are not simulated.
    """
    require_operands(call)
    kinds = (call.x.dtype, call.weights[0].dtype)
    if kinds[0] is kinds[1] and kinds[0] in (*HALVES, torch.float32):
        return _float_product(call, groups)
    if kinds == (torch.int8, torch.int8):
        return _int8_product(call, groups)
    if kinds == (torch.int8, torch.int32):
        return int4_product(call, groups)
    require(
        kinds[0] in FP8 and (kinds[1] in FP8 or call.packed_fp4),
        call.name,
        f"x {kinds[0]} with weights {kinds[1]} (weight_dtype {call.weight_dtype}) is not simulated",
    )
    return mx_product(call, groups)


def _result(call: GroupedCall) -> Tensor:
    return undefined(call.x.shape[0], call.width, dtype=call.result_type)


def _matrices(call: GroupedCall) -> Sequence[Tensor]:
    if call.stacked:
        return list(to_nd(call.weights[0], call.name))
    return [to_nd(weight, call.name) for weight in call.weights]


def _float_product(call: GroupedCall, groups: list[Group]) -> Tensor:
    require_absent(
        call.name,
        scale=call.scale,
        per_token_scale=call.per_token_scale,
        antiquant_scale=call.antiquant_scale,
        weight_dtype=call.weight_dtype,
    )
    require(
        call.result_type is call.x.dtype,
        call.name,
        f"{call.x.dtype} gives {call.x.dtype}, not {call.result_type}",
    )
    biases = call.table("bias", call.bias, call.width)
    wanted = torch.float16 if call.x.dtype is torch.float16 else torch.float32
    for each in biases or ():
        require(
            each.dtype is wanted, call.name, f"bias with {call.x.dtype} must be {wanted}, is {each.dtype}"
        )
    matrices, result = _matrices(call), _result(call)
    for group in groups:
        product = call.x[group.start : group.end].float() @ matrices[group.index].float()
        if biases is not None:
            product = product + biases[group.index].float()
        result[group.start : group.end] = product.to(result.dtype)
    return result


def _require_int8_types(call: GroupedCall, scale: Tensor | None, per_token: Tensor | None) -> None:
    """The table of aclnnGroupedMatmulV4 for int8 on A2 and A3; Ascend 950 takes float32 scales throughout."""
    name, dtype = call.name, call.result_type
    if dtype is torch.int32:
        require(
            scale is None and per_token is None, name, "an int32 result is the raw sum; give no scale with it"
        )
        return
    require(scale is not None, name, f"a {dtype} result needs scale (None as output_dtype means int8)")
    assert scale is not None
    allowed: dict[torch.dtype, tuple[torch.dtype, ...]] = {
        torch.int8: (torch.int64,),
        torch.bfloat16: (torch.bfloat16, torch.float32) if call.sim.is_950 else (torch.bfloat16,),
        torch.float16: (torch.float32,),
    }
    require(dtype in allowed, name, f"int8 operands give int8, int32, bfloat16 or float16, not {dtype}")
    require(
        scale.dtype in allowed[dtype],
        name,
        f"scale is {scale.dtype}; with a {dtype} result {call.sim.chip.value} takes {allowed[dtype]} "
        "(None as output_dtype means int8)",
    )
    require(
        per_token is None or dtype is not torch.int8,
        name,
        "per_token_scale cannot be given with an int8 result (None as output_dtype means int8)",
    )


def _require_per_token(call: GroupedCall) -> Tensor | None:
    per_token = call.only("per_token_scale", call.per_token_scale)
    if per_token is not None:
        require_shape(call.name, "per_token_scale", per_token, (call.x.shape[0],))
        require(
            per_token.dtype is torch.float32,
            call.name,
            f"per_token_scale must be float32, is {per_token.dtype}",
        )
    return per_token


def _int8_product(call: GroupedCall, groups: list[Group]) -> Tensor:
    require_absent(call.name, antiquant_scale=call.antiquant_scale, weight_dtype=call.weight_dtype)
    scales = call.table("scale", call.scale, call.width)
    biases = call.table("bias", call.bias, call.width)
    per_token = _require_per_token(call)
    _require_int8_types(call, None if scales is None else scales[0], per_token)
    for each in biases or ():
        require(each.dtype is torch.int32, call.name, f"bias with int8 must be int32, is {each.dtype}")
    matrices, result = _matrices(call), _result(call)
    for group in groups:
        rows = slice(group.start, group.end)
        total = integer_matmul(call.x[rows], matrices[group.index])
        if biases is not None:
            total = total + biases[group.index]
        if scales is None:
            result[rows] = total
            continue
        scale = scales[group.index]
        factors = scale_of_words(scale) if scale.dtype is torch.int64 else scale.float()
        product = total.float() * factors
        if per_token is not None:
            product = product * per_token[rows].unsqueeze(-1)
        if result.dtype is torch.int8:
            product = (product + offset_of_words(scale)).round().clamp(-128, 127)
        result[rows] = product.to(result.dtype)
    return result


def int4_product(call: GroupedCall, groups: list[Group]) -> Tensor:
    """int8 rows by int4 weights, eight to an int32: per_token * ((x - 8) . w * scale + bias).

    scale is int64 with float32 bits, [E, G, N] for G groups along K; bias, float32 [E, N], carries
    8 * sum(w * scale).
    """
    name = call.name
    require(not call.sim.is_950, name, "int4 weights are simulated on A2 and A3")
    _require_unlike_counts(name, call.group_list_type)
    require(
        call.result_type in HALVES, name, f"int4 weights give float16 or bfloat16, not {call.result_type}"
    )
    scale = call.only("scale", call.scale)
    require(
        scale is not None and scale.dim() == 3 and scale.dtype is torch.int64,
        name,
        "int4 weights need scale as int64 [E, 1, N], float32 bits widened",
    )
    assert scale is not None
    return int4_rows(call, groups, scale=scale).to(call.result_type)


def int4_rows(call: GroupedCall, groups: list[Group], *, scale: Tensor) -> Tensor:
    """Float32 [M, N] of int8 rows and int4 weights, before any rounding of the result."""
    name, width, inner = call.name, call.width, call.x.shape[1]
    require(call.stacked, name, "int4 weights come as one tensor [E, K, N/8]")
    parts = scale.shape[1] if scale.dim() == 3 else 1
    require_shape(name, "scale", scale, (call.num_groups, parts, width))
    require(inner % parts == 0, name, f"K {inner} is no multiple of the {parts} groups of scale")
    biases = call.table("bias", call.bias, width)
    require(
        biases is not None and biases[0].dtype is torch.float32,
        name,
        "int4 weights need bias, float32 [E, N]: the kernel leaves 8 * sum(w * scale) to it",
    )
    per_token = _require_per_token(call)
    require(per_token is not None, name, "int4 weights need per_token_scale")
    assert biases is not None
    assert per_token is not None
    factors = scale_of_words(scale)
    packed, size = to_nd(call.weights[0], name), inner // parts
    result = undefined(call.x.shape[0], width, dtype=torch.float32)
    for group in groups:
        rows = slice(group.start, group.end)
        shifted = call.x[rows].to(torch.int16) - INT4_SHIFT
        matrix = unpack_int4(packed[group.index])
        product = biases[group.index].expand(group.end - group.start, width)
        for part in range(parts):
            span = slice(part * size, (part + 1) * size)
            total = integer_matmul(shifted[:, span], matrix[span])
            product = product + total.float() * factors[group.index, part]
        result[rows] = product * per_token[rows].unsqueeze(-1)
    return result


def mx_product(call: GroupedCall, groups: list[Group]) -> Tensor:
    """MX rows by MX weights, FP8 or packed FP4, with E8M0 scales in pairs."""
    name, sim, packed = call.name, call.sim, call.packed_fp4
    require(sim.is_950, name, f"{sim.chip.value} has no FP8 units")
    require(call.stacked, name, "MX weights in one tensor [E, K, N] are simulated")
    require(
        call.output_dtype in (*HALVES, torch.float32),
        name,
        f"MX operands need output_dtype of a float type, this is {call.output_dtype}",
    )
    require_absent(name, bias=call.bias)
    if packed:
        require_absent(name, scale=call.scale, scale_dtype=call.scale_dtype)
        require(call.x.dtype is torch.float8_e4m3fn, name, f"x is {call.x.dtype}, FP4 weights take E4M3")
    else:
        require_absent(name, antiquant_scale=call.antiquant_scale, weight_dtype=call.weight_dtype)
    which = "antiquant_scale" if packed else "scale"
    scale = call.only(which, call.antiquant_scale if packed else call.scale)
    per_token = call.only("per_token_scale", call.per_token_scale)
    require(
        scale is not None and per_token is not None,
        name,
        f"MX operands need {which} and per_token_scale (FP4 weights antiquant_scale, FP8 weights scale)",
    )
    assert scale is not None
    assert per_token is not None
    require_scale_bytes(name, "per_token_scale", per_token, call.per_token_scale_dtype)
    if packed:
        require(
            scale.dtype.itemsize == 1, name, f"antiquant_scale must be of one byte each, is {scale.dtype}"
        )
    else:
        require_scale_bytes(name, "scale", scale, call.scale_dtype)
    weight = call.weights[0]
    require(not packed or is_transposed(weight), name, "FP4 weights are a transposed view of [E, N, K/2]")
    pairs = -(-call.x.shape[1] // MX_PAIR)
    by_pair, by_row = (call.num_groups, pairs, call.width, 2), (call.num_groups, call.width, pairs, 2)
    require_shape(name, which, scale, by_pair, *((by_row,) if packed else ()))
    if tuple(scale.shape) != by_pair:
        scale = scale.transpose(1, 2)
    require(
        min(pairs, call.width) == 1 or (scale.stride(1) < scale.stride(2)) == is_transposed(weight),
        name,
        f"{which} and weight must both be transposed views or both not",
    )
    require_shape(name, "per_token_scale", per_token, (call.x.shape[0], pairs, 2))
    result = _result(call)
    values = mx_values(call.x, per_token.contiguous())
    for group in groups:
        matrix = mx_weight(name, weight[group.index], scale[group.index], packed=packed)
        result[group.start : group.end] = (values[group.start : group.end] @ matrix.mT).to(result.dtype)
    return result


def _grouped_matmul_meta(
    sim: SimulatedChip,
    *,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    output_dtype: int | torch.dtype | None,
    **_: Any,  # noqa: ANN401 -- the rest of a schema of twenty arguments
) -> list[Tensor]:
    name = "npu_grouped_matmul"
    dtype = x[0].dtype if output_dtype is None else dtype_of(output_dtype, name)
    columns = weight[0].shape[-1]
    width = columns * INT4_PER_INT32 if weight[0].dtype is torch.int32 else columns
    return [x[0].new_empty((x[0].shape[0], width), dtype=dtype)]


@kernel("npu::npu_grouped_matmul", meta=_grouped_matmul_meta)
def npu_grouped_matmul(
    sim: SimulatedChip,
    *,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    scale: Sequence[Tensor] | None,
    offset: Sequence[Tensor] | None,
    antiquant_scale: Sequence[Tensor] | None,
    antiquant_offset: Sequence[Tensor] | None,
    per_token_scale: Sequence[Tensor] | None,
    group_list: Tensor | None,
    activation_input: Sequence[Tensor] | None,
    activation_quant_scale: Sequence[Tensor] | None,
    activation_quant_offset: Sequence[Tensor] | None,
    split_item: int | None,
    group_type: int | None,
    group_list_type: int | None,
    act_type: int | None,
    tuning_config: Sequence[int] | None,
    output_dtype: int | None,
    x_dtype: int | None,
    weight_dtype: int | None,
    scale_dtype: int | None,
    per_token_scale_dtype: int | None,
) -> list[Tensor]:
    """One tensor [M, N] of the groups of rows of one x, in a list."""
    name = "npu_grouped_matmul"
    require_absent(
        name,
        offset=offset,
        antiquant_offset=antiquant_offset,
        activation_input=activation_input,
        activation_quant_scale=activation_quant_scale,
        activation_quant_offset=activation_quant_offset,
        x_dtype=x_dtype,
    )
    require(len(x) == 1, name, f"x has {len(x)} tensors; one is simulated")
    require(group_type == SPLIT_ROWS, name, f"group_type is {group_type}; 0, groups of rows, is simulated")
    require(
        split_item in ONE_OUTPUT, name, f"split_item is {split_item}; 2 or 3 gives the one result for one x"
    )
    require(act_type == 0, name, f"act_type is {act_type}; 0 is simulated")
    require(group_list is not None, name, "groups of rows need group_list")
    assert group_list is not None
    assert group_list_type is not None
    call = GroupedCall(
        name=name,
        sim=sim,
        x=x[0],
        weights=weight,
        bias=bias,
        scale=scale,
        antiquant_scale=antiquant_scale,
        per_token_scale=per_token_scale,
        output_dtype=None if output_dtype is None else dtype_of(output_dtype, name),
        weight_dtype=weight_dtype,
        scale_dtype=scale_dtype,
        per_token_scale_dtype=per_token_scale_dtype,
        group_list_type=group_list_type,
    )
    require_operands(call)
    groups = groups_of(name, group_list, group_list_type, num_rows=x[0].shape[0], num_groups=call.num_groups)
    return [grouped_product(call, groups)]


@kernel("npu::npu_grouped_matmul.List", meta=_grouped_matmul_meta, chips=A2_A3)
def npu_grouped_matmul_list(
    sim: SimulatedChip,
    *,
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    group_list: Sequence[int] | None,
    split_item: int | None,
    group_type: int | None,
    act_type: int | None,
    output_dtype: torch.dtype | None,
    **rest: Any,  # noqa: ANN401 -- arguments that a plain product does not take
) -> list[Tensor]:
    """The overload with group ends as numbers: one x, one float weight of two axes per group, one result."""
    name = "npu_grouped_matmul"
    rest.pop("group_list_type")
    require_absent(name, group_type=group_type, **rest)
    require(act_type == 0, name, f"act_type is {act_type}; 0 is simulated")
    require(len(x) == 1 and split_item in ONE_OUTPUT, name, "one x with split_item 2 or 3 is simulated")
    require(bool(group_list), name, "one x needs group_list, the ends of its groups")
    ends = torch.tensor(list(group_list or ()), dtype=torch.int64)
    require(int(ends[-1]) == x[0].shape[0], name, f"group_list ends at {int(ends[-1])}, x at {x[0].shape[0]}")
    call = GroupedCall(name=name, sim=sim, x=x[0], weights=weight, bias=bias, output_dtype=output_dtype)
    require(
        x[0].is_floating_point(), name, f"x is {x[0].dtype}; float types are simulated with a list of numbers"
    )
    require(not call.stacked, name, "a list of numbers goes with a list of weights of two axes")
    groups = groups_of(name, ends, CUMULATIVE, num_rows=x[0].shape[0], num_groups=call.num_groups)
    return [grouped_product(call, groups)]


def _moe_grouped_matmul_meta(sim: SimulatedChip, *, x: Tensor, weight: Tensor, **_: object) -> list[Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[-1]))]


@kernel("_C_ascend::moe_grouped_matmul", meta=_moe_grouped_matmul_meta, chips=A2_A3)
def moe_grouped_matmul(
    sim: SimulatedChip,
    *,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
) -> list[Tensor]:
    """Float rows by float weights [E, K, N]."""
    name = "moe_grouped_matmul"
    require(group_type == SPLIT_ROWS, name, f"group_type is {group_type}; 0 is simulated")
    require(split_item in ONE_OUTPUT, name, f"split_item is {split_item}, want 2 or 3")
    require(x.is_floating_point(), name, f"x is {x.dtype}, want a float type")
    call = GroupedCall(name=name, sim=sim, x=x, weights=[weight])
    require_operands(call)
    groups = groups_of(name, group_list, group_list_type, num_rows=x.shape[0], num_groups=call.num_groups)
    return [grouped_product(call, groups)]
