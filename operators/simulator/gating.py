"""Simulated expert selection: scores, top k by biased score, weights by the plain one; also by token id.

Scores are computed in float32. Sources: npu_moe_gating_top_k in op-plugin, aclnnMoeGatingTopKV2 in
ops-transformer, the recipes' document and test of their operator, csrc of vLLM-Ascend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ascend_v4.operators.simulator.kernels import A2_A3, kernel
from ascend_v4.operators.simulator.matmul import require_shape
from ascend_v4.operators.simulator.quantize import HALVES
from ascend_v4.operators.simulator.state import SimulatedChip, require, undefined

SOFTMAX = 0
SIGMOID = 1
SQRT_SOFTPLUS = 2
MOST_EXPERTS = 2048
HASH_MOST_CHOSEN = 64
GROUP_BY_BEST = 0
GROUP_BY_BEST_TWO = 1
GROUP_ALIGNMENT = 32
INDEX_TYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gating:
    """One call of the family."""

    name: str
    x: Tensor
    """Logits [T, E]."""
    k: int
    bias: Tensor | None
    input_ids: Tensor | None
    tid2eid: Tensor | None
    k_group: int
    group_count: int
    group_select_mode: int
    renorm: int
    norm_type: int
    out_flag: bool
    routed_scaling_factor: float
    eps: float

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights [T, k] in x's type, expert ids int32 [T, k], scores float32 [T, E] or poison."""
        self._check()
        scores = self._scores()
        ids = self._looked_up() if self.tid2eid is not None else self._best(scores)
        weights = scores.gather(1, ids)
        if self.norm_type != SOFTMAX:
            weights = weights / (weights.sum(-1, keepdim=True) + self.eps)
        weights = weights * self.routed_scaling_factor
        out = scores if self.out_flag else undefined(*self.x.shape, dtype=torch.float32)
        return weights.to(self.x.dtype), ids.to(torch.int32), out

    def _check(self) -> None:
        name, x = self.name, self.x
        require(x.dim() == 2, name, f"x must be [tokens, experts], this is {tuple(x.shape)}")
        require(x.dtype in (*HALVES, torch.float32), name, f"x must be of a float type, is {x.dtype}")
        rows, experts = x.shape
        require(rows > 0 and experts > 0, name, f"x {tuple(x.shape)} may not be empty")
        require(experts <= MOST_EXPERTS, name, f"{experts} experts, at most {MOST_EXPERTS} are taken")
        require(self.renorm == 0, name, f"renorm is {self.renorm}, want 0")
        require(
            self.norm_type in (SOFTMAX, SIGMOID, SQRT_SOFTPLUS),
            name,
            f"norm_type is {self.norm_type}, want 0 (softmax), 1 (sigmoid) or 2 (square root of softplus)",
        )
        require(
            1 <= self.k_group <= self.group_count and experts % self.group_count == 0,
            name,
            f"group_count {self.group_count} must divide {experts} experts and be at least {self.k_group}",
        )
        size = experts // self.group_count
        require(
            1 <= self.k <= size * self.k_group,
            name,
            f"k is {self.k}, want 1 to {size * self.k_group}, the experts of {self.k_group} groups",
        )
        require(
            self.group_select_mode in (GROUP_BY_BEST, GROUP_BY_BEST_TWO),
            name,
            f"group_select_mode is {self.group_select_mode}, want 0 or 1",
        )
        if self.group_count > 1:
            aligned = -(-size // GROUP_ALIGNMENT) * GROUP_ALIGNMENT * self.group_count
            require(size > 2 and aligned <= MOST_EXPERTS, name, f"groups of {size} experts are not taken")
        if self.bias is not None:
            require_shape(name, "bias", self.bias, (experts,))
            require(
                self.bias.dtype is x.dtype,
                name,
                f"bias is {self.bias.dtype} and x {x.dtype}; they must be alike",
            )
        require((self.input_ids is None) == (self.tid2eid is None), name, "input_ids and tid2eid go together")

    def _scores(self) -> Tensor:
        logits = self.x.float()
        if self.norm_type == SOFTMAX:
            return logits.softmax(-1)
        if self.norm_type == SIGMOID:
            return logits.sigmoid()
        return torch.nn.functional.softplus(logits).sqrt()

    def _best(self, scores: Tensor) -> Tensor:
        biased = scores if self.bias is None else scores + self.bias.float()
        if self.group_count > 1:
            grouped = biased.view(biased.shape[0], self.group_count, -1)
            best = 1 if self.group_select_mode == GROUP_BY_BEST else 2
            merit = grouped.topk(best, dim=-1).values.sum(-1)
            kept = merit.argsort(dim=-1, descending=True, stable=True)[:, : self.k_group]
            dropped = torch.ones_like(merit, dtype=torch.bool).scatter_(1, kept, value=False)
            biased = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
        return biased.argsort(dim=-1, descending=True, stable=True)[:, : self.k]

    def _looked_up(self) -> Tensor:
        ids, table = self.input_ids, self.tid2eid
        assert ids is not None
        assert table is not None
        name = self.name
        require(
            ids.dtype in INDEX_TYPES and table.dtype in INDEX_TYPES,
            name,
            f"input_ids is {ids.dtype} and tid2eid {table.dtype}, want int32 or int64",
        )
        require(ids.numel() == self.x.shape[0], name, f"{ids.numel()} input_ids for {self.x.shape[0]} rows")
        require(
            table.dim() == 2 and table.shape[1] == self.k,
            name,
            f"tid2eid is {tuple(table.shape)}, want [vocabulary, {self.k}]",
        )
        require(
            bool(((ids >= 0) & (ids < table.shape[0])).all()),
            name,
            f"input_ids go from {int(ids.min())} to {int(ids.max())}, tid2eid has {table.shape[0]} rows",
        )
        chosen = table[ids.reshape(-1).long()].long()
        require(
            bool(((chosen >= 0) & (chosen < self.x.shape[1])).all()),
            name,
            f"tid2eid names experts outside the {self.x.shape[1]} there are",
        )
        return chosen


def _gating_meta(sim: SimulatedChip, *, x: Tensor, k: int, **_: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[0]
    return (
        x.new_empty((rows, k)),
        x.new_empty((rows, k), dtype=torch.int32),
        x.new_empty(tuple(x.shape), dtype=torch.float32),
    )


@kernel("npu::npu_moe_gating_top_k", meta=_gating_meta)
def npu_moe_gating_top_k(
    sim: SimulatedChip,
    *,
    x: Tensor,
    k: int,
    bias: Tensor | None,
    input_ids: Tensor | None,
    tid2eid: Tensor | None,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """torch_npu's; norm type 2 and token ids are documented for aclnnMoeGatingTopKV2 behind it."""
    name = "npu_moe_gating_top_k"
    if input_ids is not None:
        require(input_ids.dim() == 1, name, f"input_ids must have one axis, is {tuple(input_ids.shape)}")
        require(k <= HASH_MOST_CHOSEN, name, f"k is {k}, by token id at most {HASH_MOST_CHOSEN} are taken")
        require(k_group == group_count, name, "groups of experts cannot be combined with token ids")
    return Gating(
        name=name,
        x=x,
        k=k,
        bias=bias,
        input_ids=input_ids,
        tid2eid=tid2eid,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    ).run()


@kernel("custom::npu_moe_gating_top_k", meta=_gating_meta)
def recipes_moe_gating_top_k(
    sim: SimulatedChip,
    *,
    x: Tensor,
    k: int,
    bias: Tensor | None,
    input_ids: Tensor | None,
    tid2eid: Tensor | None,
    k_group: int,
    group_count: int,
    routed_scaling_factor: float,
    eps: float,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The recipes': at most 64 chosen, int64 token ids, an int32 table."""
    name = "custom.npu_moe_gating_top_k"
    require(k <= HASH_MOST_CHOSEN, name, f"k is {k}, at most {HASH_MOST_CHOSEN} are chosen")
    if input_ids is not None and tid2eid is not None:
        require(
            input_ids.dtype is torch.int64 and tid2eid.dtype is torch.int32,
            name,
            f"input_ids is {input_ids.dtype} and tid2eid {tid2eid.dtype}, want int64 and int32",
        )
    return Gating(
        name=name,
        x=x,
        k=k,
        bias=bias,
        input_ids=input_ids,
        tid2eid=tid2eid,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    ).run()


@kernel("_C_ascend::moe_gating_top_k_hash", meta=_gating_meta)
def moe_gating_top_k_hash(
    sim: SimulatedChip,
    *,
    x: Tensor,
    k: int,
    bias: Tensor | None,
    input_ids: Tensor | None,
    tid2eid: Tensor | None,
    k_group: int,
    group_count: int,
    routed_scaling_factor: float,
    eps: float,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM-Ascend's, with and without token ids."""
    return Gating(
        name="moe_gating_top_k_hash",
        x=x,
        k=k,
        bias=bias,
        input_ids=input_ids,
        tid2eid=tid2eid,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    ).run()


@kernel("_C_ascend::moe_gating_top_k", meta=_gating_meta, chips=A2_A3)
def moe_gating_top_k(
    sim: SimulatedChip,
    *,
    x: Tensor,
    k: int,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
    bias_opt: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """vLLM-Ascend's without token ids."""
    return Gating(
        name="moe_gating_top_k",
        x=x,
        k=k,
        bias=bias_opt,
        input_ids=None,
        tid2eid=None,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm,
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    ).run()


def _softmax_meta(
    sim: SimulatedChip,
    *,
    x: Tensor,
    k: int,
    finished: Tensor | None,
    renorm: int | None,
    output_softmax: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    full = tuple(x.shape) if renorm == 0 and output_softmax else (0,)
    return (
        x.new_empty(shape),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(full, dtype=torch.float32),
    )


@kernel("npu::npu_moe_gating_top_k_softmax_v2", meta=_softmax_meta)
def npu_moe_gating_top_k_softmax_v2(
    sim: SimulatedChip,
    *,
    x: Tensor,
    k: int,
    finished: Tensor | None,
    renorm: int | None,
    output_softmax: bool | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax then top k, or with renorm 1 the reverse; finished rows choose the expert after the last."""
    name = "npu_moe_gating_top_k_softmax_v2"
    require(x.dim() in (2, 3), name, f"x must have two or three axes, this is {tuple(x.shape)}")
    require(x.dtype in (*HALVES, torch.float32), name, f"x must be of a float type, is {x.dtype}")
    experts = x.shape[-1]
    require(1 <= k <= experts, name, f"k is {k}, want 1 to {experts}")
    require(renorm in (0, 1), name, f"renorm is {renorm}, want 0 or 1")
    logits = x.float()
    scores = logits if renorm else logits.softmax(-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    weights = scores.gather(-1, order)
    if renorm:
        weights = weights.softmax(-1)
    if finished is not None:
        require(finished.dtype is torch.bool, name, f"finished must be bool, is {finished.dtype}")
        order = order.masked_fill(finished.view(*x.shape[:-1], 1), experts)
    out = scores if renorm == 0 and output_softmax else logits.new_empty((0,))
    return weights.to(x.dtype), order.to(torch.int32), out
