"""Sources compiled at build time, and typed calls to them: a plain C interface over pointers, no torch in
it.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from ascend_v4.env import CPU_KERNELS
from ascend_v4.operators.contract import Needs

MISSING = "the native extension was not built: install with a C++ compiler at hand to get it"
REBUILD = "install this package again"
NEEDS = Needs(module="ascend_v4.operators.native._cpu")
MAX_STREAMS = 64

POINTER, COUNT, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "ascend_v4_clamped_swiglu": (POINTER, POINTER, COUNT, COUNT, REAL, POINTER),
    "ascend_v4_route": (POINTER, POINTER, COUNT, COUNT, COUNT, REAL, POINTER, POINTER, POINTER),
    "ascend_v4_rms_norm": (POINTER, POINTER, POINTER, COUNT, COUNT, REAL),
    "ascend_v4_mixing_logits": (POINTER, POINTER, COUNT, COUNT, COUNT, REAL, POINTER),
    "ascend_v4_mixing_weights": (
        *(POINTER, POINTER, POINTER),
        *(COUNT, COUNT, COUNT, REAL),
        *(POINTER, POINTER, POINTER),
    ),
    "ascend_v4_collapse_streams": (POINTER, POINTER, COUNT, COUNT, COUNT, POINTER),
    "ascend_v4_spread_output": (POINTER, POINTER, POINTER, POINTER, COUNT, COUNT, COUNT, POINTER),
    "ascend_v4_fp4_to_int8": (
        POINTER,
        POINTER,
        *(COUNT, COUNT, COUNT),
        *(POINTER, POINTER, POINTER, POINTER),
    ),
    "ascend_v4_fp4_to_int4": (
        *(POINTER, POINTER),
        *(COUNT, COUNT, COUNT),
        *(POINTER, POINTER, POINTER, POINTER, POINTER, POINTER),
    ),
    "ascend_v4_fp8_to_int8": (
        POINTER,
        POINTER,
        *(COUNT, COUNT, COUNT),
        *(POINTER, POINTER, POINTER, POINTER),
    ),
    "ascend_v4_bf16_to_int8": (POINTER, COUNT, COUNT, POINTER, POINTER, POINTER, POINTER),
    "ascend_v4_fp4_to_bf16": (POINTER, POINTER, COUNT, COUNT, POINTER, POINTER),
    "ascend_v4_fp8_to_bf16": (POINTER, POINTER, COUNT, COUNT, COUNT, POINTER, POINTER),
    "ascend_v4_int8_to_fp4": (
        *(POINTER, POINTER, POINTER, POINTER),
        *(COUNT, COUNT),
        *(POINTER, POINTER, POINTER),
    ),
    "ascend_v4_real_to_fp4": (POINTER, COUNT, POINTER, COUNT, COUNT, POINTER, POINTER),
    "ascend_v4_real_to_fp8": (POINTER, COUNT, POINTER, COUNT, COUNT, COUNT, POINTER, POINTER),
    "ascend_v4_derive_fp4_scale": (POINTER, COUNT, COUNT, COUNT, POINTER, POINTER),
    "ascend_v4_negative_zeros": (POINTER, COUNT, COUNT, POINTER, POINTER),
}
"""C parameters of every kernel; all return nothing. A test compares them with the sources."""


def library_path() -> Path | None:
    """The compiled extension beside this file, or None where the install had no compiler."""
    found = (Path(__file__).parent / f"_cpu{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in found if path.is_file()), None)


@functools.cache
def cpu_kernels() -> ctypes.CDLL:
    """The compiled CPU kernels. Raises OSError where they were not built, were built from other sources or
    cannot be loaded: ask `cpu_unusable` first.
    """
    path = library_path()
    if path is None:
        raise OSError(MISSING)
    library = ctypes.CDLL(str(path))
    absent = [name for name in SIGNATURES if not hasattr(library, name)]
    if absent:
        raise OSError(f"{path.name} was built from other sources and lacks {absent[0]}: {REBUILD}")
    for name, parameters in SIGNATURES.items():
        kernel = getattr(library, name)
        kernel.argtypes, kernel.restype = parameters, None
    return library


def cpu_unusable() -> str | None:
    """Why the CPU kernels cannot be used, or None."""
    if not CPU_KERNELS.read():
        return f"{CPU_KERNELS.name} is 0"
    if library_path() is None:
        return MISSING
    try:
        cpu_kernels()
    except OSError as error:
        return str(error)
    return None
