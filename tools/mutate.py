"""Flip one layout assumption of the Ascend adapters at a time, and see that a test fails each time.

    .venv/bin/python -m tools.mutate [ID ...] [--jobs N] [--seconds S]

The flips are data, in tools/mutations/. Each is made in a copy of the tree, never in the tree itself, and
the test that it names is run there. A flip that no test notices makes this end non-zero, and so does one that
only breaks the program, or whose test is red without it. A run of the whole list writes docs/mutations.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import queue
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tools" / "mutations"
REPORT = ROOT / "docs" / "mutations.md"
COPIED = ("ascend_v4", "operators", "configs", "tests", "tools")
LEFT_OUT = ("__pycache__", "golden")
"""Folders that no named test needs."""
PRELOADED = ("torch", "pytest", "numpy", "click", "yaml", "safetensors.torch")
"""What every test process needs and no flip changes: imported once, by the process they are forked from."""
NO_PROOF = (
    "NameError",
    "UnboundLocalError",
    "AttributeError",
    "SyntaxError",
    "ImportError",
    "ModuleNotFound",
)
"""Errors of a program that does not run: they say nothing about layouts."""
SAID = "said.txt"
TESTS_FAILED = 1
"""pytest's exit status when a test failed; others mean that tests were not run."""
LONGEST_REASON = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One flip: `old`, which stands exactly once in `file`, becomes `new`."""

    id: str
    file: str
    flips: str
    """The assumption, in the words that the list is searched by."""
    breaks: str
    """What the adapter would then do."""
    old: str
    new: str
    test: str
    """The test that must fail, as pytest names it, with or without parameters."""

    def applied(self, text: str) -> str:
        """The file's text after the flip. Raises ValueError where `old` does not stand there exactly once."""
        found = text.count(self.old)
        if found != 1:
            raise ValueError(
                f"mutation {self.id}: its old text stands {found} times in {self.file}, it must stand there "
                "once. Bring tools/mutations/ up to date with the adapter."
            )
        return text.replace(self.old, self.new)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one run of tests showed."""

    status: int
    seconds: float
    failed: str = ""
    """The first test that failed."""
    reason: str = ""
    """The first line of its failure, or what pytest said where it ran no test."""

    @property
    def is_caught(self) -> bool:
        """Whether a test failed, and not because the program no longer runs."""
        return self.status == TESTS_FAILED and bool(self.failed) and not self.reason.startswith(NO_PROOF)


def load_mutations(folder: Path = LIST) -> dict[str, list[Mutation]]:
    """The list by family, which is the file's name. Raises ValueError for what is not a list of mutations."""
    names = {field.name for field in fields(Mutation)}
    families: dict[str, list[Mutation]] = {}
    for path in sorted(folder.glob("*.yaml")):
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
        for row in rows:
            if set(row) != names:
                raise ValueError(
                    f"{path.name}: {row.get('id')} has {sorted(row)}, it must have {sorted(names)}."
                )
        families[path.stem] = [Mutation(**row) for row in rows]
    return families


class Sandbox:
    """A copy of what tests need, to flip things in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            ignored = shutil.ignore_patterns(*LEFT_OUT)
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        # compiled files that go by the source's content: a flip may be as long as what it replaces
        by_content = ("-m", "compileall", "-q", "--invalidation-mode", "checked-hash")
        subprocess.run([sys.executable, *by_content, *COPIED], cwd=folder, check=True)

    def run(self, tests: Sequence[str], *, seconds: float) -> Outcome:
        """Runs tests until the first failure, at most `seconds` long."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        arguments = ["-x", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        start = time.perf_counter()
        process = self._context.Process(target=_run_pytest, args=(self.folder, arguments))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            return Outcome(status=-1, seconds=seconds, reason=f"no result after {seconds:.0f} s")
        spent = time.perf_counter() - start
        if process.exitcode not in (0, TESTS_FAILED) or not report.exists():
            said = (self.folder / SAID).read_text(encoding="utf-8").strip().splitlines()
            return Outcome(status=process.exitcode, seconds=spent, reason="".join(said[-1:]))
        failed, reason = next(_failures(report), ("", ""))
        return Outcome(status=process.exitcode, seconds=spent, failed=failed, reason=reason)

    def run_mutated(self, mutation: Mutation, *, seconds: float) -> Outcome:
        """Runs the mutation's test with its flip in place, and takes the flip back."""
        path = self.folder / mutation.file
        before = path.read_text(encoding="utf-8")
        path.write_text(mutation.applied(before), encoding="utf-8")
        try:
            return self.run([mutation.test], seconds=seconds)
        finally:
            path.write_text(before, encoding="utf-8")


def _run_pytest(folder: Path, arguments: list[str]) -> None:
    """Runs tests of a copy in this process, which was forked for them, on one thread."""
    import pytest
    import torch

    os.chdir(folder)
    with (folder / SAID).open("w", encoding="utf-8") as said:
        os.dup2(said.fileno(), sys.stdout.fileno())
        os.dup2(said.fileno(), sys.stderr.fileno())
    sys.dont_write_bytecode = True
    sys.path[:] = [str(folder), *(place for place in sys.path if Path(place).resolve() != ROOT)]
    torch.set_num_threads(1)
    raise SystemExit(int(pytest.main(arguments)))


def _failures(report: Path) -> Iterator[tuple[str, str]]:
    """Name and first line of each failure that pytest wrote down."""
    for case in ElementTree.parse(report).iter("testcase"):
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                lines = [line.strip() for line in found.get("message", "").splitlines() if line.strip()]
                first = lines[0] if lines else kind
                yield case.get("name", ""), first.removeprefix("ascend_v4.errors.")


def main() -> int:
    """Flip, test, report; 1 when the list does not prove what it claims."""
    asked = _arguments()
    families = load_mutations()
    everything = [mutation for family in families.values() for mutation in family]
    unknown = set(asked.ids) - {mutation.id for mutation in everything}
    if unknown:
        print(f"error: no mutation is called {', '.join(sorted(unknown))}.", file=sys.stderr)
        return 2
    chosen = [mutation for mutation in everything if not asked.ids or mutation.id in asked.ids]
    start = time.perf_counter()
    outcomes = run_all(chosen, jobs=asked.jobs, seconds=asked.seconds)
    if outcomes is None:
        return 1
    missed = [mutation.id for mutation in chosen if not outcomes[mutation.id].is_caught]
    spent = time.perf_counter() - start
    print(f"{len(chosen) - len(missed)} of {len(chosen)} mutations caught in {spent:.0f} s")
    if missed:
        print(f"error: not caught: {', '.join(missed)}. Write the test that would have.", file=sys.stderr)
        return 1
    if not asked.ids:
        REPORT.write_text(_document(families, outcomes, spent=spent, jobs=asked.jobs), encoding="utf-8")
        print(f"wrote {REPORT.relative_to(ROOT)}")
    return 0


def run_all(chosen: Sequence[Mutation], *, jobs: int, seconds: float) -> dict[str, Outcome] | None:
    """Outcomes by id, `jobs` at a time; None where a named test fails without any flip."""
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        free: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()
        for index in range(jobs):
            free.put(Sandbox(Path(scratch) / str(index)))

        def unchanged(tests: Sequence[str]) -> Outcome:
            sandbox = free.get()
            try:
                return sandbox.run(tests, seconds=jobs * seconds * len(tests))
            finally:
                free.put(sandbox)

        def flipped(mutation: Mutation) -> Outcome:
            sandbox = free.get()
            try:
                return sandbox.run_mutated(mutation, seconds=seconds)
            finally:
                free.put(sandbox)

        tests = sorted({mutation.test for mutation in chosen})
        for outcome in pool.map(unchanged, filter(None, (tests[index::jobs] for index in range(jobs)))):
            if outcome.status:
                where = outcome.failed or "pytest"
                print(f"error: without any flip, {where} fails: {outcome.reason}", file=sys.stderr)
                return None
        outcomes: dict[str, Outcome] = {}
        for mutation, outcome in zip(chosen, pool.map(flipped, chosen), strict=True):
            outcomes[mutation.id] = outcome
            verdict = "caught" if outcome.is_caught else "NOT CAUGHT"
            said = outcome.reason or "all tests passed"
            print(f"{verdict} {outcome.seconds:5.1f} s  {mutation.id}: {outcome.failed} {said}", flush=True)
        return outcomes


def _document(
    families: dict[str, list[Mutation]], outcomes: dict[str, Outcome], *, spent: float, jobs: int
) -> str:
    lines = [
        "# Mutations of the Ascend adapters",
        "",
        "Written by `make mutate`; do not edit. Each row is one assumption about a vendor's layout or",
        "argument, flipped in a copy of `operators/npu/`, and the test that failed for it. A flip that no",
        "test notices fails the run. The flips themselves are in `tools/mutations/`.",
        "",
        f"Last run: {date.today().isoformat()}, {len(outcomes)} mutations, all caught, {spent:.0f} s with "
        f"{jobs} at a time on {platform.machine()}, Python {platform.python_version()}.",
    ]
    for family, mutations in families.items():
        lines += [
            "",
            f"## {family}",
            "",
            "| mutation | what it flips | caught by | how | s |",
            "|---|---|---|---|---|",
        ]
        for mutation in mutations:
            outcome = outcomes[mutation.id]
            test = f"`{mutation.test.partition('::')[0]}`: {outcome.failed}"
            cells = (
                f"`{mutation.id}`",
                f"{mutation.flips}: {mutation.breaks}",
                test,
                textwrap.shorten(outcome.reason, LONGEST_REASON, placeholder=" ..."),
                f"{outcome.seconds:.0f}",
            )
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("ids", nargs="*", help="mutations to try; all of them if none is named")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (default 2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest run of a test (default 60)")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
