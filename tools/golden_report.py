"""Measure every golden set through `ascend-v4 score` and print the table of docs/numerics.md.

    .venv/bin/python tools/golden_report.py [FOLDER ...]

Each folder holds one set; without arguments those of tests/golden/ are measured, whole and in chunks of 7 and
of 128 tokens. Ends non-zero when a set misses the bounds that docs/numerics.md names.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ascend_v4.cli.score import command

ROOT = Path(__file__).resolve().parent.parent
CHUNKS = (None, 7, 128)
EXACT_BOUND = 1e-4
MAIN = ("prefill_logits", "decode_logits")
MTP = ("mtp_prefill_logits",)


@dataclass(frozen=True, slots=True)
class Closeness:
    """How far scored logits lie from the expected ones, pooled over all rows of a set."""

    worst: float
    cosine: float
    argmax: float
    """Share of rows with the same most probable token."""


def main() -> int:
    """Print one row per set, numerics and chunk; 1 when any misses its bounds."""
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders:
        folders = sorted(path.parent for path in (ROOT / "tests" / "golden").glob("*/config.json"))
    print(
        "| set | numerics | chunk | prefill and decode: worst, cosine, argmax | MTP: worst, cosine, argmax |"
    )
    print("|---|---|---|---|---|")
    num_missed = 0
    for folder in folders:
        is_deep = len(json.loads((folder / "config.json").read_text(encoding="utf-8"))["compress_ratios"]) > 2
        for numerics in ("exact", "native"):
            for chunk_tokens in CHUNKS:
                body, mtp = measure(folder, numerics, chunk_tokens=chunk_tokens)
                meets = is_close(body, mtp, numerics=numerics, is_deep=is_deep)
                num_missed += not meets
                note = "" if meets else " MISSED"
                chunk = "whole" if chunk_tokens is None else chunk_tokens
                print(
                    f"| {folder.name} | {numerics} | {chunk}{note} | {shown(body)} | {shown(mtp)} |",
                    flush=True,
                )
    return 1 if num_missed else 0


def measure(folder: Path, numerics: str, *, chunk_tokens: int | None) -> tuple[Closeness, Closeness]:
    """Closeness of the main model's logits and of the MTP block's."""
    want = load_file(folder / f"expected-{numerics}.safetensors")
    num_prompts = sum(name.endswith(".input_ids") for name in want)
    prompts = [
        {name: want[f"p{index}.{name}"].tolist() for name in ("input_ids", "decode_ids")}
        for index in range(num_prompts)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "in.json", Path(scratch) / "out.safetensors"
        asked.write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
        flags = ["--input", str(asked), "--output", str(answered), "--numerics", numerics, "--mtp"]
        flags += [] if chunk_tokens is None else ["--chunk", str(chunk_tokens)]
        command.main([str(folder), *flags], standalone_mode=False)
        got = load_file(answered)
    return compare(got, want, MAIN), compare(got, want, MTP)


def compare(got: dict[str, Tensor], want: dict[str, Tensor], kinds: tuple[str, ...]) -> Closeness:
    """Closeness over the rows of some kinds of logits, all prompts together."""
    names = [name for name in sorted(want) if name.partition(".")[2] in kinds]
    ours = torch.cat([got[name] for name in names]).double()
    theirs = torch.cat([want[name] for name in names]).double()
    return Closeness(
        worst=(ours - theirs).abs().max().item(),
        cosine=torch.cosine_similarity(ours, theirs, dim=1).mean().item(),
        argmax=(ours.argmax(1) == theirs.argmax(1)).double().mean().item(),
    )


def is_close(body: Closeness, mtp: Closeness, *, numerics: str, is_deep: bool) -> bool:
    """Whether a measurement keeps the bounds; argmax and MTP of deep sets are not judged in native."""
    if numerics == "exact":
        return max(body.worst, mtp.worst) <= EXACT_BOUND and body.argmax == mtp.argmax == 1
    if is_deep:
        return body.cosine >= 0.97
    return body.cosine >= 0.9999 and body.argmax >= 0.99 and mtp.cosine >= 0.999 and mtp.argmax >= 0.93


def shown(close: Closeness) -> str:
    """One cell of the table."""
    return f"{close.worst:.1e}, {close.cosine:.6f}, {close.argmax:.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
