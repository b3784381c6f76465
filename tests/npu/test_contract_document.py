"""docs/operators.md says what the code says."""

from __future__ import annotations

from ascend_v4.device.soc import Chip
from ascend_v4.operators.contract import CATALOG, Where
from tools.operators_doc import FILE, document


def test_the_operator_table_is_up_to_date():
    assert FILE.read_text(encoding="utf-8") == document(), "run make docs"


def test_the_operator_table_has_every_operator_on_every_chip():
    lines = document().splitlines()
    for declared in CATALOG.values():
        if declared.where is Where.DEVICE:
            first = [line.startswith(f"| `{declared.name}` |") for line in lines].index(True)
            chips = [line.split("|")[2].strip() for line in lines[first : first + len(Chip)]]
            assert chips == [chip.value for chip in Chip]
