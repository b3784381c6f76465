"""Filtering of logits before sampling, and the weight prefetch, which computes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.state import SimulatedChip, require


def _like_logits(sim: SimulatedChip, *, logits: Tensor, **_: object) -> Tensor:
    return torch.empty_like(logits)


@kernel("npu::npu_top_k_top_p", meta=_like_logits, chips=A2_A3)
def npu_top_k_top_p(sim: SimulatedChip, *, logits: Tensor, p: Tensor | None, k: Tensor | None) -> Tensor:
    """Logits outside the top k, then outside the nucleus p of each row, become -inf; one always stays.

    The documentation ends k at 1024; vLLM-Ascend's nightly test passes whole vocabularies.
    """
    name = "npu_top_k_top_p"
    require(logits.dim() == 2, name, f"logits must have two axes, this is {tuple(logits.shape)}")
    require(p is not None or k is not None, name, "p and k cannot both be missing")
    ordered, order = logits.sort(dim=-1, stable=True)
    values = ordered.float()
    if k is not None:
        require(k.dtype is torch.int32, name, f"k must be int32, is {k.dtype}")
        require(k.shape == logits.shape[:1], name, f"k must have one value per row, is {tuple(k.shape)}")
        top = logits.shape[-1]
        require(bool(((k >= 1) & (k <= top)).all()), name, f"k must be between 1 and {top}")
        threshold = values.gather(-1, (logits.shape[-1] - k.long()).unsqueeze(-1))
        values = values.masked_fill(values < threshold, float("-inf"))
    if p is not None:
        require(p.dtype is logits.dtype, name, f"p must be {logits.dtype} like the logits, is {p.dtype}")
        require(p.shape == logits.shape[:1], name, f"p must have one value per row, is {tuple(p.shape)}")
        outside = values.softmax(-1).cumsum(-1) <= 1.0 - p.float().unsqueeze(-1)
        outside[:, -1] = False
        values = values.masked_fill(outside, float("-inf"))
    return torch.empty_like(logits).scatter_(-1, order, values.to(logits.dtype))


def _nothing(sim: SimulatedChip, **_: object) -> None:
    return None


@kernel("npu::npu_prefetch", meta=_nothing)
def npu_prefetch(
    sim: SimulatedChip,
    *,
    input: Tensor,
    dependency: Tensor | None,
    max_size: int,
    offset: int,
) -> None:
    """Nothing: the cache that it warms is not simulated."""
    require(max_size > 0, "npu_prefetch", f"max_size must be positive, is {max_size}")
    require(offset >= 0, "npu_prefetch", f"offset must not be negative, is {offset}")
