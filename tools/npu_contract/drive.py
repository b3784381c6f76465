"""A whole model without values, driven through the adapters: loading, prefill, decoding, a captured step's
shapes, the MTP block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ascend_v4.cache.layout import ENTRIES, WINDOW, CacheSpec, PageGroup, plan_pools
from ascend_v4.cache.pages import SequencePages, make_pools
from ascend_v4.checkpoint.pack import PackScheme
from ascend_v4.config import LayerKind, ModelConfig
from ascend_v4.device.target import Target
from ascend_v4.model.build import Builder, UnpackBudget
from ascend_v4.model.caches import CacheTensors, cache_storages
from ascend_v4.model.deepseek_v4 import DeepSeekV4
from ascend_v4.model.mtp import MtpBlock
from ascend_v4.model.numerics import numerics_on_chip
from ascend_v4.model.sizes import model_sizes
from ascend_v4.model.step import StepFrame, StepPlanner
from ascend_v4.operators.select import OperatorTable, select
from tools.npu_contract.record import Recorder
from tools.npu_contract.source import META, MetaWeights, meta_source

CACHE_TOKENS = 8192
PREFILL = (300, 1, 130)
"""New tokens of each sequence: ragged, one alone, one past a block's edge."""
STEPS = ((1, 1, 1), (2, 1, 3), (127, 126, 1))
"""Decoding, several tokens at once, and a chunk that completes entries of every kind."""


def drive(
    config: ModelConfig,
    scheme: PackScheme,
    target: Target,
    *,
    named: Mapping[str, str],
    recorder: Recorder,
) -> OperatorTable:
    """Loads a model of these tensors and runs every kind of step once; returns what was chosen.

    named maps operator -> provider, as `select` takes it. Raises whatever an adapter, a schema or a Meta
    kernel raises; AssertionError for a result of the wrong shape or dtype.
    """
    assert target.chip is not None
    numerics = numerics_on_chip("auto", target.chip, scheme=_stored(scheme))
    table = select(target, sizes=model_sizes(config), named=named)
    source = meta_source(config, scheme)
    with torch.inference_mode():
        builder = Builder(
            config=source.config,
            weights=MetaWeights(source),
            operators=recorder.watched(table),
            numerics=numerics,
            unpack=UnpackBudget(0),
        )
        model = DeepSeekV4(builder)
        block = MtpBlock(builder, model)
        specs = [spec for caches in model.caches for spec in caches.specs()]
        main = _Side(builder, specs, config.layer_kinds)
        draft = _Side(builder, block.caches.specs(), [block.kind])
        for counts in (PREFILL, *STEPS):
            streams = main.step(model, counts)
            _require(streams, (sum(counts), config.hc_mult, config.hidden_size), numerics.dtype)
            _require(model.logits(streams), (sum(counts), config.vocab_size), torch.float32)
            logits = draft.drafted(block, streams, counts)
            _require(logits, (sum(counts), config.vocab_size), torch.float32)
        if all(choice.capturable for choice in table.choices.values()):
            streams = main.framed(model, num_sequences=8)
            _require(streams, (8, config.hc_mult, config.hidden_size), numerics.dtype)
    return table


def _stored(scheme: PackScheme) -> PackScheme | None:
    return None if scheme is PackScheme.RELEASE else scheme


def _require(got: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    found = (tuple(got.shape), got.dtype)
    assert found == (shape, dtype), f"a result is {found}, want {(shape, dtype)}"
    assert got.is_meta, f"a result left the meta device for {got.device}"


class _Side:
    """Sequences, caches and plans of the main model, or of its MTP block."""

    def __init__(self, builder: Builder, specs: Sequence[CacheSpec], kinds: Sequence[LayerKind]) -> None:
        config, numerics = builder.config, builder.numerics
        groups: set[PageGroup] = {spec.group for spec in specs} | {WINDOW, ENTRIES}
        pools = plan_pools(
            groups, cache_tokens=CACHE_TOKENS, max_sequences=len(PREFILL), max_step_tokens=sum(PREFILL)
        )
        free = make_pools(pools)
        self._sequences = [SequencePages(free) for _ in PREFILL]
        self._tables = {group: group.pages_for(CACHE_TOKENS) for group in groups}
        self._tensors = CacheTensors(
            specs, pools, storages=cache_storages(config, builder.operators, numerics), device=META
        )
        self._planner = StepPlanner(config, builder.operators, kinds, META)

    def step(self, model: DeepSeekV4, counts: Sequence[int]) -> Tensor:
        """Final streams of one step of all sequences."""
        step = self._planner.plan(self._extended(counts), [[0] * count for count in counts])
        streams = model.forward(step, self._tensors)
        self._advance(counts)
        return streams

    def framed(self, model: DeepSeekV4, *, num_sequences: int) -> Tensor:
        """Final streams of a decoding step in the shape it is recorded in, padded to `num_sequences`."""
        counts = [1] * len(self._sequences)
        frame = StepFrame(num_sequences=num_sequences, table_pages=self._tables)
        step = self._planner.plan(self._extended(counts), [[0]] * len(counts), frame=frame)
        streams = model.forward(step, self._tensors)
        self._advance(counts)
        return streams

    def drafted(self, block: MtpBlock, streams: Tensor, counts: Sequence[int]) -> Tensor:
        """MTP logits of the same step."""
        step = self._planner.plan(self._extended(counts), [[0] * count for count in counts])
        logits = block.forward(streams, step, self._tensors)
        self._advance(counts)
        return logits

    def _extended(self, counts: Sequence[int]) -> list[SequencePages]:
        for pages, count in zip(self._sequences, counts, strict=True):
            pages.extend(count)
        return self._sequences

    def _advance(self, counts: Sequence[int]) -> None:
        for pages, count in zip(self._sequences, counts, strict=True):
            pages.advance(count)
