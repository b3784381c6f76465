"""Writes the simulated part of operators/status.yaml from the cases that tests/npu/test_cases.py runs.

    python -m tools.operator_status

An adapter counts as simulated on a chip where it is asked a case at sizes that the chip's kernel takes, and
as simulated (waived) where all its cases need waived limits. Lines about machines are kept as they are. A
test holds the file to what this finds, and the cases themselves must pass, so that no line claims more than
was run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import WAIVABLE
from ascend_v4.operators.status import SIMULATED, WAIVED, load_status
from ascend_v4.operators.testing.cases import all_cases

FILE = Path(__file__).resolve().parents[1] / "operators" / "status.yaml"
Statuses = dict[str, dict[str, dict[str, str]]]
"""provider -> operator -> chip -> status."""


def simulated() -> Statuses:
    """What the cases show of every adapter."""
    found: Statuses = defaultdict(lambda: defaultdict(dict))
    for chip in Chip:
        strict = Target(device="sim", chip=chip, packages=simulator.packages(chip))
        for case in all_cases(replace(strict, waived=frozenset(WAIVABLE))):
            assert case.implementation is not None
            if case.slow:
                continue
            statuses = found[case.implementation.provider][case.operator.name]
            if statuses.get(chip.value) == SIMULATED:
                continue
            if replace(case, target=strict).left_out is None:
                statuses[chip.value] = SIMULATED
            elif chip.value not in statuses and case.left_out is None:
                statuses[chip.value] = WAIVED
    return {
        provider: {name: chips for name, chips in operators.items() if chips}
        for provider, operators in found.items()
    }


def merged(measured: Mapping[str, object], shown: Statuses) -> Statuses:
    """The simulated statuses, with those of machines from the table in their place."""
    whole: Statuses = {
        provider: {operator: dict(chips) for operator, chips in operators.items()}
        for provider, operators in shown.items()
    }
    for provider, operators in measured.items():
        assert isinstance(operators, dict), provider
        for operator, chips in operators.items():
            for chip, status in chips.items():
                if ", " in status:
                    whole.setdefault(provider, {}).setdefault(operator, {})[chip] = status
    return whole


def text_of(statuses: Statuses) -> str:
    """The file: its comments as they are, the npu part anew, in an order that no import decides."""
    chips = [chip.value for chip in Chip]
    ordered = {
        provider: {
            operator: {chip: found[chip] for chip in chips if chip in found}
            for operator, found in sorted(operators.items())
        }
        for provider, operators in sorted(statuses.items())
    }
    head = FILE.read_text(encoding="utf-8").partition("\nnpu:")[0]
    cuda = load_status()["cuda"]
    body = yaml.safe_dump(
        {"npu": ordered, "cuda": cuda}, sort_keys=False, default_flow_style=None, width=1000
    )
    return f"{head}\n{body}"


def main() -> None:
    """Writes the file."""
    FILE.write_text(text_of(merged(load_status()["npu"], simulated())), encoding="utf-8")
    print(f"wrote {FILE.name}")


if __name__ == "__main__":
    main()
