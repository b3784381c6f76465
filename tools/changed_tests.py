"""Run the tests that belong to the files changed since the last commit.

Names match by design: `operators/contracts/norm.py` is tested by files with `norm` in their name. A change
that no test file is named after runs everything; arguments are handed to pytest.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """pytest's exit status; 0 when nothing changed."""
    changed = changed_files()
    if not changed:
        print("nothing changed since the last commit")
        return 0
    tests = tests_of(changed, available=sorted(ROOT.glob("tests/**/test_*.py")))
    print("running:", " ".join(str(path.relative_to(ROOT)) for path in tests) or "all tests", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", "not slow", *map(str, tests), *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def changed_files() -> list[Path]:
    """Tracked and new files that differ from HEAD."""
    git = ["git", "-C", str(ROOT)]
    tracked = subprocess.run(
        [*git, "diff", "--name-only", "HEAD"], capture_output=True, text=True, check=True
    )
    new = subprocess.run(
        [*git, "ls-files", "--others", "--exclude-standard"], capture_output=True, text=True, check=True
    )
    return [Path(line) for line in (tracked.stdout + new.stdout).splitlines()]


def tests_of(changed: list[Path], *, available: list[Path]) -> list[Path]:
    """Test files named after the changed ones; empty, which means all, when one has no namesake."""
    chosen: set[Path] = set()
    for path in changed:
        if path.suffix not in (".py", ".cpp", ".h"):
            continue
        stem = path.stem.removeprefix("test_")
        matching = {test for test in available if stem in test.stem}
        if not matching:
            return []
        chosen |= matching
    return sorted(chosen)


if __name__ == "__main__":
    raise SystemExit(main())
