"""Logits, or logprobs, of given tokens: what evaluation and the golden comparison read.

Legend: T prompt tokens, S forced tokens, V vocabulary, H streams, D hidden.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import ModelRunner, ModelSequence, check_token_ids
from ascend_v4.errors import RequestError

MAX_INPUT_BYTES = 256 << 20
LOGIT_ROWS = 512
"""Rows of [rows, vocabulary] held at a time where only their logprobs are kept."""


@dataclass(frozen=True, slots=True)
class ScorePrompt:
    """Token ids of a prompt and of its forced continuation, which may be empty."""

    input_ids: list[int]
    decode_ids: list[int]


def read_prompts(path: Path, *, vocab_size: int, max_tokens: int) -> list[ScorePrompt]:
    """Prompts of a score input file. Raises RequestError naming the prompt and what is wrong with it."""
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise RequestError(f"{path} has {path.stat().st_size} bytes; at most {MAX_INPUT_BYTES} are read.")
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {str(error)[:200]}.") from None
    rows = document.get("prompts") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows:
        raise RequestError(f'{path} must hold {{"prompts": [{{"input_ids": [..], "decode_ids": [..]}}]}}.')
    prompts = [_prompt(row, f"{path}: prompt {index}", vocab_size) for index, row in enumerate(rows)]
    for index, prompt in enumerate(prompts):
        total = len(prompt.input_ids) + len(prompt.decode_ids)
        if total > max_tokens:
            raise RequestError(f"{path}: prompt {index} has {total} tokens; the model takes {max_tokens}.")
    return prompts


def _prompt(row: object, where: str, vocab_size: int) -> ScorePrompt:
    if not isinstance(row, dict):
        raise RequestError(f"{where} is a {type(row).__name__}; it must be an object with input_ids.")
    unknown = sorted(row.keys() - {"input_ids", "decode_ids"})
    if unknown:
        raise RequestError(
            f"{where} has unknown fields {', '.join(unknown)}; known are input_ids and decode_ids."
        )
    ids = {name: row.get(name, []) for name in ("input_ids", "decode_ids")}
    for name, values in ids.items():
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise RequestError(f"{where}: {name} must be a list of integers.")
        if values or name == "input_ids":
            try:
                check_token_ids(values, vocab_size)
            except RequestError as error:
                raise RequestError(f"{where}: {name}: {error}") from None
    return ScorePrompt(ids["input_ids"], ids["decode_ids"])


def score_logits(
    runner: ModelRunner, prompt: ScorePrompt, *, chunk_tokens: int | None, mtp: bool
) -> dict[str, Tensor]:
    """prefill_logits [T, V], decode_logits [S, V] and, with mtp, mtp_prefill_logits.

    Row t of the MTP logits is fed the streams at t and the token at t + 1; the last prompt position needs a
    first forced token, so without one there are T - 1 rows. Float32.
    """
    sequence = runner.open_sequence(len(prompt.input_ids) + len(prompt.decode_ids))
    try:
        parts = _prefill(runner, sequence, prompt.input_ids, chunk_tokens)
        rows = {"prefill_logits": torch.cat([runner.logits(streams) for streams in parts])}
        if mtp:
            rows["mtp_prefill_logits"] = _mtp_rows(runner, sequence, parts, prompt)
        decoded = [runner.forward([Chunk(sequence, [token_id])]) for token_id in prompt.decode_ids]
        rows["decode_logits"] = torch.cat(decoded) if decoded else torch.empty(0, runner.vocab_size)
        return rows
    finally:
        runner.close_sequence(sequence)


def score_logprobs(runner: ModelRunner, prompt: ScorePrompt, *, chunk_tokens: int | None) -> Tensor:
    """Log-probability of each next token, prompt and forced tokens alike: float32 [T + S - 1]."""
    ids = prompt.input_ids + prompt.decode_ids
    sequence = runner.open_sequence(len(ids))
    try:
        found: list[Tensor] = []
        targets = torch.tensor(ids[1:])
        first = 0
        for streams in _prefill(runner, sequence, ids, chunk_tokens):
            for rows in torch.split(streams, LOGIT_ROWS):
                wanted = targets[first : first + len(rows)]
                logprobs = torch.log_softmax(runner.logits(rows[: len(wanted)]), dim=-1)
                found.append(logprobs.gather(1, wanted[:, None]).squeeze(1))
                first += len(rows)
        return torch.cat(found)
    finally:
        runner.close_sequence(sequence)


def _prefill(
    runner: ModelRunner, sequence: ModelSequence, ids: list[int], chunk_tokens: int | None
) -> list[Tensor]:
    step = chunk_tokens or len(ids)
    return [runner.streams(Chunk(sequence, ids[low : low + step])) for low in range(0, len(ids), step)]


def _mtp_rows(
    runner: ModelRunner, sequence: ModelSequence, parts: list[Tensor], prompt: ScorePrompt
) -> Tensor:
    next_ids = prompt.input_ids[1:] + prompt.decode_ids[:1]
    rows, first = [], 0
    for streams in parts:
        wanted = next_ids[first : first + len(streams)]
        first += len(streams)
        if wanted:
            rows.append(runner.mtp_logits(sequence, streams[: len(wanted)], wanted))
    return torch.cat(rows) if rows else torch.empty(0, runner.vocab_size)
