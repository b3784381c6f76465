"""`ascend-v4 generate`: flags to a GenerateConfig, text to stdout as it comes."""

from __future__ import annotations

from pathlib import Path

import click

from ascend_v4.cli.options import ModelOptions, model_options
from ascend_v4.cli.output import emit_json, say


@click.command("generate")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--prompt", help="One user message.")
@click.option(
    "--messages",
    "messages_file",
    type=click.Path(path_type=Path),
    help='JSON file with a list of messages, or {"messages": [...], "tools": [...]}.',
)
@click.option(
    "--raw", "is_raw", is_flag=True, help="Continue --prompt as it stands, without the chat template."
)
@click.option("--thinking", is_flag=True, help="Let the model reason before it answers.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1, 1 << 30),
    default=256,
    show_default=True,
    help="Longest answer, in tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, 2),
    default=1.0,
    show_default=True,
    help="0 takes the most probable token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1),
    default=1.0,
    show_default=True,
    help="Sample among the most probable tokens that reach this share.",
)
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), help="Give the same answer again.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder or tokenizer.json, if elsewhere.")
@model_options
@click.option("--json", "prints_json", is_flag=True, help="Print one JSON object instead of streaming.")
def command(
    *,
    checkpoint: Path,
    prompt: str | None,
    messages_file: Path | None,
    is_raw: bool,
    thinking: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | None,
    tokenizer: Path | None,
    model: ModelOptions,
    prints_json: bool,
) -> None:
    """Answer one prompt or conversation with CHECKPOINT.

    The text goes to stdout as it comes, the speed to stderr at the end.
    """
    if (prompt is None) == (messages_file is None):
        raise click.UsageError("Give either --prompt or --messages.")
    if is_raw and (prompt is None or thinking):
        raise click.UsageError("--raw goes with --prompt and without --thinking.")

    from ascend_v4.engine.generate import GenerateConfig, generate
    from ascend_v4.engine.text import Channel, TextDelta

    last: Channel | None = None

    def show(delta: TextDelta) -> None:
        nonlocal last
        if not prints_json:
            border = "\n</think>\n" if last is Channel.REASONING and delta.channel is Channel.CONTENT else ""
            click.echo(border + delta.text, nl=False)
            last = delta.channel

    config = GenerateConfig(
        checkpoint=checkpoint,
        prompt=prompt,
        messages_file=messages_file,
        is_raw=is_raw,
        thinking=thinking,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        tokenizer=tokenizer,
        target=model.on.request(),
        numerics=model.numerics,
        quantize=model.quantize,
        cache_dir=model.cache_dir,
    )
    answer = generate(config, on_text=show)
    if prints_json:
        emit_json(answer.to_json())
    else:
        click.echo()
    say(answer.describe_speed())
