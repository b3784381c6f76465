"""`ascend-v4 score`: logits or logprobs of given tokens, into a safetensors file."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ascend_v4.cli.options import ModelOptions, model_options
from ascend_v4.cli.output import emit_json, say
from ascend_v4.errors import ConfigError


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
@model_options
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
    model: ModelOptions,
    chunk_tokens: int | None,
    mtp: bool,
    logprobs: bool,
    as_json: bool,
) -> None:
    """Score given token ids with CHECKPOINT, a directory in the release layout or a pack. Needs no tokenizer.

    For prompt k the output holds p{k}.prefill_logits [T, vocab] and p{k}.decode_logits [S, vocab] in float32:
    the logits after every prompt token and after every forced token.
    """
    if mtp and logprobs:
        raise ConfigError("--mtp and --logprobs exclude each other: logprobs are those of the main model.")
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint} is not a directory. Name a checkpoint directory.")
    from ascend_v4.checkpoint.pack import require_finished
    from ascend_v4.config import ModelConfig
    from ascend_v4.engine.runner import build_runner
    from ascend_v4.engine.scoring import (
        read_prompts,
        require_space,
        require_writable,
        score_prompts,
        score_shapes,
        write_scores,
    )

    require_writable(output_path)
    require_finished(checkpoint)
    config = ModelConfig.from_file(checkpoint)
    prompts = read_prompts(
        input_path, vocab_size=config.vocab_size, max_tokens=config.max_position_embeddings
    )
    shapes = score_shapes(prompts, config.vocab_size, mtp=mtp, logprobs=logprobs)
    require_space(output_path, shapes)
    longest = max(len(prompt.input_ids) + len(prompt.decode_ids) for prompt in prompts)
    runner = build_runner(
        checkpoint,
        device=model.on.request(),
        numerics=model.numerics,
        max_sequence_tokens=longest,
        cache_tokens=longest,
        max_sequences=1,
        mtp=mtp,
        quantize=model.quantize,
        cache_dir=model.cache_dir,
    )
    started = time.perf_counter()
    scored = score_prompts(
        runner, prompts, chunk_tokens=chunk_tokens, mtp=mtp, logprobs=logprobs, announce=say
    )
    write_scores(output_path, shapes, scored)
    seconds = time.perf_counter() - started
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
                "tensors": {name: list(shape) for name, shape in shapes.items()},
            }
        )
