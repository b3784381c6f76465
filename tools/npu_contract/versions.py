"""Which releases of torch_npu each adapter fits: the schemas of every release, held against the calls.

    python -m tools.npu_contract.versions

Schemas are read as text from a wheel's library; nothing of it is loaded. The calls are those that the
contract process saw. Both are kept in versions.json, so that the documents need no download.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascend_v4.operators.npu.schemas import schema_strings
from tools.npu_contract import environment
from tools.npu_contract.report import contract_report

FILE = Path(__file__).with_name("versions.json")
LIBRARY = "torch_npu/lib/libtorch_npu.so"
_SCHEMA = re.compile(rb"\0(?:npu::)?([a-z_]\w*(?:\.\w+)?)(\([^\0]*\) -> [^\0]*)(?=\0)")


@dataclass(frozen=True, order=True, slots=True)
class Spelling:
    """How a call names its arguments."""

    num_positional: int
    keywords: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Spelling:
        """From `str`."""
        count, *keywords = text.split()
        return cls(int(count), tuple(keywords))

    def __str__(self) -> str:
        return " ".join((str(self.num_positional), *self.keywords))


@dataclass(frozen=True, order=True, slots=True)
class AdapterCalls:
    """What one adapter calls of torch_npu on one chip."""

    operator: str
    provider: str
    chip: str
    calls: tuple[tuple[str, tuple[Spelling, ...]], ...]
    """Operator of the npu namespace, and every way its calls are spelled."""


@dataclass(frozen=True, slots=True)
class Table:
    """What versions.json holds."""

    schemas: Mapping[str, Mapping[str, str | None]]
    """Release -> operator -> its schema where it differs from ours, None where there is no such operator."""
    adapters: tuple[AdapterCalls, ...]

    def misfits(self, adapter: AdapterCalls, version: str) -> list[str]:
        """Why an adapter does not fit a release, one sentence per reason; none where it does."""
        ours, others = schema_strings("npu"), self.schemas.get(version, {})
        found = []
        for name, spellings in adapter.calls:
            theirs = others.get(name, ours[name])
            if theirs is None:
                found.append(f"{name} is not there")
                continue
            for spelling in spellings:
                found += [f"{name}: {problem}" for problem in problems_of(spelling, ours[name], theirs)]
        return list(dict.fromkeys(found))

    def fitting(self, operator: str, provider: str, chip: str) -> tuple[str, ...]:
        """Releases that an adapter fits, the one it was written against last."""
        key = (operator, provider, chip)
        found = [each for each in self.adapters if (each.operator, each.provider, each.chip) == key]
        return tuple(
            version
            for version in (*self.schemas, environment.VERSION)
            if not any(self.misfits(each, version) for each in found)
        )


def problems_of(spelling: Spelling, ours: str, theirs: str) -> Iterator[str]:
    """Why a call that is right by our schema is refused, or means something else, by theirs."""
    mine, other = torch._C.parse_schema(ours), torch._C.parse_schema(theirs)
    given = [argument.name for argument in mine.arguments[: spelling.num_positional]]
    positional = [argument.name for argument in other.arguments if not argument.kwarg_only]
    if positional[: len(given)] != given:
        yield f"its first arguments are {', '.join(positional[: len(given)])}"
    given += spelling.keywords
    known = {argument.name: argument for argument in other.arguments}
    for argument in mine.arguments:
        there = known.get(argument.name)
        if there is None:
            if argument.name in given:
                yield f"it has no {argument.name}"
        elif argument.name in given:
            if str(there.type) != str(argument.type):
                yield f"{argument.name} is {there.type} there"
        elif there.default_value != argument.default_value:
            yield f"{argument.name} is {there.default_value} there unless given"
    for argument in other.arguments:
        if not argument.has_default_value() and argument.name not in given:
            yield f"it wants {argument.name}"
    if [str(each.type) for each in mine.returns] != [str(each.type) for each in other.returns]:
        yield f"it returns {', '.join(str(each.type) for each in other.returns)}"


def wheel_schemas(wheel: Path) -> dict[str, str]:
    """Every schema string in a wheel's library: `name` or `name.overload` -> text with the npu namespace.

    Raises ValueError for a library that says two things of one operator.
    """
    with zipfile.ZipFile(wheel) as archive:
        library = archive.read(LIBRARY)
    found: dict[str, str] = {}
    for match in _SCHEMA.finditer(library):
        name, rest = match[1].decode(), match[2].decode()
        text = f"npu::{name}{rest}"
        if found.setdefault(name, text) != text:
            raise ValueError(f"{wheel.name} has two schemas of {name}")
    return found


def differences(theirs: Mapping[str, str]) -> dict[str, str | None]:
    """Of the operators we know, those that a release has otherwise or not at all."""
    found: dict[str, str | None] = {}
    for name, text in schema_strings("npu").items():
        other = theirs.get(name)
        parsed = None if other is None else str(torch._C.parse_schema(other))
        if parsed != str(torch._C.parse_schema(text)):
            found[name] = parsed
    return found


def adapters_of(report: Mapping[str, Any]) -> tuple[AdapterCalls, ...]:
    """What a report of the contract process saw of the npu namespace."""
    merged: dict[tuple[str, str, str], dict[str, set[Spelling]]] = {}
    for run in report["runs"]:
        for operator, provider in run["reached"]:
            merged.setdefault((operator, provider, run["chip"]), {})
        for each in run["calls"]:
            namespace, _, name = each["call"].partition("::")
            if namespace == "npu":
                calls = merged.setdefault((each["operator"], each["provider"], run["chip"]), {})
                calls.setdefault(name, set()).add(Spelling(each["positional"], tuple(each["keywords"])))
    return tuple(
        AdapterCalls(*key, tuple((name, tuple(sorted(calls[name]))) for name in sorted(calls)))
        for key, calls in sorted(merged.items())
    )


def load_table(path: Path = FILE) -> Table:
    """The table as it was last written."""
    parsed = json.loads(path.read_text(encoding="utf-8"))
    adapters = []
    for each in parsed["adapters"]:
        calls = tuple((name, tuple(map(Spelling.parse, found))) for name, found in each["calls"].items())
        adapters.append(AdapterCalls(each["operator"], each["provider"], each["chip"], calls))
    return Table(parsed["schemas"], tuple(adapters))


def text_of(table: Table) -> str:
    """The file."""
    adapters = [
        {
            "operator": each.operator,
            "provider": each.provider,
            "chip": each.chip,
            "calls": {name: [str(spelling) for spelling in found] for name, found in each.calls},
        }
        for each in table.adapters
    ]
    return json.dumps({"schemas": table.schemas, "adapters": adapters}, indent=1) + "\n"


def main() -> None:
    """Reads the wheels, runs the contract process, and writes the table."""
    schemas = {}
    for version in environment.OTHER_VERSIONS:
        schemas[version] = differences(wheel_schemas(environment.fetch_wheel(version)))
    table = Table(schemas, adapters_of(contract_report()))
    FILE.write_text(text_of(table), encoding="utf-8")
    print(f"wrote {FILE.name}")


if __name__ == "__main__":
    main()
