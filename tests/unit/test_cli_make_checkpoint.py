"""`ascend-v4 make-checkpoint`."""

from __future__ import annotations

import json

import pytest

from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.checkpoint.tokenizer import load_tokenizer
from ascend_v4.config import ModelConfig
from tests.unit.checkpoints import small_fields


@pytest.fixture
def config_file(tmp_path):
    def write(**changes):
        (tmp_path / "config.json").write_text(json.dumps(small_fields(**changes)))
        return tmp_path / "config.json"

    return write


def test_made_checkpoint_verifies_and_is_reported_as_json(run_cli, config_file, tmp_path):
    result = run_cli("make-checkpoint", tmp_path / "out", "--config", config_file(), "--json")
    report = json.loads(result.stdout)

    assert result.exit_code == 0
    with CheckpointReader.open(tmp_path / "out") as reader:
        reader.verify()
        assert (report["tensors"], report["bytes"]) == (reader.num_tensors, reader.stored_bytes)
    assert (report["shards"], report["seed"], report["tokenizer"]) == (1, 0, "bytes")


def test_report_is_on_stderr_without_json(run_cli, config_file, tmp_path):
    result = run_cli("make-checkpoint", tmp_path / "out", "--config", config_file())

    assert result.stdout == ""
    assert "GB/s" in result.stderr


def test_shipped_config_is_taken_by_name(run_cli, tmp_path):
    assert run_cli("make-checkpoint", tmp_path / "out", "--config", "tiny", "--seed", "7").exit_code == 0

    config = ModelConfig.from_file(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out", config=config).num_tokens <= config.vocab_size


def test_default_is_bytes_where_they_fit_and_none_elsewhere(run_cli, config_file, tmp_path):
    fits = run_cli("make-checkpoint", tmp_path / "fits", "--config", config_file())
    small = run_cli("make-checkpoint", tmp_path / "small", "--config", config_file(vocab_size=256))

    assert "writing the byte tokenizer" in fits.stderr
    assert (tmp_path / "fits" / "tokenizer.json").exists()
    assert small.exit_code == 0
    assert "no tokenizer is written" in small.stderr
    assert not (tmp_path / "small" / "tokenizer.json").exists()


@pytest.mark.parametrize("tokenizer", ["bytes", "deepseek"])
def test_tokenizer_that_does_not_fit_is_refused_before_writing(run_cli, config_file, tmp_path, tokenizer):
    config = config_file(vocab_size=256)
    result = run_cli("make-checkpoint", tmp_path / "out", "--config", config, "--tokenizer", tokenizer)

    assert result.exit_code == 2
    assert "vocab_size is 256" in result.stderr
    assert not (tmp_path / "out").exists()


def test_small_shards_are_many(run_cli, config_file, tmp_path):
    run_cli("make-checkpoint", tmp_path / "out", "--config", config_file(), "--max-shard-bytes", "500000")

    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2


def test_second_run_into_the_same_directory_is_refused(run_cli, config_file, tmp_path):
    arguments = ("make-checkpoint", tmp_path / "out", "--config", config_file())

    assert run_cli(*arguments).exit_code == 0
    again = run_cli(*arguments)
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


def test_draft_blocks_are_said_to_be_skipped(run_cli, config_file, tmp_path):
    config = config_file(dspark_block_size=5)

    assert "draft blocks" in run_cli("make-checkpoint", tmp_path / "out", "--config", config).stderr


def test_wrong_config_is_refused_with_every_problem(run_cli, config_file, tmp_path):
    config = config_file(sliding_window=64, num_hash_layers=99)
    result = run_cli("make-checkpoint", tmp_path / "out", "--config", config)

    assert result.exit_code == 2
    assert "sliding_window is 64" in result.stderr
    assert "num_hash_layers is 99" in result.stderr
