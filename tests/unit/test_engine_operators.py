"""What is said about the chosen operators before a model is loaded, and what is refused."""

from __future__ import annotations

import logging

import pytest

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import Target
from ascend_v4.engine.runner import announce_operators
from ascend_v4.errors import ConfigError
from ascend_v4.operators.select import Choice, OperatorTable


def table(device: str, *, too_slow: str | None = None, waived: tuple[str, ...] = ()) -> OperatorTable:
    choice = Choice(
        operator="sparse_attention",
        backend="npu",
        provider="aten",
        call=len,
        plan=None,
        prepare=None,
        storage=None,
        refused=(),
        waived=waived,
        too_slow=too_slow,
    )
    return OperatorTable({choice.operator: choice}, Target(device=device, chip=Chip.A3))


def test_slow_operators_are_refused_on_an_npu_unless_allowed():
    slow = table("npu", too_slow="it copies rows")
    with pytest.raises(ConfigError, match=r"sparse_attention: it copies rows.*--allow-slow"):
        announce_operators(slow, allow_slow=False)
    announce_operators(slow, allow_slow=True)
    announce_operators(table("sim", too_slow="it copies rows"), allow_slow=False)
    announce_operators(table("npu"), allow_slow=False)


def test_waived_limits_are_said_once_by_name(caplog):
    with caplog.at_level(logging.DEBUG):
        announce_operators(table("sim", waived=("heads", "hidden")), allow_slow=True)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        "limits waived on sim (a3): heads, hidden; what runs like this counts as simulated (waived)"
    ]
    assert "sparse_attention: npu/aten" in caplog.text
