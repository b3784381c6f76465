"""Runs the contract process and reads what it found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.npu_contract.environment import ROOT

TIMEOUT_SECONDS = 1800


class ContractProcessError(Exception):
    """The process ended without a report; the message is the end of what it said."""


def contract_report(*, only: Sequence[str] | None = None, rename: str | None = None) -> dict[str, Any]:
    """The report of a process of its own; see `tools.npu_contract.process` for what it holds.

    only names runs, rename an argument that calls spell otherwise. Raises ContractProcessError.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "report.json")
        command = [sys.executable, "-m", "tools.npu_contract.process", str(path)]
        if only is not None:
            command += ["--only", *only]
        if rename is not None:
            command += ["--rename", rename]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
        if done.returncode or not path.is_file():
            said = (done.stderr or done.stdout).strip()[-2000:]
            raise ContractProcessError(f"the contract process ended with {done.returncode}: {said}")
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report
