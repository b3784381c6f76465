"""Repack golden sets to w8a8, score them, and print the table of docs/repack.md.

    .venv/bin/python tools/repack_report.py [FOLDER ...]

Each folder holds one set; without arguments the one-layer sets of tests/golden/ are measured. Distances are
the root mean square difference of logits over all prompt rows: with the target's numerics against the
official reference's native logits, and in float32 against its exact ones. Ends non-zero when packs rounded
exactly are farther away on average than absmax packs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from ascend_v4.cli.score import command
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import RoundingChoice, Target

ROOT = Path(__file__).resolve().parent.parent
NUMERICS = {"auto": "native", "exact": "exact"}
"""Numerics a pack is scored with, and the reference logits it is compared with."""


@dataclass(frozen=True, slots=True)
class Distance:
    """Of a pack's logits from the reference's."""

    rms: float
    cosine: float
    argmax: float
    """Share of rows with the same most probable token."""


Distances = dict[tuple[str, RoundingChoice], Distance]


def main() -> int:
    """Print one row per set, rounding and numerics, then the averages; 1 when absmax is nearer."""
    folders = [Path(name) for name in sys.argv[1:]]
    if not folders:
        folders = sorted(path.parent for path in (ROOT / "tests" / "golden").glob("layer-*/config.json"))
    print("| set | rounding | w8a8 against native: rms, cosine, argmax | float32 against exact |")
    print("|---|---|---|---|")
    measured = []
    for folder in folders:
        measured.append(measure(folder))
        for rounding in RoundingChoice:
            cells = (shown(measured[-1][numerics, rounding]) for numerics in NUMERICS)
            print(f"| {folder.name} | {rounding.value} | {' | '.join(cells)} |", flush=True)
    means = {key: sum(each[key].rms for each in measured) / len(measured) for key in measured[0]}
    for rounding in RoundingChoice:
        values = (f"{means[numerics, rounding]:.6f}" for numerics in NUMERICS)
        print(f"| average rms | {rounding.value} | {' | '.join(values)} |")
    exact, absmax = RoundingChoice.EXACT, RoundingChoice.ABSMAX
    return 0 if all(means[numerics, exact] <= means[numerics, absmax] for numerics in NUMERICS) else 1


def measure(folder: Path) -> Distances:
    """Distances of a set by numerics and rounding."""
    found: Distances = {}
    with tempfile.TemporaryDirectory() as scratch:
        for rounding in RoundingChoice:
            pack = Path(scratch) / rounding.value
            run_repack(RepackConfig(source=folder, output=pack, target=Target.W8A8, rounding=rounding))
            for numerics, reference in NUMERICS.items():
                expected = folder / f"expected-{reference}.safetensors"
                found[numerics, rounding] = distance(pack, expected, numerics=numerics)
    return found


def distance(pack: Path, expected_file: Path, *, numerics: str) -> Distance:
    """Of the logits after every prompt token of a set."""
    expected = load_file(expected_file)
    num_prompts = sum(name.endswith(".input_ids") for name in expected)
    prompts = [{"input_ids": expected[f"p{index}.input_ids"].tolist()} for index in range(num_prompts)]
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch) / "in.json", Path(scratch) / "out.safetensors"
        asked.write_text(json.dumps({"prompts": prompts}), encoding="utf-8")
        flags = ["--input", str(asked), "--output", str(answered), "--numerics", numerics]
        command.main([str(pack), *flags], standalone_mode=False)
        got = load_file(answered)
    names = [f"p{index}.prefill_logits" for index in range(num_prompts)]
    ours = torch.cat([got[name] for name in names]).double()
    theirs = torch.cat([expected[name] for name in names]).double()
    return Distance(
        rms=(ours - theirs).pow(2).mean().sqrt().item(),
        cosine=torch.cosine_similarity(ours, theirs, dim=1).mean().item(),
        argmax=(ours.argmax(1) == theirs.argmax(1)).double().mean().item(),
    )


def shown(measured: Distance) -> str:
    """One cell of the table."""
    return f"{measured.rms:.6f}, {measured.cosine:.6f}, {measured.argmax:.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
