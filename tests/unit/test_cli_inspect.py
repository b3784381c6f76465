"""`ascend-v4 inspect`."""

from __future__ import annotations

import json

import pytest

from ascend_v4.config import resolve_config_path
from tests.unit.checkpoints import edit_entry, edit_weight_map, make_small, shard_of

KEYS = {"model_type", "layers", "tensors", "bytes", "dtypes", "parameters", "missing", "unexpected"}


@pytest.fixture
def checkpoint(tmp_path):
    return make_small(tmp_path / "checkpoint")


def test_json_of_a_bare_config_is_one_object(run_cli):
    result = run_cli("inspect", resolve_config_path("flash"), "--json")
    summary = json.loads(result.stdout)

    assert (result.exit_code, result.stderr) == (0, "")
    assert set(summary) >= KEYS
    assert (summary["tensors"], summary["missing"], summary["unexpected"]) == (69_187, None, None)


def test_json_of_a_sound_checkpoint_has_empty_lists(run_cli, checkpoint):
    result = run_cli("inspect", checkpoint, "--json")
    summary = json.loads(result.stdout)

    assert result.exit_code == 0
    assert (summary["missing"], summary["unexpected"]) == ([], [])


def test_text_shows_layers_parameters_and_files(run_cli, checkpoint):
    text = run_cli("inspect", checkpoint).stdout

    for part in ("1 SWA, 1 CSA, 1 HCA, 1 MTP", "total", "active", "F8_E8M0", "missing      none"):
        assert part in text


def test_absent_tensor_is_listed_and_warned_of(run_cli, checkpoint):
    edit_weight_map(checkpoint, lambda placed: placed.pop("norm.weight"))

    result = run_cli("inspect", checkpoint, "--json")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["missing"] == ["norm.weight"]
    assert "1 tensors are missing" in result.stderr


def test_damaged_checkpoint_is_described_and_exits_with_2_listing_all(run_cli, checkpoint):
    edit_entry(checkpoint, "norm.weight", dtype="F16")
    gone = shard_of(checkpoint, "layers.0.attn.attn_sink")
    gone.unlink()

    result = run_cli("inspect", checkpoint, "--json")

    assert result.exit_code == 2
    assert "layers.0.attn.attn_sink" in json.loads(result.stdout)["missing"]
    assert "wrong dtype: norm.weight" in result.stderr
    assert gone.name in result.stderr


def test_truncated_shard_exits_with_2(run_cli, checkpoint):
    shard = shard_of(checkpoint, "embed.weight")
    shard.write_bytes(shard.read_bytes()[:-1])

    result = run_cli("inspect", checkpoint)

    assert result.exit_code == 2
    assert f"in {shard.name}" in result.stderr


def test_long_lists_are_cut_in_text_and_whole_in_json(run_cli, checkpoint):
    edit_weight_map(checkpoint, lambda placed: [placed.pop(name) for name in list(placed)[:60]])

    assert "... and 40 more" in run_cli("inspect", checkpoint).stdout
    assert len(json.loads(run_cli("inspect", checkpoint, "--json").stdout)["missing"]) == 60


def test_wrong_path_is_one_line_and_exit_2(run_cli, tmp_path):
    result = run_cli("inspect", tmp_path / "absent")

    assert (result.exit_code, result.stdout) == (2, "")
    assert "does not exist" in result.stderr
