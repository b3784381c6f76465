"""ModelConfig: every problem of a config file in one error, and what each field must be."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_v4.config import (
    SHIPPED_CONFIGS,
    ExpertFormat,
    LayerKind,
    ModelConfig,
    parse_model_config,
    read_config_fields,
    resolve_config_path,
)
from ascend_v4.config_file import MAX_CONFIG_BYTES
from ascend_v4.errors import ConfigError, UnsupportedModelError


@pytest.fixture
def fields():
    """Fields of the shipped tiny model."""
    return read_config_fields(resolve_config_path("tiny"))


def problems_of(fields):
    with pytest.raises(ConfigError) as caught:
        parse_model_config(fields)
    return str(caught.value)


@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_shipped_config_is_valid_and_wholly_known(name):
    config = ModelConfig.from_file(resolve_config_path(name))

    assert config.unknown_fields == ()
    assert config.quantized
    assert config.expert_format is ExpertFormat.FP4
    assert config.num_mtp_blocks == 1


@pytest.mark.golden
@pytest.mark.parametrize("name", ["nano", "layer-hash", "flash-tiny", "pro-tiny"])
def test_golden_config_is_valid_and_wholly_known(golden_dir, name):
    assert ModelConfig.from_file(golden_dir(name)).unknown_fields == ()


def test_layer_kinds_follow_compress_ratios_without_the_mtp_block(fields):
    config = parse_model_config(fields)

    assert config.layer_kinds == tuple(LayerKind(ratio) for ratio in (0, 0, 4, 128, 4, 128))


def test_missing_contradictory_and_unsupported_are_in_one_error(fields):
    del fields["vocab_size"]
    fields |= {
        "num_hash_layers": 99,
        "sliding_window": 64,
        "o_groups": 3,
        "index_head_dim": 96,
        "head_dim": 100,
        "compress_ratios": [0, 0, 8, 128, 4, 128, 0],
        "hidden_act": "gelu",
    }

    text = problems_of(fields)

    assert "8 problems" in text
    for part in (
        "vocab_size is missing",
        "num_hash_layers is 99",
        "sliding_window is 64",
        "o_groups 3",
        "index_head_dim is 96",
        "100 - 64",
        "only 0 (SWA), 4 (CSA) and 128 (HCA)",
        "hidden_act is 'gelu'",
    ):
        assert part in text


def test_every_required_field_is_named_when_all_are_missing(fields):
    required = set(fields) - {
        "architectures", "attention_dropout", "initializer_range", "torch_dtype", "transformers_version",
        "use_cache", "model_type", "expert_dtype", "quantization_config", "num_key_value_heads", "hidden_act",
        "scoring_func", "topk_method", "norm_topk_prob", "tie_word_embeddings", "attention_bias",
    }  # fmt: skip

    text = problems_of({"model_type": "deepseek_v4"})

    assert {name for name in required if f"- {name} is missing" in text} == required


def test_only_unsupported_is_an_unsupported_model_error(fields):
    fields["sliding_window"] = 256

    with pytest.raises(UnsupportedModelError, match="sliding_window is 256; only 128"):
        parse_model_config(fields)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": True}, "hidden_size is True; it must be an integer"),
        ({"hidden_size": "256"}, "hidden_size is '256'; it must be an integer"),
        ({"hidden_size": 10**400}, "hidden_size is an integer of 1329 bits"),
        ({"hidden_size": -1}, "hidden_size is -1; it must be in"),
        ({"hidden_size": 40}, "hidden_size is 40; FP4 groups need a multiple of 32"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be finite"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be finite"),
        ({"rope_theta": 10**400}, "rope_theta is an integer of 1329 bits"),
        ({"rope_theta": 1}, "rope_theta is 1; it must be above 1"),
        ({"swiglu_limit": False}, "swiglu_limit is False; it must be a number"),
        ({"swiglu_limit": "1e1"}, "write 1.0e-6"),
        ({"hc_eps": 0}, "hc_eps is 0; it must be above 0"),
        ({"compress_ratios": []}, "compress_ratios has 0 entries"),
        ({"compress_ratios": [0, 0, 4]}, "too short for 6 layers"),
        ({"compress_ratios": [0, 0, 4, True, 4, 128, 0]}, "compress_ratios holds True"),
        ({"compress_ratios": [0, 0, 4, 128, 4, 128, 4]}, "compress_ratios of the MTP blocks are [4]"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok is 17; there are only 16"),
        ({"qk_rope_head_dim": 128}, "qk_rope_head_dim is 128; it must be below head_dim 128"),
        ({"index_head_dim": 32}, "it must be at most index_head_dim 32"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; it must be even"),
        ({"bos_token_id": 512}, "bos_token_id is 512; the vocabulary has 512"),
        ({"eos_token_id": [1, 512]}, "eos_token_id is [1, 512]; the vocabulary has 512"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2; only 1"),
        ({"n_routed_experts": 1 << 16, "num_hidden_layers": 40}, "at most 1048576 routed experts"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True; only 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; only True"),
        ({"n_group": 8}, "n_group is 8; only 1"),
        ({"expert_dtype": "int4"}, "expert_dtype is 'int4'; only 'fp4' or 'fp8'"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; it must be a mapping"),
        ({"quantization_config": {}}, "quantization_config.weight_block_size is None; only [128, 128]"),
        ({"rope_scaling": 4}, "rope_scaling is 4; it must be a mapping or null"),
    ],
    ids=str,
)
def test_wrong_value_is_named_with_its_bound(fields, change, said):
    assert said in problems_of(fields | change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"factor": 0.5}, "rope_scaling.factor is 0.5; it must be at least 1"),
        ({"beta_fast": 0.5}, "beta_fast is 0.5; it must be at least beta_slow 1"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        ({"type": "linear"}, "rope_scaling.type is 'linear'; only 'yarn'"),
        ({"rope_type": "linear"}, "rope_scaling.rope_type is 'linear'; only 'yarn'"),
        ({"mscale": 0.7}, "rope_scaling.mscale is 0.7"),
    ],
    ids=str,
)
def test_wrong_rope_scaling_is_named(fields, change, said):
    assert said in problems_of(fields | {"rope_scaling": fields["rope_scaling"] | change})


def test_rope_type_stands_for_type(fields):
    scaling = fields["rope_scaling"]
    scaling["rope_type"] = scaling.pop("type")

    yarn = parse_model_config(fields).yarn

    assert yarn is not None
    assert (yarn.factor, yarn.original_max_position_embeddings) == (4.0, 1024)


def test_null_rope_scaling_means_no_yarn_and_absent_is_an_error(fields):
    assert parse_model_config(fields | {"rope_scaling": None}).yarn is None

    del fields["rope_scaling"]
    assert "rope_scaling is missing (null means no YaRN)" in problems_of(fields)


def test_v41_is_refused_by_name_with_what_differs():
    with pytest.raises(UnsupportedModelError, match=r"deepseek_v41.*Engram.*32x32"):
        parse_model_config({"model_type": "deepseek_v41"})


@pytest.mark.parametrize("model_type", [None, "deepseek_v3", ["deepseek_v4"], 4])
def test_other_model_type_is_refused(model_type):
    with pytest.raises(UnsupportedModelError, match="runs deepseek_v4 only"):
        parse_model_config({"model_type": model_type})


def test_extra_compress_ratios_belong_to_draft_blocks(fields):
    fields |= {"compress_ratios": [0, 0, 4, 128, 4, 128, 0, 0, 0], "dspark_block_size": 5}

    config = parse_model_config(fields)

    assert len(config.layer_kinds) == 6
    assert config.draft is not None
    assert config.draft.fields == ("dspark_block_size",)
    assert config.num_mtp_blocks == 0
    assert config.unknown_fields == ()


def test_config_without_quantization_is_bf16(fields):
    del fields["quantization_config"]

    assert not parse_model_config(fields).quantized


def test_unknown_fields_are_kept_by_name(fields):
    assert parse_model_config(fields | {"brand_new": 1}).unknown_fields == ("brand_new",)


def test_directory_json_and_yaml_give_the_same_config(fields, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))

    from_directory = ModelConfig.from_file(tmp_path)

    assert from_directory == ModelConfig.from_file(tmp_path / "config.json")
    assert from_directory == ModelConfig.from_file(resolve_config_path("tiny"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"model_type": 1, "model_type": 2}', "model_type is given twice"),
        ("a.json", '{"rope_scaling": {"factor": 1, "factor": 2}}', "factor is given twice"),
        ("a.json", "[1]", "holds a list"),
        ("a.json", "{", "does not parse"),
        ("a.json", "[" * 100_000, "does not parse"),
        ("a.json", '{"a": ' + "9" * 5000 + "}", "does not parse"),
        ("a.yaml", "a: 1\na: 2\n", "a key is given twice in the mapping at line 1"),
        ("a.yaml", "a: &x [1]\nb: *x\n", "aliases"),
        ("a.yaml", "a: !!python/object/apply:os.getcwd []", "does not parse"),
        ("a.yaml", "- 1", "holds a list"),
        ("a.json", " " * (MAX_CONFIG_BYTES + 1), "bound for a model config"),
    ],
    ids=lambda value: value[:30],
)
def test_unusable_file_is_a_config_error_that_names_it(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)

    with pytest.raises(ConfigError, match=name) as caught:
        read_config_fields(tmp_path / name)

    assert said in str(caught.value)


def test_absent_file_is_named_with_the_shipped_configs(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.json does not exist.*flash, pro, tiny"):
        read_config_fields(tmp_path / "nothing.json")


def test_bytes_that_are_no_text_are_a_config_error(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match="UTF-8"):
        read_config_fields(tmp_path / "a.json")


TINY = read_config_fields(resolve_config_path("tiny"))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=4), st.dictionaries(st.text(max_size=8), SCALARS, max_size=4)
)


@given(st.dictionaries(st.sampled_from(sorted(TINY)), VALUES, min_size=1, max_size=5))
def test_any_change_gives_a_config_or_a_config_error(changes):
    # any other exception fails the test
    with contextlib.suppress(ConfigError):
        config = parse_model_config(copy.deepcopy(TINY) | changes)
        assert len(config.layer_kinds) == config.num_hidden_layers
