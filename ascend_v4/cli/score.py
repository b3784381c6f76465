"""`ascend-v4 score`: logits or logprobs of given tokens, into a safetensors file."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ascend_v4.cli.output import emit_json, say
from ascend_v4.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.json",
    help='{"prompts": [{"input_ids": [..], "decode_ids": [..]}]}; decode_ids are forced one by one.',
)
@click.option(
    "--output",
    "output_path",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.safetensors",
    help="Written whole or not at all.",
)
@click.option("--device", default="cpu", show_default=True, help="Where to run.")
@click.option(
    "--numerics",
    type=click.Choice(["auto", "exact", "native"]),
    default="auto",
    show_default=True,
    help="exact: float32, nothing quantised. native: the release's own rounding. auto: the checkpoint's own.",
)
@click.option(
    "--chunk", "chunk_tokens", type=click.IntRange(min=1), help="Prefill in chunks of this many tokens."
)
@click.option("--mtp", is_flag=True, help="Also p{k}.mtp_prefill_logits of the MTP block.")
@click.option(
    "--logprobs", is_flag=True, help="Write p{k}.logprobs of each given next token instead of logits."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object describing the result.")
def command(
    *,
    checkpoint: Path,
    input_path: Path,
    output_path: Path,
    device: str,
    numerics: str,
    chunk_tokens: int | None,
    mtp: bool,
    logprobs: bool,
    as_json: bool,
) -> None:
    """Score given token ids with CHECKPOINT, a directory in the release layout. Needs no tokenizer.

    For prompt k the output holds p{k}.prefill_logits [T, vocab] and p{k}.decode_logits [S, vocab] in float32:
    the logits after every prompt token and after every forced token.
    """
    if mtp and logprobs:
        raise ConfigError("--mtp and --logprobs exclude each other: logprobs are those of the main model.")
    if not output_path.absolute().parent.is_dir():
        raise ConfigError(f"--output {output_path}: its directory does not exist.")
    from ascend_v4.config import ModelConfig
    from ascend_v4.engine.runner import build_runner
    from ascend_v4.engine.scoring import read_prompts, score_logits, score_logprobs

    config = ModelConfig.from_file(checkpoint)
    prompts = read_prompts(
        input_path, vocab_size=config.vocab_size, max_tokens=config.max_position_embeddings
    )
    longest = max(len(prompt.input_ids) + len(prompt.decode_ids) for prompt in prompts)
    runner = build_runner(
        checkpoint,
        device=device,
        numerics=numerics,
        max_sequence_tokens=longest,
        cache_tokens=longest,
        max_sequences=1,
        mtp=mtp,
    )
    started = time.perf_counter()
    tensors: dict[str, Tensor] = {}
    for index, prompt in enumerate(prompts):
        say(f"prompt {index}: {len(prompt.input_ids)} tokens, {len(prompt.decode_ids)} forced")
        if logprobs:
            tensors[f"p{index}.logprobs"] = score_logprobs(runner, prompt, chunk_tokens=chunk_tokens)
        else:
            rows = score_logits(runner, prompt, chunk_tokens=chunk_tokens, mtp=mtp)
            tensors |= {f"p{index}.{name}": value for name, value in rows.items()}
    seconds = time.perf_counter() - started
    _write(output_path, tensors)
    tokens = sum(len(prompt.input_ids) + len(prompt.decode_ids) for prompt in prompts)
    chosen = runner.loaded.numerics.name
    say(f"{tokens} tokens in {seconds:.2f} s, numerics {chosen}: {output_path}")
    if as_json:
        emit_json(
            {
                "output": str(output_path),
                "numerics": chosen,
                "prompts": len(prompts),
                "tokens": tokens,
                "seconds": round(seconds, 3),
                "tensors": {name: list(value.shape) for name, value in tensors.items()},
            }
        )


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, str(partial))
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror or error}.") from None
    finally:
        partial.unlink(missing_ok=True)
