"""Logits, or logprobs, of given tokens, and the file they go to: what evaluation and the golden comparison
read.

Legend: T prompt tokens, S forced tokens, V vocabulary, H streams, D hidden.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import MAX_STEP_TOKENS, ModelRunner, ModelSequence, check_token_ids
from ascend_v4.errors import ConfigError, RequestError

log = logging.getLogger(__name__)

MAX_INPUT_BYTES = 64 << 20
"""Ten million token ids; JSON takes many times its bytes once it is read."""
LOGIT_ROWS = 512
"""Rows of [rows, vocabulary] held at a time where only their logprobs are kept."""
LOGITS, FORCED_LOGITS, MTP_LOGITS = "prefill_logits", "decode_logits", "mtp_prefill_logits"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ScorePrompt:
    """Token ids of a prompt and of its forced continuation, which may be empty."""

    input_ids: list[int]
    decode_ids: list[int]


def read_prompts(path: Path, *, vocab_size: int, max_tokens: int) -> list[ScorePrompt]:
    """Prompts of a score input file. Raises RequestError naming the prompt and what is wrong with it."""
    document = _read_json(path)
    rows = document.get("prompts") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(rows, list) or not rows:
        raise RequestError(
            f'{path} must hold {{"prompts": [{{"input_ids": [..], "decode_ids": [..]}}]}}, one or more.'
        )
    ignored = sorted(document.keys() - {"prompts"})
    if ignored:
        log.warning("%s: fields beside prompts are ignored: %s", path, ", ".join(ignored)[:200])
    prompts = [_prompt(row, f"{path}: prompt {index}", vocab_size) for index, row in enumerate(rows)]
    for index, prompt in enumerate(prompts):
        total = len(prompt.input_ids) + len(prompt.decode_ids)
        if total > max_tokens:
            raise RequestError(
                f"{path}: prompt {index} has {total} tokens, decode_ids included; the model takes "
                f"{max_tokens}."
            )
    return prompts


def _read_json(path: Path) -> object:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_INPUT_BYTES + 1)
        if len(raw) > MAX_INPUT_BYTES:
            raise RequestError(
                f"{path} has more than {MAX_INPUT_BYTES} bytes, the most that is read. Split its prompts."
            )
        return json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not JSON: {str(error)[:200]}.") from None


def _prompt(row: object, where: str, vocab_size: int) -> ScorePrompt:
    if not isinstance(row, dict):
        raise RequestError(f"{where} must be an object with input_ids, not {type(row).__name__}.")
    unknown = sorted(row.keys() - {"input_ids", "decode_ids"})
    if unknown:
        raise RequestError(
            f"{where} has unknown fields {', '.join(unknown)[:200]}; known are input_ids and decode_ids."
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


def score_shapes(prompts: list[ScorePrompt], vocab_size: int, *, mtp: bool, logprobs: bool) -> Shapes:
    """Every tensor that scoring these prompts gives, in its order, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, prompt in enumerate(prompts):
        given, forced = len(prompt.input_ids), len(prompt.decode_ids)
        if logprobs:
            shapes[f"p{index}.logprobs"] = (given + forced - 1,)
            continue
        shapes[f"p{index}.{LOGITS}"] = (given, vocab_size)
        if mtp:
            shapes[f"p{index}.{MTP_LOGITS}"] = (given - (0 if forced else 1), vocab_size)
        shapes[f"p{index}.{FORCED_LOGITS}"] = (forced, vocab_size)
    return shapes


def score_prompts(
    runner: ModelRunner,
    prompts: list[ScorePrompt],
    *,
    chunk_tokens: int | None,
    mtp: bool,
    logprobs: bool,
    announce: Callable[[str], None],
) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of `score_shapes`, prompt by prompt; `announce` hears a line in front of each."""
    for index, prompt in enumerate(prompts):
        announce(f"prompt {index}: {len(prompt.input_ids)} tokens, {len(prompt.decode_ids)} forced")
        if logprobs:
            rows = {"logprobs": score_logprobs(runner, prompt, chunk_tokens=chunk_tokens)}
        else:
            rows = score_logits(runner, prompt, chunk_tokens=chunk_tokens, mtp=mtp)
        yield {f"p{index}.{name}": value for name, value in rows.items()}


def score_logits(
    runner: ModelRunner, prompt: ScorePrompt, *, chunk_tokens: int | None, mtp: bool
) -> dict[str, Tensor]:
    """prefill_logits [T, V], decode_logits [S, V] and, with mtp, mtp_prefill_logits.

    Row t of the MTP logits is fed the streams at t and the token at t + 1; the last prompt position needs a
    first forced token, so without one there are T - 1 rows. Float32.
    """
    sequence = runner.open_sequence(len(prompt.input_ids) + len(prompt.decode_ids))
    try:
        next_ids = prompt.input_ids[1:] + prompt.decode_ids[:1]
        main: list[Tensor] = []
        drafted: list[Tensor] = [torch.empty(0, runner.vocab_size)]
        first = 0
        for streams in _prefill(runner, sequence, prompt.input_ids, chunk_tokens):
            main.append(runner.logits(streams))
            wanted = next_ids[first : first + len(streams)]
            if mtp and wanted:
                drafted.append(runner.mtp_logits(sequence, streams[: len(wanted)], wanted))
            first += len(streams)
        rows = {LOGITS: torch.cat(main)}
        if mtp:
            rows[MTP_LOGITS] = torch.cat(drafted)
        forced = [runner.forward([Chunk(sequence, [token_id])]) for token_id in prompt.decode_ids]
        rows[FORCED_LOGITS] = torch.cat(forced) if forced else torch.empty(0, runner.vocab_size)
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
) -> Iterator[Tensor]:
    """Streams of the prompt, one part at a time: those of a long one are larger than its caches."""
    step = chunk_tokens or MAX_STEP_TOKENS
    for low in range(0, len(ids), step):
        yield runner.streams(Chunk(sequence, ids[low : low + step]))


def require_writable(path: Path) -> None:
    """Refuses an output path that could not be written after the work is done. Raises ConfigError."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"--output {path}: the directory {parent} does not exist. Make it first.")
    if path.exists() and not path.is_file():
        raise ConfigError(f"--output {path} is there and is not a file. Name another.")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"--output {path}: the directory {parent} is not writable. Name another.")


def require_space(path: Path, shapes: Shapes) -> None:
    """Refuses outputs that the disk has no room for. Raises ConfigError."""
    wanted_bytes = sum(_num_bytes(shape) for shape in shapes.values())
    free_bytes = shutil.disk_usage(path.absolute().parent).free
    if wanted_bytes > free_bytes:
        raise ConfigError(
            f"--output {path} would take {wanted_bytes} bytes and its disk has {free_bytes} free. Score "
            "fewer tokens at once, or use --logprobs, which keeps one number per token."
        )


def write_scores(path: Path, shapes: Shapes, scored: Iterable[Mapping[str, Tensor]]) -> None:
    """Safetensors file of float32 tensors that come prompt by prompt, in the order of `shapes`.

    Written beside its name and moved there at the end: a failure leaves what was there before. Raises
    ConfigError where it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    waiting = iter(shapes.items())
    try:
        with partial.open("wb") as stream:
            stream.write(_header(shapes))
            for tensors in scored:
                for name, tensor in tensors.items():
                    due, shape = next(waiting)
                    assert (name, tuple(tensor.shape)) == (due, shape), (name, tensor.shape, due, shape)
                    stream.write(tensor.float().contiguous().view(-1).numpy().data)
            assert next(waiting, None) is None, "scoring ended early"
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror or error}.") from None
    finally:
        # what cannot be removed was never made; the error that says why is on its way
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _num_bytes(shape: tuple[int, ...]) -> int:
    return 4 * math.prod(shape)


def _header(shapes: Shapes) -> bytes:
    entries: dict[str, object] = {}
    start_bytes = 0
    for name, shape in shapes.items():
        stop_bytes = start_bytes + _num_bytes(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": (start_bytes, stop_bytes)}
        start_bytes = stop_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    # the format pads with spaces so that the tensors start at a multiple of 8
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
