"""Which vendor operators the adapters call, and how they spell the calls."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ascend_v4.operators.npu.schemas import NAMESPACES, schema_strings
from ascend_v4.operators.select import OperatorTable
from tools.npu_contract.versions import Spelling

WRONG_META = {"npu::npu_fused_matmul": "16cast32"}
"""Operators whose Meta kernel says bfloat16, in this mode, where the chip gives float32."""


@dataclass(frozen=True, order=True, slots=True)
class Caller:
    """An adapter, by operator and provider."""

    operator: str
    provider: str


NOBODY = Caller("", "")
"""Who calls what no adapter does."""


class Recorder:
    """Notes vendor calls by caller; `watched` gives a table whose callables say who is at work."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[Caller, str, Spelling]] = Counter()
        """How often an adapter called `namespace::name`, by how it spelled the call."""
        self.reached: set[Caller] = set()
        """Adapters whose call ran to its end."""
        self._stack = [NOBODY]

    def called(self, name: str, spelling: Spelling) -> None:
        """Notes a call by the adapter at work."""
        self.calls[(self._stack[-1], name, spelling)] += 1

    def watched(self, table: OperatorTable) -> OperatorTable:
        """The same choices, whose calls, plans, layouts and storages are recorded under their name."""
        choices = {}
        for name, choice in table.choices.items():
            caller = Caller(name, choice.provider)
            choices[name] = replace(
                choice,
                call=self._named(choice.call, caller, is_call=True),
                plan=self._named(choice.plan, caller),
                prepare=self._named(choice.prepare, caller),
                storage=self._named(choice.storage, caller),
            )
        return OperatorTable(choices, table.target)

    def _named(
        self,
        function: Callable[..., Any] | None,
        caller: Caller,
        *,
        is_call: bool = False,
    ) -> Any:  # noqa: ANN401
        if function is None:
            return None

        @functools.wraps(function)
        def run(*args: object, **kwargs: object) -> object:
            self._stack.append(caller)
            try:
                result = function(*args, **kwargs)
            finally:
                self._stack.pop()
            if is_call:
                self.reached.add(caller)
            return result

        return run


class Spies:
    """In place of every vendor operator under torch.ops: tells a recorder of each call, spelled in a way that
    the dispatcher no longer knows, and passes it on.
    """

    def __init__(self) -> None:
        self.recorder: Recorder | None = None

    def put(self, rename: str | None = None) -> None:
        """Takes the operators' places, for the rest of the process.

        rename is `npu::npu_rms_norm:gamma=weight`: calls of one operator then pass one argument under another
        name, as an adapter would that was written against another release.
        """
        operator, _, names = (rename or "").rpartition(":")
        old, _, new = names.partition("=")
        for namespace in NAMESPACES:
            space = getattr(torch.ops, namespace)
            for name in {name.partition(".")[0] for name in schema_strings(namespace)}:
                qualified = f"{namespace}::{name}"
                renamed = {old: new} if qualified == operator else {}
                setattr(space, name, _Spy(self, qualified, getattr(space, name), renamed))


class _Spy:
    def __init__(self, spies: Spies, name: str, packet: Any, renamed: Mapping[str, str]) -> None:  # noqa: ANN401
        self._spies, self._name, self._packet, self._renamed = spies, name, packet, renamed

    def __call__(self, *args: object, **kwargs: object) -> object:
        kwargs = {self._renamed.get(name, name): value for name, value in kwargs.items()}
        if self._spies.recorder is not None:
            self._spies.recorder.called(self._name, Spelling(len(args), tuple(sorted(kwargs))))
        result = self._packet(*args, **kwargs)
        mode = WRONG_META.get(self._name)
        return result.to(torch.float32) if mode is not None and mode in kwargs.values() else result

    def __getattr__(self, overload: str) -> object:
        return getattr(self._packet, overload)


def has_meta(qualified_name: str) -> bool:
    """Whether an operator, `namespace::name` or `namespace::name.overload`, has a Meta kernel now."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(qualified_name, "Meta"))
