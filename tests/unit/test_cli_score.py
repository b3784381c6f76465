"""`ascend-v4 score`, in process: what it writes, and what a user reads when it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ascend_v4.checkpoint.names import CONFIG_FILE
from tests.model.builders import make_model, token_ids, write_prompts

ROOT = Path(__file__).resolve().parents[2]
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "compress_ratios": [0, 4, 128, 0],
    "index_n_heads": 8,
    "n_routed_experts": 4,
    "max_position_embeddings": 512,
}
VOCAB = 320


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small gain nothing from threads, and lose much to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Three layers and an MTP block, 512 positions, no tokenizer."""
    return make_model(tmp_path_factory.mktemp("score") / "model", **SMALL)


@pytest.fixture
def score(run_cli, tmp_path, checkpoint):
    """Scores prompts of (input ids, decode ids); the outcome is on the result, the tensors in `output`."""

    def run(*prompts: tuple[list[int], list[int]], options: tuple[str, ...] = (), model: Path = checkpoint):
        written = write_prompts(tmp_path / "in.json", *prompts)
        return run_cli("score", model, "--input", written, "--output", tmp_path / "out.st", *options)

    return run


@pytest.fixture
def output(tmp_path):
    return lambda: load_file(tmp_path / "out.st")


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_each_prompt_gets_its_own_float32_rows(score, output):
    result = score(([1, 2, 3], [4, 5]), ([6], [7]), options=("--mtp",))
    assert result.exit_code == 0
    assert result.stdout == ""
    assert shapes(output()) == {
        "p0.prefill_logits": (3, VOCAB),
        "p0.decode_logits": (2, VOCAB),
        "p0.mtp_prefill_logits": (3, VOCAB),
        "p1.prefill_logits": (1, VOCAB),
        "p1.decode_logits": (1, VOCAB),
        "p1.mtp_prefill_logits": (1, VOCAB),
    }
    assert {tensor.dtype for tensor in output().values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in output().values())


def test_without_decode_ids_there_are_no_decode_rows_and_one_mtp_row_less(score, output):
    score(([1, 2, 3], []), options=("--mtp",))
    assert shapes(output()) == {
        "p0.prefill_logits": (3, VOCAB),
        "p0.decode_logits": (0, VOCAB),
        "p0.mtp_prefill_logits": (2, VOCAB),
    }


def test_a_one_token_prompt_alone_has_no_mtp_row(score, output):
    assert score(([9], []), options=("--mtp",)).exit_code == 0
    assert shapes(output())["p0.mtp_prefill_logits"] == (0, VOCAB)


def test_mtp_rows_do_not_depend_on_what_follows_but_the_last(score, output):
    ids = token_ids(140, seed=1)
    score((ids, [3, 4]), options=("--mtp", "--numerics", "exact"))
    forced = output()["p0.mtp_prefill_logits"]
    score((ids, []), options=("--mtp", "--numerics", "exact"))
    assert torch.equal(output()["p0.mtp_prefill_logits"], forced[:-1])


def test_decode_rows_are_the_prefill_rows_of_the_same_tokens(score, output):
    ids = token_ids(200, seed=2)
    score((ids[:120], ids[120:]), (ids, []), options=("--numerics", "exact"))
    rows = output()
    joined = torch.cat([rows["p0.prefill_logits"], rows["p0.decode_logits"]])
    assert (joined - rows["p1.prefill_logits"]).abs().max().item() <= 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 128, 1000])
def test_chunks_change_nothing(score, output, chunk):
    ids = token_ids(150, seed=3)
    score((ids, [1]), options=("--mtp", "--numerics", "exact"))
    whole = output()
    score((ids, [1]), options=("--mtp", "--numerics", "exact", "--chunk", str(chunk)))
    chunked = output()
    assert all((chunked[name] - whole[name]).abs().max().item() <= 1e-4 for name in whole)


@pytest.mark.parametrize("options", [(), ("--chunk", "7")], ids=["whole", "7"])
def test_logprobs_are_the_log_softmax_of_the_logits_at_the_next_token(score, output, options):
    ids = token_ids(60, seed=4)
    score((ids[:50], ids[50:]), options=("--numerics", "exact"))
    logits = torch.cat([output()["p0.prefill_logits"], output()["p0.decode_logits"]])
    expected = torch.log_softmax(logits.double(), -1)[torch.arange(59), torch.tensor(ids[1:])]
    assert score((ids[:50], ids[50:]), options=("--logprobs", "--numerics", "exact", *options)).exit_code == 0
    assert shapes(output()) == {"p0.logprobs": (59,)}
    assert (output()["p0.logprobs"] - expected).abs().max().item() <= 1e-4


def test_a_lone_token_has_no_next_one_to_give_a_logprob(score, output):
    assert score(([1], []), options=("--logprobs",)).exit_code == 0
    assert shapes(output()) == {"p0.logprobs": (0,)}


def test_logprobs_of_many_rows_are_those_of_few(score, output, monkeypatch):
    ids = token_ids(90, seed=5)
    score((ids, []), options=("--logprobs", "--numerics", "exact"))
    at_once = output()["p0.logprobs"]
    monkeypatch.setattr("ascend_v4.engine.scoring.LOGIT_ROWS", 4)
    score((ids, []), options=("--logprobs", "--numerics", "exact"))
    assert (output()["p0.logprobs"] - at_once).abs().max().item() <= 1e-4


def test_numerics_are_native_unless_asked_otherwise(score, output):
    ids = token_ids(40, seed=6)
    found = {}
    for name in ("auto", "native", "exact"):
        score((ids, []), options=("--numerics", name))
        found[name] = output()["p0.prefill_logits"]
    score((ids, []))
    assert torch.equal(output()["p0.prefill_logits"], found["auto"])
    assert torch.equal(found["auto"], found["native"])
    assert not torch.equal(found["exact"], found["native"])


def test_json_is_one_object_on_stdout_and_nothing_else(score, tmp_path):
    result = score(([1, 2], [3]), options=("--json", "--numerics", "exact"))
    summary = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert summary.pop("seconds") >= 0
    assert summary == {
        "output": str(tmp_path / "out.st"),
        "numerics": "exact",
        "prompts": 1,
        "tokens": 3,
        "tensors": {"p0.prefill_logits": [2, VOCAB], "p0.decode_logits": [1, VOCAB]},
    }
    assert "prompt 0: 2 tokens, 1 forced" in result.stderr


def test_the_longest_sequence_of_the_model_can_be_scored(score, output):
    ids = token_ids(512, seed=7)
    assert score((ids[:510], ids[510:])).exit_code == 0
    assert shapes(output())["p0.prefill_logits"] == (510, VOCAB)


def test_a_longer_sequence_is_refused(score):
    result = score((token_ids(512, seed=7), [1]))
    assert result.exit_code == 2
    assert "prompt 0 has 513 tokens, decode_ids included; the model takes 512" in result.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_refused_input_is_one_line_on_stderr_and_leaves_the_old_output(score, tmp_path, options):
    (tmp_path / "out.st").write_bytes(b"before")
    result = score(([1], [VOCAB]), options=options)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"error: {tmp_path / 'in.json'}: prompt 0: decode_ids: token id {VOCAB} at position 0 is outside the "
        f"vocabulary of {VOCAB}.\n"
    )
    assert (tmp_path / "out.st").read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"in.json", "out.st"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--numerics", "fast"), "'fast' is not one of 'auto', 'exact', 'native'"),
        (("--device", "tpu"), "'tpu' is not one of 'cpu', 'cuda', 'npu', 'sim'"),
        (("--mtp", "--logprobs"), "--mtp and --logprobs exclude each other"),
        (("--chunk", "0"), "0 is not in the range x>=1"),
        (("--chunk", "many"), "'many' is not a valid integer"),
    ],
    ids=["numerics", "device", "mtp with logprobs", "chunk of 0", "chunk of text"],
)
def test_a_wrong_option_is_named(score, options, message):
    result = score(([1], []), options=options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_mtp_is_refused_where_mtp_tensors_are_drafts(score, tmp_path):
    model = make_model(tmp_path / "model", dspark_block_size=5, **SMALL)
    assert score(([1], []), model=model).exit_code == 0
    result = score(([1], []), model=model, options=("--mtp",))
    assert result.exit_code == 2
    assert "--mtp cannot run here: config.json has dspark_block_size" in result.stderr
    assert "DSpark draft" in result.stderr


def test_mtp_is_refused_where_there_is_no_block(score, tmp_path):
    model = make_model(tmp_path / "model", num_nextn_predict_layers=0, **SMALL)
    result = score(([1], []), model=model, options=("--mtp",))
    assert result.exit_code == 2
    assert "num_nextn_predict_layers is 0" in result.stderr


def test_an_output_that_cannot_be_is_refused_before_the_model_loads(
    run_cli, tmp_path, checkpoint, monkeypatch
):
    monkeypatch.setattr("ascend_v4.engine.runner.load_model", None)
    written = write_prompts(tmp_path / "in.json", ([1], []))
    for output, message in (
        (tmp_path, "is there and is not a file"),
        (tmp_path / "absent" / "out.st", "does not exist. Make it first"),
    ):
        result = run_cli("score", checkpoint, "--input", written, "--output", output)
        assert result.exit_code == 2
        assert message in result.stderr


@pytest.mark.parametrize("name", ["absent", CONFIG_FILE])
def test_a_checkpoint_is_a_directory(score, checkpoint, name):
    result = score(([1], []), model=checkpoint / name)
    assert result.exit_code == 2
    assert f"{name} is not a directory" in result.stderr


def test_damaged_shards_are_listed_and_nothing_is_written(score, tmp_path):
    model = make_model(tmp_path / "model", **SMALL)
    shard = next(model.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    result = score(([1], []), model=model)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {model}: ")
    assert "truncated shard" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.st").exists()


def test_an_unexpected_tensor_and_field_are_warned_of_and_scored_around(score, output, tmp_path, caplog):
    model = make_model(tmp_path / "model", **SMALL)
    score(([1, 2], []), model=model)
    before = output()["p0.prefill_logits"]
    fields = json.loads((model / CONFIG_FILE).read_text())
    (model / CONFIG_FILE).write_text(json.dumps(fields | {"num_nextn_predict_layers": 0, "novel": 1}))
    assert score(([1, 2], []), model=model).exit_code == 0
    assert "unexpected tensor mtp.0." in caplog.text
    assert "config fields ignored: novel" in caplog.text
    assert torch.equal(output()["p0.prefill_logits"], before)


def test_the_installed_command_ends_with_2_and_no_traceback(tmp_path, checkpoint):
    written = write_prompts(tmp_path / "in.json", ([VOCAB], []))
    command = [sys.executable, "-m", "ascend_v4", "score", checkpoint, "--input", written]
    done = subprocess.run(
        [*map(str, command), "--output", str(tmp_path / "out.st")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
