"""What a shared library asks of others, read from its file: needed libraries and undefined symbols.

Standard library only; nothing is loaded. What a library exports is `ascend_v4.device.elf`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DYNAMIC, DYNSYM = 6, 11
"""Section types."""
DT_NEEDED = 1
STB_GLOBAL = 1
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_DYNAMIC_ENTRY = struct.Struct("<qQ")


@dataclass(frozen=True, slots=True)
class Wants:
    """What a library needs before it can be loaded."""

    libraries: tuple[str, ...]
    """File names, in the order the loader looks for them."""
    symbols: frozenset[str]
    """Undefined symbols that must be found; weak ones may be missing."""


def wants_of(path: Path) -> Wants:
    """Reads a 64-bit little-endian ELF file. Raises OSError, ValueError for other files.

    Source: System V ABI, chapters 4 and 5.
    """
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
    try:
        sections = list(_sections(data))
        libraries: list[str] = []
        symbols: set[str] = set()
        for section in sections:
            strings = sections[section.link] if section.kind in (DYNAMIC, DYNSYM) else section
            if section.kind == DYNAMIC:
                entries = _DYNAMIC_ENTRY.iter_unpack(section.of(data, _DYNAMIC_ENTRY.size))
                libraries += [_text(data, strings, at) for tag, at in entries if tag == DT_NEEDED]
            elif section.kind == DYNSYM:
                for name, info, _, where, _, _ in _SYMBOL.iter_unpack(section.of(data, _SYMBOL.size)):
                    if where == 0 and name and info >> 4 == STB_GLOBAL:
                        symbols.add(_text(data, strings, name))
    except (struct.error, IndexError, OverflowError, ValueError) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None
    return Wants(tuple(libraries), frozenset(symbols))


@dataclass(frozen=True, slots=True)
class _Section:
    kind: int
    start: int
    num_bytes: int
    link: int

    def of(self, data: bytes, entry_bytes: int) -> bytes:
        """Its whole entries."""
        return data[self.start : self.start + self.num_bytes - self.num_bytes % entry_bytes]


def _sections(data: bytes) -> Iterator[_Section]:
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_bytes, count = struct.unpack_from("<HH", data, 58)
    for index in range(count):
        _, kind, _, _, start, num_bytes, link, _, _, _ = _SECTION.unpack_from(
            data, table + index * entry_bytes
        )
        yield _Section(kind, start, num_bytes, link)


def _text(data: bytes, strings: _Section, at: int) -> str:
    start = strings.start + at
    return data[start : data.index(b"\0", start)].decode()
