"""The table of simulated kernels: which vendor operator, from which package, on which chips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ascend_v4.device.soc import Chip

F = TypeVar("F", bound=Callable[..., Any])
ALL_CHIPS = (Chip.A2, Chip.A3, Chip.A950)
A2_A3 = (Chip.A2, Chip.A3)
ONLY_950 = (Chip.A950,)

PACKAGE_OF_NAMESPACE = {"npu": "torch_npu", "_C_ascend": "vllm_ascend", "custom": "custom_ops"}
"""Python module that registers the operators of a namespace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A CPU kernel under a vendor's schema."""

    name: str
    """`namespace::name` or `namespace::name.overload`, as in operators/npu/schemas."""
    run: Callable[..., Any]
    """Called as run(sim, **arguments): every argument of the schema by name, defaults filled in from it."""
    meta: Callable[..., Any]
    """Called alike with meta tensors; returns what the kernel returns, on meta."""
    chips: tuple[Chip, ...]
    """Chips whose build has the operator (section 19.5 of the facts)."""
    symbol: str | None
    """aclnn function behind it, where another package than the binding's brings it."""
    symbol_package: str | None
    """That package, such as ops_transformer."""


KERNELS: dict[str, Kernel] = {}
"""Filled while the modules of this package are imported, read-only afterwards."""


def kernel(
    name: str,
    *,
    meta: Callable[..., Any],
    chips: tuple[Chip, ...] = ALL_CHIPS,
    symbol: str | None = None,
    symbol_package: str | None = None,
) -> Callable[[F], F]:
    """Declares the decorated function as the kernel of a vendor operator.

    meta gives the result's shapes and dtypes; it and the kernel take (sim, **arguments of the schema).
    """

    def declare(run: F) -> F:
        assert name not in KERNELS, f"{name} has two kernels"
        KERNELS[name] = Kernel(
            name=name, run=run, meta=meta, chips=chips, symbol=symbol, symbol_package=symbol_package
        )
        return run

    return declare
