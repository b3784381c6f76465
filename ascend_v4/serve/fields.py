"""Typed fields of a JSON object that nobody has checked yet.

Every field read is remembered, so that what is left over can be named to the client.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ascend_v4.chat.protocol import shown
from ascend_v4.errors import RequestError

MAX_INTEGER = (1 << 63) - 1


class Fields:
    """Reads fields by name. An absent field and null are the same. Raises RequestError naming the field."""

    def __init__(self, values: Mapping[str, Any], *, path: str = "") -> None:
        self._values = values
        self._path = path
        self._read: set[str] = set()

    def raw(self, name: str) -> Any:  # noqa: ANN401 - JSON of unknown type is what it gives
        """The value as it came."""
        self._read.add(name)
        return self._values.get(name)

    def unread(self) -> dict[str, Any]:
        """Fields nobody asked for, without those that are null."""
        return {
            name: value
            for name, value in self._values.items()
            if name not in self._read and value is not None
        }

    def wrong(self, name: str, wanted: str) -> RequestError:
        """The error for a field whose value is not as wanted."""
        full_name = f"{self._path}{name}"
        return RequestError(
            f"{full_name} is {shown(self._values.get(name))}; it must be {wanted}.", field=full_name
        )

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str) -> bool | None:
        """true or false."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str, *, low: int, high: int = MAX_INTEGER) -> int | None:
        """An integer in [low, high]; a float without a fraction counts as one."""
        value = self.raw(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, f"an integer in [{low}, {high}]")
        return value

    def number(self, name: str, *, low: float, high: float) -> float | None:
        """A number in [low, high]."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(name, f"a number in [{low:g}, {high:g}]")
        if not math.isfinite(value):
            raise self.wrong(name, "a finite number")
        return float(value)

    def items(self, name: str) -> list[Any] | None:
        """A list."""
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value

    def mapping(self, name: str) -> Fields:
        """The fields of an object; none where it is absent."""
        value = self.raw(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value or {}, path=f"{self._path}{name}.")
