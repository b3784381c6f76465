"""Numbers that operator schemas use for dtypes: torch's own, and those that torch_npu adds."""

from __future__ import annotations

from types import MappingProxyType

import torch

from ascend_v4.operators.simulator.state import require

TORCH_NUMBERS = MappingProxyType(
    {
        0: torch.uint8,
        1: torch.int8,
        2: torch.int16,
        3: torch.int32,
        4: torch.int64,
        5: torch.float16,
        6: torch.float32,
        7: torch.float64,
        11: torch.bool,
        15: torch.bfloat16,
        16: torch.quint4x2,
        23: torch.float8_e5m2,
        24: torch.float8_e4m3fn,
    }
)
"""Numbers that a torch dtype turns into when it is passed for an int."""

INT4 = 285
HIFLOAT8 = 290
FLOAT8_E5M2 = 291
FLOAT8_E4M3FN = 292
FLOAT8_E8M0FNU = 293
FLOAT4_E2M1FN_X2 = 296
FLOAT4_E1M2FN_X2 = 297

INT4_DTYPE: torch.dtype = getattr(torch, "int4")  # noqa: B009 -- torch has it without declaring it

VENDOR_NUMBERS = MappingProxyType(
    {
        INT4: INT4_DTYPE,
        FLOAT8_E5M2: torch.float8_e5m2,
        FLOAT8_E4M3FN: torch.float8_e4m3fn,
        FLOAT8_E8M0FNU: torch.float8_e8m0fnu,
        FLOAT4_E2M1FN_X2: torch.float4_e2m1fn_x2,
    }
)
"""Numbers that torch_npu adds, for types it had before torch."""

NAMES = MappingProxyType(
    {
        "int4": INT4,
        "hifloat8": HIFLOAT8,
        "float8_e5m2": FLOAT8_E5M2,
        "float8_e4m3fn": FLOAT8_E4M3FN,
        "float8_e8m0fnu": FLOAT8_E8M0FNU,
        "float4_e2m1fn_x2": FLOAT4_E2M1FN_X2,
        "float4_e1m2fn_x2": FLOAT4_E1M2FN_X2,
    }
)
"""Attributes of the module torch_npu."""

TORCH_E8M0 = 44
TORCH_E2M1 = 45


def dtype_of(number: int | torch.dtype, operator: str) -> torch.dtype:
    """The dtype that an operator's argument names, in either numbering.

    Raises SimulatorError for torch's own E8M0 and FP4 types, which the vendor's operators do not know, and
    for numbers that are not simulated.
    """
    if isinstance(number, torch.dtype):
        require(
            number not in (torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
            operator,
            f"{number} is refused; pass torch_npu's number for it ({FLOAT8_E8M0FNU} or {FLOAT4_E2M1FN_X2})",
        )
        return number
    require(
        number not in (TORCH_E8M0, TORCH_E2M1),
        operator,
        f"dtype number {number} is torch's own and refused; pass torch_npu.float8_e8m0fnu "
        f"({FLOAT8_E8M0FNU}) or torch_npu.float4_e2m1fn_x2 ({FLOAT4_E2M1FN_X2})",
    )
    found = TORCH_NUMBERS.get(number) or VENDOR_NUMBERS.get(number)
    require(found is not None, operator, f"dtype number {number} is not simulated")
    assert found is not None
    return found
