"""Expected tensors: the release's census from the config alone."""

from __future__ import annotations

import json

import pytest

from ascend_v4.checkpoint.index import Role, expected_tensors, fp8_scale_shape
from ascend_v4.checkpoint.names import is_mtp, layer_names, mtp_names, top_names
from ascend_v4.config import ModelConfig, resolve_config_path
from tests.unit.checkpoints import small_config


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_bytes"),
    [("flash", 69_187, 159_609_485_896), ("pro", 145_116, 864_704_792_696)],
)
def test_census_is_that_of_the_published_index(name, num_tensors, num_bytes):
    specs = expected_tensors(ModelConfig.from_file(resolve_config_path(name)))

    assert len(specs) == num_tensors
    assert sum(spec.num_bytes for spec in specs.values()) == num_bytes


def test_dtype_counts_of_flash_are_the_published_ones():
    specs = expected_tensors(ModelConfig.from_file(resolve_config_path("flash")))
    counts = {
        dtype: sum(spec.dtype == dtype for spec in specs.values()) for dtype in ("I8", "F8_E8M0", "I64")
    }

    assert counts == {"I8": 33_792, "F8_E8M0": 34_167, "I64": 3}


@pytest.mark.golden
@pytest.mark.parametrize(
    "name", ["nano", "layer-swa", "layer-csa", "layer-hca", "layer-hash", "flash-tiny", "pro-tiny"]
)
def test_names_are_those_of_a_golden_index(golden_dir, name):
    directory = golden_dir(name)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    specs = expected_tensors(ModelConfig.from_file(directory))

    assert set(specs) == set(index["weight_map"])
    assert sum(spec.num_bytes for spec in specs.values()) == index["metadata"]["total_size"]


def test_every_scale_fits_its_weight():
    specs = expected_tensors(small_config())
    scales = [spec for spec in specs.values() if spec.role is Role.SCALE]

    assert scales
    for scale in scales:
        assert scale.weight is not None
        weight = specs[scale.weight]
        rows, columns = weight.shape
        fp4 = (rows, columns * 2 // 32)
        assert scale.shape == (fp4 if weight.dtype == "I8" else fp8_scale_shape(rows, columns))


@pytest.mark.parametrize(
    ("rows", "columns", "shape"), [(128, 128, (1, 1)), (129, 1, (2, 1)), (512, 160, (4, 2))]
)
def test_partial_fp8_block_has_a_scale(rows, columns, shape):
    assert fp8_scale_shape(rows, columns) == shape


def test_fp8_experts_have_block_scales():
    config = small_config(expert_dtype="fp8")
    gate = layer_names(config, 0).moe.experts[0].gate
    specs = expected_tensors(config)
    assert gate.scale is not None

    assert (specs[gate.weight].dtype, specs[gate.weight].shape) == ("F8_E4M3", (96, 64))
    assert (specs[gate.scale].dtype, specs[gate.scale].shape) == ("F8_E8M0", (1, 1))


def test_unquantised_model_has_bf16_weights_and_no_scales():
    specs = expected_tensors(small_config(quantization_config=None))

    assert {spec.dtype for spec in specs.values()} == {"BF16", "F32", "I64"}
    assert not [name for name in specs if name.endswith(".scale")]


def test_layers_have_what_their_kind_needs():
    config = small_config()
    swa, csa, hca = (layer_names(config, layer).attention for layer in range(3))

    assert swa.compressor is None
    assert swa.indexer is None
    assert csa.compressor is not None
    assert csa.indexer is not None
    assert hca.compressor is not None
    assert hca.indexer is None


def test_overlapping_compressor_is_twice_as_wide():
    config = small_config()
    specs = expected_tensors(config)
    csa, hca = (layer_names(config, layer).attention.compressor for layer in (1, 2))
    assert csa is not None
    assert hca is not None

    assert specs[csa.position_bias].shape == (4, 2 * config.head_dim)
    assert specs[hca.position_bias].shape == (128, config.head_dim)
    assert specs[csa.norm].shape == specs[hca.norm].shape == (config.head_dim,)


def test_hash_layers_have_a_token_table_and_no_bias():
    config = small_config()
    hashed, learned = (layer_names(config, layer).moe for layer in (0, 1))

    assert (hashed.router_bias, learned.token_experts) == (None, None)
    assert hashed.token_experts is not None
    assert expected_tensors(config)[hashed.token_experts].shape == (config.vocab_size, 2)


def test_mtp_block_routes_by_bias_and_shares_embedding_and_head():
    config = small_config()
    names = mtp_names(config, 0)
    mtp = [name for name in expected_tensors(config) if is_mtp(name)]

    assert names.block.moe.router_bias in mtp
    assert names.final_norm in mtp
    assert not {f"mtp.0.{top_names().embedding}", f"mtp.0.{top_names().head}"} & set(mtp)


def test_draft_blocks_are_not_expected():
    config = small_config(dspark_block_size=5)

    assert not [name for name in expected_tensors(config) if is_mtp(name)]
