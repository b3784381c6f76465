"""`ascend-v4 repack`: turn a checkpoint into what a chip runs, check an output, or say what would happen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ascend_v4.cli.output import emit_json, say

TARGETS = ("w8a8", "w4a8", "mx", "bf16", "release")
LAYOUTS = ("native", "modelslim", "huggingface")
DIRECTORY = click.Path(path_type=Path)


@click.command()
@click.argument("source", metavar="[SRC]", required=False)
@click.argument("out", metavar="[OUT]", required=False, type=DIRECTORY)
@click.option("--to", "target", type=click.Choice(TARGETS), help="What the output is for: see --explain.")
@click.option(
    "--recipe",
    metavar="NAME",
    help="Which weights become what: accurate (the default), modelslim or cann for w8a8 and w4a8.",
)
@click.option(
    "--rounding",
    type=click.Choice(["exact", "absmax"]),
    default="exact",
    show_default=True,
    help="How INT8 rows made from FP4 are scaled. exact: by a power of two where that keeps every weight.",
)
@click.option(
    "--keep", multiple=True, metavar="bf16=PATTERN", help="Weights to keep in bf16, by name; may be repeated."
)
@click.option("--reversible", is_flag=True, help="Keep what --to release needs for identical bytes.")
@click.option("--layout", type=click.Choice(LAYOUTS), default="native", show_default=True)
@click.option("--ranks", metavar="tp=N,ep=N", help="One set of files per rank, each with its own slices.")
@click.option(
    "--max-part-bytes", type=click.IntRange(1), help="Start a new file beyond this.  [default: 4 GB]"
)
@click.option(
    "--jobs",
    type=click.IntRange(1, 256),
    help="Threads.  [default: one per processor, at most 16; 2 without compiled kernels]",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda", "npu"]),
    default="cpu",
    show_default=True,
    help="Where weights are converted. Another device than cpu is tried first: it must give the same bits.",
)
@click.option("--explain", is_flag=True, help="Print what the recipe does and why, and stop.")
@click.option("--dry-run", is_flag=True, help="Print sizes and times, of all targets without --to, and stop.")
@click.option("--verify", "verified", type=DIRECTORY, metavar="OUT", help="Check a finished output.")
@click.option(
    "--source",
    "compared",
    type=DIRECTORY,
    metavar="SRC",
    help="With --verify: compare every number with this checkpoint.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(source: str | None, out: Path | None, **options: object) -> None:
    """Turn a checkpoint into what a chip runs.

    SRC is a checkpoint directory, OUT a new directory. A run that was interrupted goes on when the same
    command is given again, and ends with the same bytes. With --dry-run SRC may also be a config file or one
    of flash, pro, tiny, and OUT may be left out.

    \b
    w8a8     INT8 for Atlas A2 and A3; FP4 experts without error where INT8 can hold them
    w4a8     as w8a8, with INT4 experts
    mx       MXFP8 and MXFP4 for Ascend 950; no number changes
    bf16     every weight in bf16; no number changes
    release  back to the release's FP8 and FP4
    """
    flags: Mapping[str, Any] = options
    if flags["compared"] is not None and flags["verified"] is None:
        raise click.UsageError("--source goes with --verify OUT only.")
    if flags["verified"] is not None:
        if source is not None:
            raise click.UsageError(
                "--verify OUT takes no other directory; name the source with --source SRC."
            )
        verify(flags)
    elif flags["explain"]:
        explain_recipes(flags)
    elif source is None:
        raise click.UsageError("name the checkpoint: ascend-v4 repack SRC OUT --to TARGET.")
    elif flags["dry_run"]:
        dry_run(source, out, flags)
    elif out is None or flags["target"] is None:
        missing = "OUT, the directory to write," if out is None else "--to, what the output is for,"
        raise click.UsageError(f"{missing} is missing: ascend-v4 repack SRC OUT --to TARGET.")
    else:
        repack(source, out, flags)


def repack(source: str, out: Path, flags: Mapping[str, Any]) -> None:
    """Run it with a bar, then print what became of the weights."""
    from contextlib import ExitStack

    from ascend_v4.repack.config import RepackConfig
    from ascend_v4.repack.job import Job
    from ascend_v4.repack.pipeline import run_repack
    from ascend_v4.repack.progress import LateBar
    from ascend_v4.repack.report import report_lines

    config = RepackConfig.from_flags(source, out, flags)
    with ExitStack() as stack:
        bar = LateBar(stack)

        def begin(job: Job) -> None:
            size = f"{job.part_bytes / 1e9:.2f} GB in {counted(len(job.parts))}"
            say(f"writing {size} to {config.output}, {job.num_threads} at a time")
            bar.begin(job.part_bytes, title="repacking")

        report = run_repack(config, on_plan=begin, on_bytes=bar.add)
    summary = report.summary()
    resumed = (
        f"; {report.resumed_parts} of {report.num_parts} parts were whole already"
        if report.resumed_parts
        else ""
    )
    written = (
        f"{report.written_bytes / 1e9:.2f} GB in {report.seconds:.1f} s ({summary['gb_per_s']:.2f} GB/s)"
    )
    say(f"done, {written}{resumed}")
    if flags["as_json"]:
        emit_json(summary)
        return
    for line in report_lines(report.manifest.totals):
        click.echo(line)


def verify(flags: Mapping[str, Any]) -> None:
    """Check an output; a difference is an error."""
    from ascend_v4.repack.manifest import read_manifest
    from ascend_v4.repack.progress import progress_bar
    from ascend_v4.repack.verify import verify_output

    directory, compared = flags["verified"], flags["compared"]
    total_bytes = sum(entry.num_bytes for entry in read_manifest(directory).files.values())
    with progress_bar(total_bytes * (1 if compared is None else 2), title="verifying") as on_bytes:
        report = verify_output(directory, source=compared, jobs=flags["jobs"], on_bytes=on_bytes)
    if flags["as_json"]:
        emit_json(report.summary())
        return
    click.echo(f"{directory}: {report.num_files:,} files, {report.num_tensors:,} tensors, all as written")
    if compared is not None:
        counted = f"{report.decoded_weights:,} converted weights were decoded and counted"
        click.echo(f"every byte follows from {compared}; {counted}")


def explain_recipes(flags: Mapping[str, Any]) -> None:
    """Print the recipe of a target, or the default of each."""
    from ascend_v4.repack.recipes import Target, explain, load_recipe

    if flags["target"] is None and flags["recipe"] is not None:
        raise click.UsageError("--recipe goes with --to: each target has recipes of its own.")
    targets = list(Target) if flags["target"] is None else [Target(flags["target"])]
    recipes = [load_recipe(target, flags["recipe"]) for target in targets]
    if not flags["as_json"]:
        click.echo("\n\n".join(explain(recipe) for recipe in recipes))
        return
    described = {}
    for recipe in recipes:
        rules = {rule.part: {"becomes": rule.wanted.value, "why": rule.why} for rule in recipe.rules}
        described[recipe.target.value] = {"recipe": recipe.name, "summary": recipe.summary, "rules": rules}
    emit_json(described)


def dry_run(source: str, out: Path | None, flags: Mapping[str, Any]) -> None:
    """Print sizes and times of one target or of all."""
    from ascend_v4.repack.config import RepackConfig
    from ascend_v4.repack.preview import estimate_seconds, free_bytes, measure_rates, preview

    targets = TARGETS if flags["target"] is None else (flags["target"],)
    output = Path.cwd() if out is None else out
    configs = [RepackConfig.from_flags(source, output, {**flags, "target": target}) for target in targets]
    previews = [preview(config) for config in configs]
    place, free = free_bytes(output)
    rates = measure_rates(previews, directory=place, jobs=flags["jobs"], device=flags["device"])
    estimates = [(each, estimate_seconds(each, rates)) for each in previews]
    if flags["as_json"]:
        rows = [{**each.summary(), "estimated_seconds": seconds} for each, seconds in estimates]
        measured = {action.value: rate for action, rate in rates.bytes_per_s.items()}
        emit_json({"source": source, "free_bytes": free, "bytes_per_s": measured, "targets": rows})
        return
    for each, seconds in estimates:
        recipe = each.laid_out.plan.recipe
        what = f"{recipe.target.value:8} {recipe.name:10} {each.output_bytes / 2**30:9,.2f} GiB"
        more = "; more than is free" if each.needed_bytes > free else ""
        click.echo(f"{what} in {counted(len(each.laid_out.parts))}, about {duration(seconds)}{more}")
    click.echo(f"free in {place}: {free / 2**30:,.1f} GiB")
    how = f"by {rates.threads} threads, measured just now writing there"
    click.echo(f"times: {how}; a slow source or disk adds to them")


def counted(parts: int) -> str:
    """How many parts, in words."""
    return "1 part" if parts == 1 else f"{parts:,} parts"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in two digits or so."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
