"""Writes into paged caches: bfloat16 rows and int8 keys on A2 and A3, packed FP8 rows and keys on 950.

Legend: T rows to write, D channels, C pages, S rows per page, W elements of a stored row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ascend_v4.operators.contract import Limit, Needs, implements
from ascend_v4.operators.contracts.cache import write_index_keys, write_kv
from ascend_v4.operators.contracts.quantize import KV_GROUP, IndexFormat, KvFormat
from ascend_v4.operators.npu.constants import (
    A2_A3,
    CANN_RECIPES,
    ONLY_950,
    RECIPES_MODULE,
    TORCH_NPU,
    TORCH_NPU_MODULE,
    VLLM_ASCEND,
    VLLM_MODULE,
)
from ascend_v4.operators.npu.index_keys import (
    FP8_SCALE_BYTES,
    FP8_TOLERANCE,
    INT8_TOLERANCE,
    int8_pages,
    key_storage,
    quantize_fp8,
    quantize_int8,
    rotate_index,
)
from ascend_v4.operators.npu.pages import scatter_by_vllm, scatter_in_range
from ascend_v4.operators.npu.rows import ROW_LIMITS, kv_storage, pack_rows

E8M0_SCALES = 2
"""quant_mode of kv_compress_epilog."""
ROPE_FIRST_ROWS = 1
"""layout of kv_compress_epilog: every row with its scales."""
CODES_THEN_SCALES = 2
"""layout of indexer_compress_epilog_v2: a page's codes, then its scales."""
FLOAT32_BYTES = 4

EPILOG_LIMITS = (
    *ROW_LIMITS,
    Limit(size="row_width", choices=(512,), source="kv_compress_epilog: x [T, 512], cache rows of 640 bytes"),
)
ASC_DOC = "scatter_nd_update_asc: rows of 1, 128 or 512 elements"
ASC_ROW = Limit(size="row_width", choices=(128, 512), source=ASC_DOC)
KEY_CHANNELS = Limit(size="index_head_dim", choices=(128,), source="indexer kernels: keys of 128 channels")
SCATTERED_PAGES = Limit(
    size="csa_block",
    multiple=32,
    source="rows of 128 bytes: a page of codes and float32 scales is a whole number of them",
)

VLLM_SCATTER = Needs(
    module=VLLM_MODULE, torch_operators=("_C_ascend::npu_scatter_nd_update_v2",), chips=A2_A3
)
RECIPES_SCATTER = Needs(
    module=RECIPES_MODULE, torch_operators=("custom::scatter_nd_update_asc",), chips=A2_A3
)
QUANTIZE = ("npu::npu_dynamic_quant",)
SCATTER = ("npu::npu_scatter_nd_update_",)


@implements(
    write_kv,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=VLLM_SCATTER,
    storage=kv_storage,
    capturable=True,
)
def scatter_kv_by_vllm(
    cache_CSD: Tensor, kv_TD: Tensor, slots_T: Tensor, *, nope_dim: int, format: KvFormat
) -> None:
    """Rows addressed through the whole cache; negative ones are skipped."""
    _require(format, KvFormat.PLAIN)
    if kv_TD.shape[0] == 0:
        return
    scatter_by_vllm(cache_CSD.view(-1, cache_CSD.shape[-1]), kv_TD.to(cache_CSD.dtype).contiguous(), slots_T)


@implements(
    write_kv,
    backend="npu",
    provider=CANN_RECIPES,
    needs=RECIPES_SCATTER,
    limits=(ASC_ROW,),
    storage=kv_storage,
    capturable=True,
)
def scatter_kv_by_recipes(
    cache_CSD: Tensor, kv_TD: Tensor, slots_T: Tensor, *, nope_dim: int, format: KvFormat
) -> None:
    """The same with another kernel."""
    _require(format, KvFormat.PLAIN)
    if kv_TD.shape[0] == 0:
        return
    rows_ND = cache_CSD.view(-1, cache_CSD.shape[-1])
    update_TD = kv_TD.to(cache_CSD.dtype).contiguous()
    torch.ops.custom.scatter_nd_update_asc(rows_ND, slots_T.unsqueeze(1), update_TD)


@implements(
    write_kv,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(module=TORCH_NPU_MODULE, torch_operators=SCATTER, chips=A2_A3),
    storage=kv_storage,
    capturable=True,
)
def scatter_kv_in_range(
    cache_CSD: Tensor, kv_TD: Tensor, slots_T: Tensor, *, nope_dim: int, format: KvFormat
) -> None:
    """The same; skipped rows rewrite a row of the reserved page."""
    _require(format, KvFormat.PLAIN)
    if kv_TD.shape[0] == 0:
        return
    scatter_in_range(cache_CSD.view(-1, cache_CSD.shape[-1]), kv_TD.to(cache_CSD.dtype).contiguous(), slots_T)


@implements(
    write_kv,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(module=VLLM_MODULE, torch_operators=("_C_ascend::kv_compress_epilog",), chips=ONLY_950),
    limits=EPILOG_LIMITS,
    storage=kv_storage,
    capturable=True,
)
def pack_kv_by_vllm(
    cache_CSD: Tensor, kv_TD: Tensor, slots_T: Tensor, *, nope_dim: int, format: KvFormat
) -> None:
    """Quantised, packed and scattered by one kernel, which reads its input as rows without gaps."""
    _require(format, KvFormat.FP8_GROUP)
    if kv_TD.shape[0] == 0:
        return
    torch.ops._C_ascend.kv_compress_epilog(
        kv_compress_cache=cache_CSD.view(-1, 1, cache_CSD.shape[-1]),
        x=kv_TD.contiguous(),
        slot_mapping=slots_T.contiguous(),
        quant_group_size=KV_GROUP,
        quant_mode=E8M0_SCALES,
        round_scale_flag=True,
        layout=ROPE_FIRST_ROWS,
    )


@implements(
    write_kv,
    backend="npu",
    provider=CANN_RECIPES,
    needs=Needs(module=RECIPES_MODULE, torch_operators=("custom::kv_compress_epilog",), chips=ONLY_950),
    limits=EPILOG_LIMITS,
    storage=kv_storage,
    capturable=True,
)
def pack_kv_by_recipes(
    cache_CSD: Tensor, kv_TD: Tensor, slots_T: Tensor, *, nope_dim: int, format: KvFormat
) -> None:
    """The same kernel; this binding knows the one layout only."""
    _require(format, KvFormat.FP8_GROUP)
    if kv_TD.shape[0] == 0:
        return
    torch.ops.custom.kv_compress_epilog(
        cache_CSD.view(-1, 1, cache_CSD.shape[-1]),
        kv_TD.contiguous(),
        slots_T.contiguous(),
        quant_group_size=KV_GROUP,
        quant_mode=E8M0_SCALES,
        round_scale_flag=True,
        scale=1.0,
    )


@implements(
    write_kv,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(module=TORCH_NPU_MODULE, torch_operators=SCATTER, chips=ONLY_950),
    limits=ROW_LIMITS,
    storage=kv_storage,
    capturable=True,
)
def pack_kv_composed(
    cache_CSD: Tensor, kv_TD: Tensor, slots_T: Tensor, *, nope_dim: int, format: KvFormat
) -> None:
    """Packed in plain torch, then scattered as bytes, which the scatter knows as int8."""
    _require(format, KvFormat.FP8_GROUP)
    if kv_TD.shape[0] == 0:
        return
    rows_NW = cache_CSD.view(torch.int8).view(-1, cache_CSD.shape[-1])
    scatter_in_range(rows_NW, pack_rows(kv_TD, nope_dim=nope_dim).view(torch.int8), slots_T)


@implements(
    write_index_keys,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(module=VLLM_MODULE, torch_operators=(*QUANTIZE, *VLLM_SCATTER.torch_operators), chips=A2_A3),
    tolerance=INT8_TOLERANCE,
    because=INT8_TOLERANCE.why,
    storage=key_storage,
    capturable=True,
)
def scatter_keys_by_vllm(cache_CSD: Tensor, keys_TD: Tensor, slots_T: Tensor, *, format: IndexFormat) -> None:
    """Codes and scales scattered one after the other."""
    _require(format, IndexFormat.INT8)
    if keys_TD.shape[0] == 0:
        return
    codes_TD, scale_T = quantize_int8(rotate_index(keys_TD))
    code_pages, scale_pages = int8_pages(cache_CSD)
    scatter_by_vllm(code_pages.flatten(0, 1), codes_TD, slots_T)
    scatter_by_vllm(scale_pages.view(-1, 1), scale_T.unsqueeze(-1), slots_T)


@implements(
    write_index_keys,
    backend="npu",
    provider=CANN_RECIPES,
    needs=Needs(
        module=RECIPES_MODULE, torch_operators=(*QUANTIZE, *RECIPES_SCATTER.torch_operators), chips=A2_A3
    ),
    limits=(Limit(size="index_head_dim", choices=(128, 512), source=ASC_DOC),),
    tolerance=INT8_TOLERANCE,
    because=INT8_TOLERANCE.why,
    storage=key_storage,
    capturable=True,
)
def scatter_keys_by_recipes(
    cache_CSD: Tensor, keys_TD: Tensor, slots_T: Tensor, *, format: IndexFormat
) -> None:
    """The same with another kernel."""
    _require(format, IndexFormat.INT8)
    if keys_TD.shape[0] == 0:
        return
    codes_TD, scale_T = quantize_int8(rotate_index(keys_TD))
    code_pages, scale_pages = int8_pages(cache_CSD)
    indices_T1 = slots_T.unsqueeze(1)
    torch.ops.custom.scatter_nd_update_asc(code_pages.flatten(0, 1), indices_T1, codes_TD)
    torch.ops.custom.scatter_nd_update_asc(scale_pages.view(-1, 1), indices_T1, scale_T.unsqueeze(-1))


@implements(
    write_index_keys,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(module=TORCH_NPU_MODULE, torch_operators=(*QUANTIZE, *SCATTER), chips=A2_A3),
    tolerance=INT8_TOLERANCE,
    because=INT8_TOLERANCE.why,
    storage=key_storage,
    capturable=True,
)
def scatter_keys_in_range(
    cache_CSD: Tensor, keys_TD: Tensor, slots_T: Tensor, *, format: IndexFormat
) -> None:
    """The same; skipped rows rewrite a row of the reserved page."""
    _require(format, IndexFormat.INT8)
    if keys_TD.shape[0] == 0:
        return
    codes_TD, scale_T = quantize_int8(rotate_index(keys_TD))
    code_pages, scale_pages = int8_pages(cache_CSD)
    scatter_in_range(code_pages.flatten(0, 1), codes_TD, slots_T)
    scatter_in_range(scale_pages.view(-1, 1), scale_T.unsqueeze(-1), slots_T)


@implements(
    write_index_keys,
    backend="npu",
    provider=VLLM_ASCEND,
    needs=Needs(
        module=VLLM_MODULE, torch_operators=("_C_ascend::indexer_compress_epilog_v2",), chips=ONLY_950
    ),
    limits=(KEY_CHANNELS,),
    tolerance=FP8_TOLERANCE,
    because=FP8_TOLERANCE.why,
    storage=key_storage,
    capturable=True,
)
def pack_keys_by_vllm(cache_CSD: Tensor, keys_TD: Tensor, slots_T: Tensor, *, format: IndexFormat) -> None:
    """Quantised and scattered by one kernel, which reads slots as int32 whatever they are."""
    _require(format, IndexFormat.FP8)
    if keys_TD.shape[0] == 0:
        return
    torch.ops._C_ascend.indexer_compress_epilog_v2(
        cache_CSD.unsqueeze(2),
        rotate_index(keys_TD).contiguous(),
        slots_T.to(torch.int32).contiguous(),
        layout=CODES_THEN_SCALES,
    )


@implements(
    write_index_keys,
    backend="npu",
    provider=TORCH_NPU,
    needs=Needs(module=TORCH_NPU_MODULE, torch_operators=(*QUANTIZE, *SCATTER), chips=ONLY_950),
    limits=(KEY_CHANNELS, SCATTERED_PAGES),
    tolerance=FP8_TOLERANCE,
    because=FP8_TOLERANCE.why,
    storage=key_storage,
    capturable=True,
)
def pack_keys_composed(cache_CSD: Tensor, keys_TD: Tensor, slots_T: Tensor, *, format: IndexFormat) -> None:
    """Codes and scales scattered through two views of the whole cache: rows of 128 bytes, and float32 words.

    A view of the codes alone has gaps between pages, which the scatter would copy away and back.
    """
    _require(format, IndexFormat.FP8)
    if keys_TD.shape[0] == 0:
        return
    _, rows_per_page, width = cache_CSD.shape
    channels = width - FP8_SCALE_BYTES
    codes_TD, scale_T = quantize_fp8(rotate_index(keys_TD))
    page_T = torch.div(slots_T, rows_per_page, rounding_mode="floor")
    row_T = slots_T - page_T * rows_per_page
    page_bytes = rows_per_page * width
    skipped_T = slots_T < 0
    code_T = (page_T * (page_bytes // channels) + row_T).masked_fill(skipped_T, -1)
    word_T = page_T * (page_bytes // FLOAT32_BYTES) + rows_per_page * (channels // FLOAT32_BYTES) + row_T
    scatter_in_range(cache_CSD.view(torch.int8).view(-1, channels), codes_TD.view(torch.int8), code_T)
    words_N1 = cache_CSD.view(-1).view(torch.float32).unsqueeze(-1)
    scatter_in_range(words_N1, scale_T.unsqueeze(-1), word_T.masked_fill(skipped_T, -1))


def _require(format: KvFormat | IndexFormat, only: KvFormat | IndexFormat) -> None:
    assert format is only, f"this chip stores rows as {only}, not as {format}"
