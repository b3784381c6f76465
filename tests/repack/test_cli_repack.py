"""`ascend-v4 repack` as typed."""

from __future__ import annotations

import json

import pytest

from tests.repack.packs import tree


def test_repack_writes_a_pack_and_prints_what_became_of_it(run_cli, source, tmp_path):
    result = run_cli("repack", source, tmp_path / "out", "--to", "w8a8")
    assert result.exit_code == 0
    assert "experts" in result.stdout
    assert "manifest.json" in tree(tmp_path / "out")


def test_stderr_is_two_lines_where_it_is_no_terminal(run_cli, source, tmp_path):
    result = run_cli("repack", source, tmp_path / "out", "--to", "mx", "--max-part-bytes", 100_000)
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["writing", "done,"]


def test_json_is_one_object_with_rates_and_kinds(run_cli, source, tmp_path):
    result = run_cli("repack", source, tmp_path / "out", "--to", "w8a8", "--json", "--jobs", 1)
    summary = json.loads(result.stdout)
    assert summary["recipe"] == "accurate"
    assert summary["rounding"] == "exact"
    assert set(summary["thread_seconds"]) == {"transcode", "hash", "write", "sync"}
    (experts,) = [kind for kind in summary["kinds"] if kind["part"] == "experts"]
    assert experts["exact_rows"] == experts["rows"] > 0


def test_every_option_reaches_the_pack(run_cli, source, tmp_path):
    flags = [
        "--recipe",
        "cann",
        "--rounding",
        "absmax",
        "--keep",
        "bf16=*.wo_b.weight",
        "--ranks",
        "tp=2,ep=4",
    ]
    result = run_cli("repack", source, tmp_path / "out", "--to", "w8a8", *flags, "--json")
    summary = json.loads(result.stdout)
    assert summary["recipe"] == "cann"
    assert summary["rounding"] == "absmax"
    assert summary["keep"] == ["*.wo_b.weight"]
    assert summary["ranks"] == {"tp": 2, "ep": 4}
    assert (tmp_path / "out" / "rank-003" / "ascend_v4.json").exists()


def test_second_run_is_one_line_of_error(run_cli, source, tmp_path):
    run_cli("repack", source, tmp_path / "out", "--to", "mx")
    result = run_cli("repack", source, tmp_path / "out", "--to", "mx")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "holds a finished repack" in result.stderr


def test_verify_says_what_was_compared(run_cli, source, tmp_path):
    run_cli("repack", source, tmp_path / "out", "--to", "w8a8")
    result = run_cli("repack", "--verify", tmp_path / "out", "--source", source)
    assert result.exit_code == 0
    assert "all as written" in result.stdout
    assert "every byte follows from" in result.stdout


def test_verify_of_a_damaged_output_exits_with_2(run_cli, source, tmp_path):
    run_cli("repack", source, tmp_path / "out", "--to", "w8a8")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    with shard.open("ab") as stream:
        stream.write(b"\0")
    result = run_cli("repack", "--verify", tmp_path / "out", "--json")
    assert result.exit_code == 2
    assert "wrong size" in result.stderr
    assert result.stdout == ""


def test_verify_json_is_one_object(run_cli, source, tmp_path):
    run_cli("repack", source, tmp_path / "out", "--to", "mx")
    result = run_cli("repack", "--verify", tmp_path / "out", "--source", source, "--json")
    assert json.loads(result.stdout)["decoded_weights"] > 0


def test_dry_run_sizes_every_target_and_writes_nothing(run_cli, tmp_path):
    result = run_cli("repack", "tiny", tmp_path / "out", "--dry-run", "--json")
    summary = json.loads(result.stdout)
    assert [each["target"] for each in summary["targets"]] == ["w8a8", "w4a8", "mx", "bf16", "release"]
    assert all(each["estimated_seconds"] > 0 for each in summary["targets"])
    assert summary["bytes_per_s"]["fp4_to_int8"] > 0
    assert tree(tmp_path) == {}


def test_dry_run_of_a_checkpoint_foretells_the_size(run_cli, source, tmp_path):
    foretold = run_cli("repack", source, tmp_path / "out", "--to", "w8a8", "--dry-run", "--json")
    written = run_cli("repack", source, tmp_path / "out", "--to", "w8a8", "--json")
    assert json.loads(foretold.stdout)["targets"][0]["bytes"] == json.loads(written.stdout)["bytes"]


@pytest.mark.parametrize(("name", "gibibytes"), [("flash", 275), ("pro", 1500)])
def test_dry_run_of_the_real_configs_says_the_known_sizes(run_cli, tmp_path, name, gibibytes):
    result = run_cli("repack", name, tmp_path / "out", "--to", "w8a8", "--dry-run")
    assert result.exit_code == 0
    target, recipe, number, unit = result.stdout.split()[:4]
    assert (target, recipe, unit) == ("w8a8", "accurate", "GiB")
    assert float(number.replace(",", "")) == pytest.approx(gibibytes, rel=0.01)
    assert " parts, about " in result.stdout


def test_explain_gives_a_reason_per_part(run_cli):
    result = run_cli("repack", "--explain", "--to", "w4a8")
    assert result.stdout.startswith("w4a8 / accurate")
    assert "experts" in result.stdout


def test_explain_without_a_target_covers_all(run_cli):
    described = json.loads(run_cli("repack", "--explain", "--json").stdout)
    assert list(described) == ["w8a8", "w4a8", "mx", "bf16", "release"]
    assert described["w8a8"]["rules"]["experts"]["becomes"] == "int8"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name the checkpoint"),
        (["SOURCE", "--to", "mx"], "OUT, the directory to write, is missing"),
        (["SOURCE", "OUT"], "--to, what the output is for, is missing"),
        (["SOURCE", "OUT", "--to", "int3"], "'int3' is not one of"),
        (["--source", "SOURCE"], "--source goes with --verify"),
        (["SOURCE", "--verify", "OUT"], "takes no other directory"),
        (["--explain", "--recipe", "cann"], "--recipe goes with --to"),
        (["SOURCE", "OUT", "--to", "mx", "--device", "tpu"], "'tpu' is not one of"),
        (["SOURCE", "OUT", "--to", "mx", "--recipe", "cann"], "there is no recipe 'cann'"),
        (["SOURCE", "OUT", "--to", "mx", "--keep", "fp8=*"], "is not bf16=PATTERN"),
        (["SOURCE", "OUT", "--to", "w8a8", "--keep", "bf16=nothing"], "matches no weight"),
        (["SOURCE", "OUT", "--to", "w8a8", "--layout", "huggingface"], "holds bf16 only"),
        (["SOURCE", "OUT", "--to", "w8a8", "--max-part-bytes", "5"], "the part size is 5 bytes"),
        (["OUT", "OUT", "--to", "w8a8"], "OUT"),
        (["--verify", "OUT"], "is not a directory"),
    ],
)
def test_wrong_usage_is_explained_and_writes_nothing(run_cli, source, tmp_path, flags, message):
    places = {"SOURCE": str(source), "OUT": str(tmp_path / "OUT")}
    result = run_cli("repack", *(places.get(flag, flag) for flag in flags))
    assert result.exit_code == 2
    assert message in result.stderr
    assert tree(tmp_path) == {}
