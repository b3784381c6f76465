"""Runs the model over sequences that own cache pages: the only place where pages, steps and the model
meet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ascend_v4.cache.layout import BLOCK_TOKENS, ENTRIES, WINDOW, CacheSpec, PageGroup, plan_pools
from ascend_v4.cache.pages import PagePool, SequencePages, make_pools
from ascend_v4.config import ModelConfig
from ascend_v4.device.target import Target, TargetRequest
from ascend_v4.engine.decode_graphs import DecodeGraphs, wants_graphs
from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.quantize import quantized_source
from ascend_v4.errors import CacheFullError, ConfigError, RequestError
from ascend_v4.model.caches import CacheTensors, cache_storages
from ascend_v4.model.load import LoadedModel, load_model
from ascend_v4.model.sizes import model_sizes
from ascend_v4.model.step import StepPlanner
from ascend_v4.operators.select import OperatorTable, select
from ascend_v4.operators.targets import open_target

log = logging.getLogger(__name__)

MAX_STEP_TOKENS = 2048
"""New tokens that go through the layers at once; longer chunks are split."""


@dataclass(eq=False)
class ModelSequence:
    """One sequence's pages, in the main model and in the MTP block."""

    pages: SequencePages
    mtp_pages: SequencePages | None
    reserved_pages: int
    is_open: bool = field(default=True)

    @property
    def num_tokens(self) -> int:
        """Positions in the caches."""
        return self.pages.num_tokens


class ModelRunner:
    """Sequences over one loaded model. Not thread-safe: one thread opens, runs and closes."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        max_sequence_tokens: int,
        cache_tokens: int,
        max_sequences: int,
        max_step_tokens: int = MAX_STEP_TOKENS,
        graphs: bool | None = False,
    ) -> None:
        config = loaded.config
        longest = config.max_position_embeddings
        if not 1 <= max_sequence_tokens <= longest:
            raise ConfigError(
                f"the longest sequence is set to {max_sequence_tokens} tokens; the model takes 1 to "
                f"{longest}."
            )
        self.loaded = loaded
        self.vocab_size = config.vocab_size
        self.max_sequence_tokens = max_sequence_tokens
        self._max_step_tokens = max_step_tokens
        self._max_sequences = max_sequences
        self._open = 0
        specs = [spec for caches in loaded.model.caches for spec in caches.specs()]
        groups = {spec.group for spec in specs} | {WINDOW, ENTRIES}
        plan = plan_pools(
            groups, cache_tokens=cache_tokens, max_sequences=max_sequences, max_step_tokens=max_step_tokens
        )
        self._pools = make_pools(plan)
        storages = cache_storages(loaded.config, loaded.operators, loaded.numerics)
        self._tensors = CacheTensors(specs, plan, storages=storages, device=loaded.device)
        self._unreserved_pages = plan.pages[ENTRIES] - 1
        self._planner = StepPlanner(config, loaded.operators, config.layer_kinds, loaded.device)
        self._graphs: DecodeGraphs | None = None
        if wants_graphs(loaded, graphs):
            self._graphs = DecodeGraphs(
                loaded,
                self._planner,
                self._tensors,
                groups=tuple(groups),
                max_sequences=max_sequences,
                max_sequence_tokens=max_sequence_tokens,
            )
        self._mtp: _MtpSide | None = None
        if loaded.mtp is not None:
            self._mtp = _MtpSide(loaded, max_sequences=max_sequences, max_step_tokens=max_step_tokens)

    def open_sequence(self, reserve_tokens: int) -> ModelSequence:
        """A new sequence that is promised `reserve_tokens` positions.

        Raises CacheFullError when they cannot be.
        """
        if reserve_tokens > self.max_sequence_tokens:
            raise RequestError(
                f"{reserve_tokens} tokens are asked for; a sequence holds at most {self.max_sequence_tokens}."
            )
        wanted = ENTRIES.pages_for(reserve_tokens)
        if wanted > self._unreserved_pages or self._open == self._max_sequences:
            raise CacheFullError(
                f"{reserve_tokens} cache positions are wanted; {self._unreserved_pages * BLOCK_TOKENS} are "
                "free, and "
                f"{self._open} of {self._max_sequences} sequences are open."
            )
        self._unreserved_pages -= wanted
        self._open += 1
        mtp_pages = None if self._mtp is None else SequencePages(self._mtp.pools)
        return ModelSequence(SequencePages(self._pools), mtp_pages, wanted)

    def close_sequence(self, sequence: ModelSequence) -> None:
        """Gives the sequence's pages back. Closing twice does nothing."""
        if not sequence.is_open:
            return
        sequence.is_open = False
        sequence.pages.close()
        if sequence.mtp_pages is not None:
            sequence.mtp_pages.close()
        self._unreserved_pages += sequence.reserved_pages
        self._open -= 1

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Float32 logits [len(chunks), vocab] after the last token of each chunk.

        Raises RequestError for an empty chunk, a token id outside the vocabulary or a sequence past its
        reservation; nothing has run then.
        """
        self._check(chunks)
        if self._graphs is not None and all(len(chunk.token_ids) == 1 for chunk in chunks):
            logits = self._replay(self._graphs, chunks)
            if logits is not None:
                return logits
        last: list[Tensor] = [torch.empty(0)] * len(chunks)
        for part in _split(chunks, self._max_step_tokens):
            streams = self._step([chunks[index] for index, _ in part], [ids for _, ids in part])
            first = 0
            for index, ids in part:
                first += len(ids)
                last[index] = streams[first - 1]
        return self.loaded.model.logits(torch.stack(last))

    @torch.inference_mode()
    def streams(self, chunk: Chunk) -> Tensor:
        """Final streams [T, H, D] of every token of one chunk."""
        self._check([chunk])
        parts = _split([chunk], self._max_step_tokens)
        return torch.cat([self._step([chunk], [ids for _, ids in part]) for part in parts])

    @torch.inference_mode()
    def logits(self, streams_THD: Tensor) -> Tensor:
        """Float32 logits [T, vocab] of final streams."""
        return self.loaded.model.logits(streams_THD)

    @torch.inference_mode()
    def mtp_logits(self, sequence: ModelSequence, streams_THD: Tensor, next_ids: Sequence[int]) -> Tensor:
        """MTP logits [T, vocab] of the sequence's next T positions.

        streams are the main model's final ones at those positions, next_ids the token after each.
        """
        assert self._mtp is not None, "the model was loaded without its MTP block"
        assert sequence.mtp_pages is not None, "the sequence was opened without MTP pages"
        parts = []
        for low in range(0, len(next_ids), self._max_step_tokens):
            ids = list(next_ids[low : low + self._max_step_tokens])
            parts.append(self._mtp.forward(sequence.mtp_pages, streams_THD[low : low + len(ids)], ids))
        return torch.cat(parts)

    def truncate(self, sequence: ModelSequence, num_tokens: int) -> None:
        """Takes back the newest positions of a sequence (rejected speculative tokens).

        Raises ValueError further back than ROLLBACK_TOKENS from the most it ever had.
        """
        sequence.pages.truncate(num_tokens)

    def _check(self, chunks: Sequence[Chunk]) -> None:
        distinct = len({id(chunk.sequence) for chunk in chunks})
        assert distinct == len(chunks), f"{len(chunks)} chunks of only {distinct} sequences in one call"
        for chunk in chunks:
            sequence = _own(chunk)
            check_token_ids(chunk.token_ids, self.vocab_size)
            total = sequence.num_tokens + len(chunk.token_ids)
            if ENTRIES.pages_for(total) > sequence.reserved_pages:
                raise RequestError(
                    f"a sequence would grow to {total} tokens; {sequence.reserved_pages * BLOCK_TOKENS} "
                    "were reserved."
                )

    def _replay(self, graphs: DecodeGraphs, chunks: Sequence[Chunk]) -> Tensor | None:
        pages = [_own(chunk).pages for chunk in chunks]
        for held in pages:
            held.extend(1)
        logits = graphs.logits(pages, [chunk.token_ids for chunk in chunks])
        if logits is None:
            return None
        for held in pages:
            held.advance(1)
        return logits

    def _step(self, chunks: Sequence[Chunk], token_ids: Sequence[Sequence[int]]) -> Tensor:
        pages = [_own(chunk).pages for chunk in chunks]
        for held, ids in zip(pages, token_ids, strict=True):
            held.extend(len(ids))
        step = self._planner.plan(pages, token_ids)
        streams = self.loaded.model.forward(step, self._tensors)
        for held, ids in zip(pages, token_ids, strict=True):
            held.advance(len(ids))
        return streams


class _MtpSide:
    """Planner, pools and tensors of the MTP block's own window cache."""

    def __init__(self, loaded: LoadedModel, *, max_sequences: int, max_step_tokens: int) -> None:
        assert loaded.mtp is not None
        self._block = loaded.mtp
        specs: list[CacheSpec] = self._block.caches.specs()
        plan = plan_pools(
            {WINDOW}, cache_tokens=0, max_sequences=max_sequences, max_step_tokens=max_step_tokens
        )
        self.pools: dict[PageGroup, PagePool] = make_pools(plan)
        storages = cache_storages(loaded.config, loaded.operators, loaded.numerics)
        self._tensors = CacheTensors(specs, plan, storages=storages, device=loaded.device)
        self._planner = StepPlanner(loaded.config, loaded.operators, [self._block.kind], loaded.device)

    def forward(self, pages: SequencePages, streams_THD: Tensor, next_ids: list[int]) -> Tensor:
        pages.extend(len(next_ids))
        step = self._planner.plan([pages], [next_ids])
        logits = self._block.forward(streams_THD, step, self._tensors)
        pages.advance(len(next_ids))
        return logits


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises RequestError for no ids, or for the first id outside the vocabulary."""
    if not token_ids:
        raise RequestError("there are no token ids to run; give at least one.")
    for position, token_id in enumerate(token_ids):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"token id {token_id} at position {position} is outside the vocabulary of {vocab_size}."
            )


def _own(chunk: Chunk) -> ModelSequence:
    sequence = chunk.sequence
    assert isinstance(sequence, ModelSequence), type(sequence)
    assert sequence.is_open, "a closed sequence was run"
    return sequence


def _split(chunks: Sequence[Chunk], most: int) -> list[list[tuple[int, list[int]]]]:
    """(chunk index, token ids) rows of each step; a sequence appears in one step at most once, in order."""
    steps: list[list[tuple[int, list[int]]]] = [[]]
    room = most
    for index, chunk in enumerate(chunks):
        ids = list(chunk.token_ids)
        while ids:
            if room == 0:
                steps.append([])
                room = most
            part, ids = ids[:room], ids[room:]
            steps[-1].append((index, part))
            room -= len(part)
    return steps


def build_runner(
    checkpoint: str | Path,
    *,
    device: Target | TargetRequest | str = "cpu",
    numerics: str = "auto",
    max_sequence_tokens: int,
    cache_tokens: int,
    max_sequences: int = 64,
    mtp: bool = False,
    quantize: str | None = None,
    cache_dir: Path | None = None,
    graphs: bool | None = False,
    allow_slow: bool = True,
) -> ModelRunner:
    """Loads a checkpoint and gives it caches for `cache_tokens` positions over at most `max_sequences`
    sequences.

    `quantize` names a target it is repacked to while it loads, `cache_dir` a folder that keeps the pack.
    `graphs` records decoding steps, None where the device gains by it. Without `allow_slow` an NPU whose
    operators are too slow to serve with is refused before the weights are read, by ConfigError.
    """
    target = open_target(device)
    config = ModelConfig.from_file(Path(checkpoint))
    announce_operators(select(target, sizes=model_sizes(config)), allow_slow=allow_slow)
    source = quantized_source(Path(checkpoint), quantize, cache_dir=cache_dir)
    loaded = load_model(source, device=target, numerics=numerics, mtp=mtp)
    return ModelRunner(
        loaded,
        max_sequence_tokens=min(max_sequence_tokens, loaded.config.max_position_embeddings),
        cache_tokens=cache_tokens,
        max_sequences=max_sequences,
        graphs=graphs,
    )


def announce_operators(table: OperatorTable, *, allow_slow: bool) -> None:
    """Logs what was chosen, and warns once of what is waived. Raises ConfigError for operators that are too
    slow to serve with on an NPU, where they are not allowed.
    """
    target = table.target
    for row in table.rows():
        log.debug("%s: %s/%s", row["operator"], row["backend"], row["provider"])
    waived = sorted({name for choice in table.choices.values() for name in choice.waived})
    if waived:
        log.warning(
            "limits waived on %s: %s; what runs like this counts as simulated (waived)",
            target.describe(),
            ", ".join(waived),
        )
    if table.too_slow and target.device == "npu" and not allow_slow:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in table.too_slow.items())
        raise ConfigError(
            f"{len(table.too_slow)} operator(s) would be too slow to serve with on {target.describe()}: "
            f"{reasons}. Install the packages that ascend-v4 ops --device npu names, or use --allow-slow."
        )
