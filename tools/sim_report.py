"""Score golden sets on every simulated chip beside the CPU engine, and print the table of docs/ascend.md.

    .venv/bin/python -m tools.sim_report [FOLDER ...] [--chip C] [--pack P] [--arithmetic A] [--without P,Q]

Each folder holds one set, whose own prompts and forced tokens are scored; without folders those of
tests/golden/ are measured. A set is repacked as the chip wants it and scored through `ascend-v4 score`,
whole and in chunks of 7 and of 128 tokens, on `--device sim` and once, whole, on the CPU with the numerics
of that pack. A row shows the worst of the three chunkings. Ends non-zero when a row misses its bounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ascend_v4.cli.score import command
from ascend_v4.operators import simulator
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import Target
from tools.golden_report import MAIN, MTP, Closeness, compare

ROOT = Path(__file__).resolve().parent.parent
RELEASE = "release"
"""The files as they are; the 950 reads them as the mx pack that they equal."""
PACKS = {"a2": ("w8a8", "w4a8"), "a3": ("w8a8", "w4a8"), "950": (RELEASE, "mx")}
"""What each chip runs."""
ROUNDINGS = ("ideal", "chip")
CHUNKS = (None, 7, 128)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Least mean cosine and least share of equal most probable tokens."""

    cosine: float
    argmax: float

    def keep(self, close: Closeness) -> bool:
        """Whether a measurement is within them."""
        return close.cosine >= self.cosine and close.argmax >= self.argmax


ONE_LAYER = {"ideal": Bounds(0.9999, 0.99), "chip": Bounds(0.999, 0.97)}
COMPOSED = Bounds(0.9999, 0.98)
"""Without the vendors' packages, in ideal arithmetic: what plain torch composes there is float32."""
DRAFT = Bounds(0.999, 0.93)
"""Of the MTP block behind one layer: the bounds that the golden vectors came with."""
DEEP = Bounds(0.97, 0.0)


class GoldenSet:
    """One set: its prompts, its packs, and the CPU engine's logits for each, all made when first asked for.

    Packs and logits are files in `scratch`.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self._scratch = folder, scratch
        expected = load_file(folder / "expected-exact.safetensors")
        num_prompts = sum(name.endswith(".input_ids") for name in expected)
        prompts = [
            {name: expected[f"p{index}.{name}"].tolist() for name in ("input_ids", "decode_ids")}
            for index in range(num_prompts)
        ]
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "in.json").write_text(json.dumps({"prompts": prompts}), encoding="utf-8")

    @property
    def is_deep(self) -> bool:
        """Whether there are more layers than one in front of the MTP block."""
        return (
            len(json.loads((self.folder / "config.json").read_text(encoding="utf-8"))["compress_ratios"]) > 2
        )

    def checkpoint(self, pack: str) -> Path:
        """Folder of the set in the form `pack`."""
        if pack == RELEASE:
            return self.folder
        folder = self._scratch / pack
        if not folder.exists():
            run_repack(RepackConfig(source=self.folder, output=folder, target=Target(pack)))
        return folder

    def on_cpu(self, pack: str) -> dict[str, Tensor]:
        """Logits of the CPU engine, prompts whole, with the numerics of the chips that run this form."""
        kept = self._scratch / f"{pack}.safetensors"
        if not kept.exists():
            simulator.uninstall()
            flags = ["--quantize", "mx"] if pack == RELEASE else []
            self._score(pack, kept, flags)
        return load_file(kept)

    def on_chip(
        self, pack: str, chip: str, *, arithmetic: str, chunk: int | None, without: str = ""
    ) -> dict[str, Tensor]:
        """Logits of the adapters over simulated operators, sizes waived."""
        flags = ["--device", "sim", "--chip", chip, "--waive-limits", "sizes", "--sim-arithmetic", arithmetic]
        flags += ["--without", without] if without else []
        flags += [] if chunk is None else ["--chunk", str(chunk)]
        answer = self._scratch / "sim.safetensors"
        try:
            self._score(pack, answer, flags)
        finally:
            simulator.uninstall()
        return load_file(answer)

    def _score(self, pack: str, output: Path, flags: list[str]) -> None:
        asked = ["--input", str(self._scratch / "in.json"), "--output", str(output), "--mtp"]
        command.main([str(self.checkpoint(pack)), *asked, *flags], standalone_mode=False)

    def meets(self, arithmetic: str, body: Closeness, mtp: Closeness, *, without: str = "") -> bool:
        """Whether a measurement keeps its bounds; of deep sets only the main model's cosine is judged."""
        if self.is_deep:
            return DEEP.keep(body)
        bounds = COMPOSED if without and arithmetic == "ideal" else ONE_LAYER[arithmetic]
        return bounds.keep(body) and DRAFT.keep(mtp)


def closeness(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[Closeness, Closeness]:
    """Of prefill and decode pooled over all prompts, and of the MTP block."""
    return compare(dict(found), dict(expected), MAIN), compare(dict(found), dict(expected), MTP)


def worst(measured: list[Closeness]) -> Closeness:
    """The largest difference, the smallest cosine and share, each on its own."""
    return Closeness(
        worst=max(each.worst for each in measured),
        cosine=min(each.cosine for each in measured),
        argmax=min(each.argmax for each in measured),
    )


def main() -> int:
    """Print one row per set, chip, pack and arithmetic; 1 when any misses its bounds."""
    asked = _arguments()
    # models this small gain nothing from threads, and lose much to them on a busy machine
    torch.set_num_threads(1)
    folders = asked.folders or sorted(path.parent for path in (ROOT / "tests/golden").glob("*/config.json"))
    print("| set | chip | pack | arithmetic | prefill and decode: cosine, argmax | MTP: cosine, argmax |")
    print("|---|---|---|---|---|---|")
    num_missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for folder in folders:
            golden = GoldenSet(folder, Path(scratch) / folder.name)
            for chip, pack, arithmetic in _wanted(asked):
                body, mtp = _measure(golden, pack, chip, arithmetic=arithmetic, without=asked.without)
                meets = golden.meets(arithmetic, body, mtp, without=asked.without)
                num_missed += not meets
                cells = (folder.name, chip, pack, arithmetic + ("" if meets else " MISSED"))
                print(f"| {' | '.join(cells)} | {_shown(body)} | {_shown(mtp)} |", flush=True)
    return 1 if num_missed else 0


def _measure(
    golden: GoldenSet, pack: str, chip: str, *, arithmetic: str, without: str
) -> tuple[Closeness, Closeness]:
    expected = golden.on_cpu(pack)
    pairs = [
        closeness(golden.on_chip(pack, chip, arithmetic=arithmetic, chunk=chunk, without=without), expected)
        for chunk in CHUNKS
    ]
    return worst([body for body, _ in pairs]), worst([mtp for _, mtp in pairs])


def _wanted(asked: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    for chip, packs in PACKS.items():
        for pack in packs:
            for arithmetic in ROUNDINGS:
                given = ((asked.chip, chip), (asked.pack, pack), (asked.arithmetic, arithmetic))
                if all(wish in (None, each) for wish, each in given):
                    yield chip, pack, arithmetic


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--chip", choices=tuple(PACKS))
    parser.add_argument("--pack", choices=("w8a8", "w4a8", RELEASE, "mx"))
    parser.add_argument("--arithmetic", choices=ROUNDINGS)
    parser.add_argument("--without", default="", help="packages treated as absent, separated by commas")
    return parser.parse_args()


def _shown(close: Closeness) -> str:
    return f"{close.cosine:.6f}, {close.argmax:.1%}"


if __name__ == "__main__":
    raise SystemExit(main())
