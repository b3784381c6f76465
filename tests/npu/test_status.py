"""operators/status.yaml claims what the cases show, no more and no less."""

from __future__ import annotations

from ascend_v4.operators.status import SIMULATED, WAIVED, load_status
from tools.operator_status import FILE, merged, simulated, text_of


def test_the_table_is_what_the_cases_show():
    wanted = text_of(merged(load_status()["npu"], simulated()))
    assert FILE.read_text(encoding="utf-8") == wanted, "run python -m tools.operator_status"


def test_a_machine_takes_the_place_of_the_simulator():
    dated = {"aten": {"compress": {"a3": "Atlas 800 A3, 2026-10-01", "a2": SIMULATED}}}
    shown = {"aten": {"compress": {"a3": SIMULATED, "a2": WAIVED}}}
    assert merged(dated, shown) == {"aten": {"compress": {"a3": "Atlas 800 A3, 2026-10-01", "a2": WAIVED}}}
