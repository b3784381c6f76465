"""Descriptions of configs and checkpoints, and that they need no torch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_v4.checkpoint.describe import count_parameters, describe, examine
from ascend_v4.checkpoint.index import expected_tensors
from tests.unit.checkpoints import edit_weight_map, make_small, shard_of, small_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_small(tmp_path_factory.mktemp("sound") / "checkpoint")


@pytest.fixture
def checkpoint(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "checkpoint")


def test_flash_is_counted_as_the_reference_counts_it():
    summary = describe("flash")

    assert summary["layers"] == {"swa": 2, "csa": 21, "hca": 20, "mtp": 1}
    assert (summary["tensors"], summary["bytes"]) == (69_187, 159_609_485_896)
    assert summary["parameters"] == {"total": 284_332_240_471, "active": 13_270_101_591, "mtp": 6_610_048_891}
    assert summary["dtypes"] == {
        "I8": 33792,
        "F8_E8M0": 34167,
        "F8_E4M3": 375,
        "BF16": 433,
        "F32": 417,
        "I64": 3,
    }
    assert summary["quantization"] == {"linears": "fp8", "experts": "fp4"}


def test_pro_is_counted_as_the_reference_counts_it():
    summary = describe("pro")

    assert summary["layers"] == {"swa": 0, "csa": 30, "hca": 31, "mtp": 1}
    assert (summary["tensors"], summary["bytes"]) == (145_116, 864_704_792_696)
    assert summary["parameters"] == {
        "total": 1_572_997_201_763,
        "active": 48_852_402_019,
        "mtp": 25_840_145_979,
    }


def test_bare_config_has_null_for_what_only_files_can_tell():
    summary = describe("tiny")

    assert [summary[key] for key in ("missing", "unexpected", "draft_tensors", "shards")] == [None] * 4


def test_parameters_do_not_depend_on_the_format_they_are_stored_in():
    formats: tuple[dict[str, object], ...] = ({}, {"expert_dtype": "fp8"}, {"quantization_config": None})
    configs = [small_config(**changes) for changes in formats]
    counts = [count_parameters(config, expected_tensors(config)) for config in configs]

    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["mtp"] > 0
    assert 0 < counts[0]["active"] < counts[0]["total"]


def test_sound_checkpoint_lacks_nothing(sound):
    described = examine(sound)
    bare = describe(sound / "config.json")

    assert (described.summary["missing"], described.summary["unexpected"]) == ([], [])
    assert described.damage == ()
    for key in ("tensors", "bytes", "dtypes", "dtype_bytes", "parameters", "layers"):
        assert described.summary[key] == bare[key]


def test_absent_tensor_is_missing_and_no_damage(checkpoint):
    edit_weight_map(checkpoint, lambda placed: placed.pop("norm.weight"))

    described = examine(checkpoint)

    assert described.summary["missing"] == ["norm.weight"]
    assert described.damage == ()


def test_absent_shard_is_damage_and_its_tensors_are_missing(checkpoint):
    shard = shard_of(checkpoint, "norm.weight")
    shard.unlink()

    described = examine(checkpoint)

    assert "norm.weight" in described.summary["missing"]
    assert {problem.file for problem in described.damage} == {shard.name}


def test_mtp_tensors_of_a_draft_are_listed_apart(tmp_path):
    directory = make_small(tmp_path / "checkpoint")
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(
        text.replace('"hidden_act"', '"dspark_block_size": 5, "hidden_act"')
    )

    summary = describe(directory)

    assert summary["draft_fields"] == ["dspark_block_size"]
    assert summary["unexpected"] == []
    assert summary["draft_tensors"]
    assert all(name.startswith("mtp.") for name in summary["draft_tensors"])
    assert (summary["layers"]["mtp"], summary["parameters"]["mtp"]) == (0, 0)


def test_without_draft_fields_extra_mtp_tensors_are_unexpected(tmp_path):
    directory = make_small(tmp_path / "checkpoint")
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(
        text.replace('"num_nextn_predict_layers": 1', '"num_nextn_predict_layers": 0')
    )

    summary = describe(directory)

    assert summary["draft_tensors"] == []
    assert summary["unexpected"]
    assert all(name.startswith("mtp.") for name in summary["unexpected"])


def test_describing_needs_no_torch(sound):
    program = (
        "import sys\nsys.modules['torch'] = None\n"
        "from ascend_v4.checkpoint.describe import describe\n"
        f"assert describe({str(sound)!r})['missing'] == []\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
