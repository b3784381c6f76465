"""How weights and their scales lie for the vendors' products. Used at load, and on scales of activations.

Legend: K inputs, N outputs, G groups of 32 inputs, P pairs of groups. A leading axis of experts may stand in
front of each of these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ascend_v4.operators.contracts.quantize import MX_GROUP, WEIGHT_BLOCK
from ascend_v4.operators.npu.constants import ACL_FORMAT_NZ, NZ_INT8_COLUMNS, NZ_ROWS


def to_nz(weight_KN: Tensor) -> Tensor:
    """An int8 weight in FRACTAL_NZ, or as it is where its sizes do not fill whole tiles.

    The weight is contiguous [K, N] or [E, K, N]. For int4 pairs it is the int8 tensor [.., K, N / 2]: the
    cast comes before any view as int32. The device must allow internal formats.
    """
    inputs, outputs = weight_KN.shape[-2:]
    if inputs == 0 or outputs == 0 or inputs % NZ_ROWS or outputs % NZ_INT8_COLUMNS:
        return weight_KN
    tiled_KN: Tensor = torch.ops.npu.npu_format_cast(weight_KN, ACL_FORMAT_NZ)
    return tiled_KN


def input_major(weight_NK: Tensor) -> Tensor:
    """A weight as its rows of inputs, contiguous [.., K, N]."""
    return weight_NK.transpose(-1, -2).contiguous()


def input_major_view(weight_NK: Tensor) -> Tensor:
    """The same without a copy: FP8 products want the transposed view of a row-major weight."""
    return weight_NK.transpose(-1, -2)


def paired_scale(scale_NG: Tensor) -> Tensor:
    """Scale bytes [.., N, G] in pairs [.., N, P, 2]; an odd last one gets a zero byte beside it."""
    bytes_NG = scale_NG.contiguous().view(torch.uint8)
    if bytes_NG.shape[-1] % 2:
        bytes_NG = functional.pad(bytes_NG, (0, 1))
    return bytes_NG.view(*bytes_NG.shape[:-1], bytes_NG.shape[-1] // 2, 2)


def mx_scale_pairs(scale_NG: Tensor) -> Tensor:
    """Scale bytes [.., N, G] as input-major products take them: a view [.., P, N, 2] of `paired_scale`."""
    return paired_scale(scale_NG).transpose(-2, -3)


def blocks_to_mx_scale(scale_blocks: Tensor, *, num_outputs: int, num_inputs: int) -> Tensor:
    """Scale bytes per 128 x 128 block as one per output and 32 inputs, [N, G]: the same numbers."""
    groups = -(-num_inputs // MX_GROUP)
    by_row = scale_blocks.view(torch.uint8).repeat_interleave(WEIGHT_BLOCK, 0)[:num_outputs]
    return by_row.repeat_interleave(WEIGHT_BLOCK // MX_GROUP, 1)[:, :groups].contiguous()
