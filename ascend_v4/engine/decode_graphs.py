"""Decoding steps as device graphs: one recorded step per batch size, fed by copying."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ascend_v4.cache.layout import PageGroup
from ascend_v4.cache.pages import SequencePages
from ascend_v4.device.graphs import StepGraphs, graph_sizes
from ascend_v4.device.opening import open_device
from ascend_v4.model.caches import CacheTensors
from ascend_v4.model.load import LoadedModel
from ascend_v4.model.step import Step, StepFrame, StepPlanner
from ascend_v4.operators.contracts.batch import TokenBatch

log = logging.getLogger(__name__)


class DecodeGraphs:
    """Logits of steps in which every sequence gets one token, replayed."""

    def __init__(
        self,
        loaded: LoadedModel,
        planner: StepPlanner,
        tensors: CacheTensors,
        *,
        groups: Sequence[PageGroup],
        max_sequences: int,
        max_sequence_tokens: int,
    ) -> None:
        model = loaded.model
        self._planner = planner
        self._pages = {group: group.pages_for(max_sequence_tokens) for group in groups}

        def run(step: Step) -> Tensor:
            return model.logits(model.forward(step, tensors))

        self._graphs: StepGraphs[Step] = StepGraphs(
            open_device(loaded.target),
            sizes=graph_sizes(max_sequences),
            plan=lambda size: planner.plan([], [], frame=self._frame(size)),
            run=run,
            host_fields={TokenBatch: frozenset({"starts", "scratch"})},
        )
        with torch.inference_mode():
            self._graphs.warm()

    def logits(self, sequences: Sequence[SequencePages], token_ids: Sequence[Sequence[int]]) -> Tensor | None:
        """Float32 logits [B, vocab] of one new token of each sequence; None where this batch was not
        recorded.
        """
        size = self._graphs.size_for(len(sequences))
        if size is None:
            return None
        step = self._planner.plan(sequences, token_ids, frame=self._frame(size))
        found = self._graphs.replay(size, step)
        return None if found is None else found[: len(sequences)].clone()

    def _frame(self, size: int) -> StepFrame:
        return StepFrame(num_sequences=size, table_pages=self._pages)


def wants_graphs(loaded: LoadedModel, asked: bool | None) -> bool:
    """Whether decoding steps are to be recorded: asked for, or by default on npu and cuda, and possible.

    Says in one line why not, where somebody could expect it.
    """
    device = loaded.target.device
    if asked is False or (asked is None and device not in ("npu", "cuda")):
        return False
    if device == "cpu":
        log.info("decoding steps are not recorded: the CPU has no device graphs.")
        return False
    fixed = [
        f"{choice.operator} ({choice.provider})"
        for choice in loaded.operators.choices.values()
        if not choice.capturable
    ]
    if fixed:
        log.warning("decoding steps are not recorded: %s cannot be captured.", ", ".join(fixed))
        return False
    return True
