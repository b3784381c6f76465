"""Schemas of the vendors' operators, as data: what the adapters were written against.

`npu` is torch_npu, `_C_ascend` is vLLM-Ascend, `custom` is the CANN recipes' custom_ops.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

NAMESPACES = ("npu", "_C_ascend", "custom")


@cache
def schema_strings(namespace: str) -> dict[str, str]:
    """`name` or `name.overload` -> the whole schema string, of one of NAMESPACES."""
    text = resources.files(__package__).joinpath(f"{namespace}.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.split("(", 1)[0].removeprefix(f"{namespace}::"): line for line in lines}
