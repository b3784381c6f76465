"""Which caches a layer owns and how many pages a service needs: counts against the report's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_v4.cache.layout import (
    BLOCK_TOKENS,
    CSA_STATE,
    ENTRIES,
    HCA_ENTRIES,
    HCA_STATE,
    ROLLBACK_TOKENS,
    WINDOW,
    CacheRole,
    layer_caches,
    plan_pools,
)
from ascend_v4.config import LayerKind, ModelConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
GROUPS = (WINDOW, ENTRIES, HCA_ENTRIES, CSA_STATE, HCA_STATE)
BF16_BYTES, FLOAT32_BYTES = 2, 4


@pytest.fixture(scope="module", params=["flash", "pro"])
def config(request):
    return ModelConfig.from_file(CONFIGS / f"{request.param}.yaml")


def names(config: ModelConfig, kind: LayerKind) -> dict[str, tuple[int, int]]:
    return {
        spec.name: (spec.rows_per_page, spec.row_width)
        for spec in layer_caches(config, kind, prefix="layer").specs()
    }


def test_a_page_is_128_window_rows_32_csa_entries_and_keys_or_16_hca_entries(config):
    assert names(config, LayerKind.SWA) == {"layer.window": (128, 512)}
    assert names(config, LayerKind.CSA) == {
        "layer.window": (128, 512),
        "layer.entries": (32, 512),
        "layer.state": (8, 4 * 512),
        "layer.index_keys": (32, 128),
        "layer.index_state": (8, 4 * 128),
    }
    assert names(config, LayerKind.HCA) == {
        "layer.window": (128, 512),
        "layer.entries": (16, 512),
        "layer.state": (32, 2 * 512),
    }


def test_only_compressor_state_is_float32(config):
    specs = [spec for kind in LayerKind for spec in layer_caches(config, kind, prefix="layer").specs()]
    assert {spec.name for spec in specs if spec.role is CacheRole.STATE} == {
        "layer.state",
        "layer.index_state",
    }


def test_entries_of_a_million_tokens_take_the_bytes_of_the_report(config):
    """9.625 GiB for Pro and 6.724 GiB for Flash in bfloat16, windows included."""
    tokens = 2**20
    plan = plan_pools(set(GROUPS), cache_tokens=tokens, max_sequences=1, max_step_tokens=128)
    total = 0
    for kind in config.layer_kinds:
        for spec in layer_caches(config, kind, prefix="layer").specs():
            if spec.group in (ENTRIES, HCA_ENTRIES):
                pages = tokens // spec.group.page_tokens
                total += pages * spec.rows_per_page * spec.row_width * BF16_BYTES
                spare = plan.bytes_of(spec, BF16_BYTES) - pages * (
                    spec.rows_per_page * spec.row_width * BF16_BYTES
                )
                assert spare == 2 * spec.rows_per_page * spec.row_width * BF16_BYTES
        total += BLOCK_TOKENS * config.head_dim * BF16_BYTES
    want = {43: 6.724, 61: 9.625}[config.num_hidden_layers]
    assert round(total / 2**30, 3) == want


def test_state_of_one_sequence_takes_the_bytes_of_the_report(config):
    """64 KiB and 16 KiB for a CSA layer, 512 KiB for an HCA layer."""
    kib = {
        (kind, spec.name): (spec.group.retain_tokens or 0) * spec.row_width * FLOAT32_BYTES / 1024
        for kind in LayerKind
        for spec in layer_caches(config, kind, prefix="x").specs()
        if spec.role is CacheRole.STATE
    }
    assert kib == {
        (LayerKind.CSA, "x.state"): 64,
        (LayerKind.CSA, "x.index_state"): 16,
        (LayerKind.HCA, "x.state"): 512,
    }


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_pages_cover_their_tokens_and_no_page_more(group):
    for tokens in (0, 1, group.page_tokens - 1, group.page_tokens, group.page_tokens + 1, 2**40):
        pages = group.pages_for(tokens)
        assert pages * group.page_tokens >= tokens > (pages - 1) * group.page_tokens or tokens == pages == 0


@pytest.mark.parametrize("group", [WINDOW, CSA_STATE, HCA_STATE], ids=lambda group: group.name)
@given(tokens=st.integers(0, 10_000))
def test_live_pages_hold_what_is_retained_wherever_it_begins(group, tokens):
    oldest = max(0, tokens - group.retain_tokens - ROLLBACK_TOKENS)
    assert group.pages_for(tokens) - oldest // group.page_tokens <= group.live_pages


def test_sizes_do_not_wrap():
    plan = plan_pools({ENTRIES}, cache_tokens=2**40, max_sequences=1, max_step_tokens=1)
    spec = layer_caches(ModelConfig.from_file(CONFIGS / "pro.yaml"), LayerKind.CSA, prefix="x").entries
    assert spec is not None
    assert plan.pages[ENTRIES] == 2**33 + 2
    assert plan.bytes_of(spec, 2) == (2**33 + 2) * 32 * 512 * 2
