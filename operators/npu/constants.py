"""Numbers and names that the vendors' interfaces are spelled with. Nothing here imports torch_npu."""

from __future__ import annotations

from ascend_v4.device.soc import Chip

A2_A3 = (Chip.A2, Chip.A3)
ONLY_950 = (Chip.A950,)

VLLM_ASCEND = "vllm-ascend"
"""Provider: `torch.ops._C_ascend`."""
CANN_RECIPES = "cann-recipes"
"""Provider: `torch.ops.custom`."""
TORCH_NPU = "torch_npu"
"""Provider: `torch.ops.npu`, alone or several in a row."""
ATEN = "aten"
"""Provider: plain torch on the device."""

VLLM_MODULE = "vllm_ascend"
RECIPES_MODULE = "custom_ops"
TORCH_NPU_MODULE = "torch_npu"

ACL_FORMAT_NZ = 29
"""FRACTAL_NZ, the tiled layout that cube units read weights in."""

FLOAT8_E8M0FNU = 293
"""torch_npu.float8_e8m0fnu. Torch's own number for this dtype, 44, is refused."""
FLOAT4_E2M1FN_X2 = 296
"""torch_npu.float4_e2m1fn_x2: two E2M1 numbers per byte."""

MATMUL_AXIS_LIMIT = 65535
"""Longest last axis of either operand of npu_quant_matmul."""

NZ_ROWS = 16
"""Inputs (K) of a weight [K, N] in FRACTAL_NZ are a multiple of this."""
NZ_INT8_COLUMNS = 32
"""Outputs (N) of an int8 weight in FRACTAL_NZ are a multiple of this; of an int4 weight, of twice as many."""

MX_PAIR = 64
"""Inputs of two scales: MX scales lie in pairs."""

FLOAT8_E4M3FN = 24
"""Torch's own number for this dtype, which `dst_type` arguments take."""
