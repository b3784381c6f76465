"""Names that a shared library exports, read from its file. Standard library only; nothing is loaded."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

DYNSYM = 11
"""Section type of the dynamic symbol table."""
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


def exported_names(path: Path) -> frozenset[bytes]:
    """Defined dynamic symbols of a 64-bit little-endian ELF file. Raises OSError, ValueError for other files.

    Source: System V ABI, chapters 4 and 5.
    """
    with path.open("rb") as file:
        if file.read(6) != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is not a 64-bit little-endian ELF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _exported(data, path)


def _exported(data: mmap.mmap, path: Path) -> frozenset[bytes]:
    try:
        (table,) = struct.unpack_from("<Q", data, 40)
        entry_bytes, count = struct.unpack_from("<HH", data, 58)
        sections = [_SECTION.unpack_from(data, table + index * entry_bytes) for index in range(count)]
        names: set[bytes] = set()
        for _, kind, _, _, start, num_bytes, link, _, _, _ in sections:
            if kind == DYNSYM:
                strings = sections[link]
                names |= _names(data[start : start + num_bytes], data[strings[4] : strings[4] + strings[5]])
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from None
    return frozenset(names)


def _names(symbols: bytes, strings: bytes) -> set[bytes]:
    whole = len(symbols) - len(symbols) % _SYMBOL.size
    return {
        strings[name : strings.index(b"\0", name)]
        for name, _, _, section, _, _ in _SYMBOL.iter_unpack(symbols[:whole])
        if section and name
    }
