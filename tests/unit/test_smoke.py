"""`ascend-v4 smoke`: what passes, how a failure is reported, what is skipped and what may not be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ascend_v4.checkpoint.synthesize import plan_synthesis, synthesize
from ascend_v4.cli import smoke as verb
from ascend_v4.device.soc import Chip
from ascend_v4.device.target import CPU, Arithmetic, Target
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import CATALOG, WAIVABLE
from ascend_v4.operators.select import load_backend
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import Target as PackTarget
from ascend_v4.smoke import PARTS, Status
from ascend_v4.smoke.models import (
    EXACT,
    GOLDEN_ROWS,
    NATIVE,
    RELEASED,
    SMALL,
    W8A8,
    Agreement,
    deep_agreement,
    draw_checkpoint,
    fitting_config,
    golden_logits,
    layer_agreement,
    open_runner,
    score,
    shipped_fields,
    ways_of,
)
from ascend_v4.smoke.operators import advice
from ascend_v4.smoke.report import Outcome, Recorder, SkippedError, told

ON_SIM = ("--device", "sim", "--chip", "a3", "--waive-limits", "sizes")
NOTHING = type(None)
ROW_FIELDS: dict[str, tuple[type, ...]] = {
    "part": (str,),
    "name": (str,),
    "status": (str,),
    "seconds": (float,),
    "compared": (str,),
    "measure": (str, NOTHING),
    "difference": (float, NOTHING),
    "bound": (float, NOTHING),
    "why": (str, NOTHING),
    "do": (str, NOTHING),
}


@pytest.fixture
def smoke(run_cli):
    """Runs the verb; the simulator that --device sim installs is gone afterwards."""

    def run(*arguments: object) -> tuple[int, dict]:
        result = run_cli("smoke", *arguments, "--json")
        return result.exit_code, json.loads(result.stdout) if result.stdout else {"error": result.stderr}

    yield run
    if simulator.installed() is not None:
        simulator.uninstall()


@pytest.fixture
def recorder():
    return Recorder(only=frozenset(), required=None, announce=lambda row: None)


def rows_of(report: dict, part: str) -> list[dict]:
    return [row for row in report["rows"] if row["part"] == part]


def parts(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


def test_the_command_and_the_report_name_the_same_parts():
    assert tuple(PARTS) == verb.PARTS


def test_a_healthy_cpu_passes(smoke):
    code, report = smoke(*parts("device", "operators", "layer", "model", "repeat"), "--operator", "rms_norm")
    assert code == 0
    assert report["status"] == "passed"
    assert {row["part"] for row in report["rows"]} == {"device", "operators", "layer", "model", "repeat"}
    assert report["counts"] == {"passed": len(report["rows"]), "failed": 0, "skipped": 0}
    measured = [row for row in report["rows"] if row["difference"] is not None]
    assert len(measured) >= 9
    assert all(row["difference"] <= row["bound"] for row in measured)


def test_the_report_has_the_documented_fields(smoke):
    _, report = smoke(*parts("device", "operators"), "--operator", "rotate")
    assert report.keys() == {
        "version", "device", "chip", "checkpoint", "waived_limits", "arithmetic", "without", "require",
        "facts", "status", "seconds", "counts", "rows",
    }  # fmt: skip
    for row in report["rows"]:
        assert row.keys() == ROW_FIELDS.keys()
        for name, kind in ROW_FIELDS.items():
            assert isinstance(row[name], kind), (name, row)


def test_a_simulated_a3_passes_with_every_part_of_a_model(smoke):
    code, report = smoke(*ON_SIM, *parts("layer", "model", "repeat", "memory"))
    assert code == 0, [row for row in report["rows"] if row["status"] != "passed"]
    names = {row["name"] for row in report["rows"]}
    assert {"one layer of CSA, w8a8", "one layer of HCA, w4a8", "golden logits, w4a8", "growth"} <= names
    assert report["waived_limits"] == sorted(WAIVABLE)


def test_a_chat_streams_the_same_answer_twice(smoke):
    code, report = smoke(*parts("chat"))
    (row,) = rows_of(report, "chat")
    assert (code, row["status"], row["difference"]) == (0, "passed", 0.0)
    assert "tool call" in row["compared"]


def test_a_wrong_operator_fails_with_the_one_thing_to_try(smoke, monkeypatch):
    load_backend("npu")
    declared = CATALOG["rms_norm"]
    right = next(each for each in declared.implementations if each.backend == "npu")

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        return right.call(*args, **kwargs) * 1.5

    monkeypatch.setattr(declared, "implementations", [replace(right, call=wrong)])
    code, report = smoke(*ON_SIM, *parts("device", "operators"), "--operator", "rms_norm")
    (row,) = [row for row in rows_of(report, "operators") if row["status"] == "failed"]
    assert code == 1
    assert report["counts"]["failed"] == 1
    assert row["name"] == f"rms_norm by {right.provider}"
    assert "off by" in row["why"]
    assert "--only operators --operator rms_norm --device sim --chip a3" in row["do"]


def test_a_failure_is_printed_below_the_table(run_cli, monkeypatch):
    load_backend("cpu")
    declared = CATALOG["rotate"]
    right = next(each for each in declared.implementations if each.backend == "cpu")

    def broken(*args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("aclnnRotate failed\nsecond line")

    monkeypatch.setattr(declared, "implementations", [replace(right, call=broken)])
    result = run_cli("smoke", "--only", "operators", "--operator", "rotate")
    assert result.exit_code == 1
    assert "RuntimeError: aclnnRotate failed" in result.stdout
    assert "\n  try: " in result.stdout
    assert "1 failed" in result.stdout
    assert "second line" not in result.stdout


@pytest.mark.parametrize(
    ("provider", "target", "words"),
    [
        ("vllm-ascend", Target(device="npu"), "--device npu --without vllm_ascend"),
        ("cann-recipes", Target(device="npu"), "--without custom_ops"),
        ("torch_npu", Target(device="npu"), "docs/operators.md"),
        ("native", CPU, "ASCEND_V4_CPU_KERNELS=0"),
        ("reference", CPU, "Report it"),
    ],
    ids=str,
)
def test_advice_fits_the_provider(provider, target, words):
    assert words in advice("linear", provider, target, AssertionError("off by 3"))


def test_advice_for_a_full_device_is_about_memory():
    error = RuntimeError("NPU out of memory. Tried to allocate 2 GiB")
    assert "Free the device's memory" in advice("linear", "vllm-ascend", Target(device="npu"), error)


def test_a_missing_device_is_skipped_unless_it_is_required(smoke):
    code, report = smoke("--device", "npu")
    assert (code, report["counts"]["failed"]) == (0, 0)
    assert {row["status"] for row in report["rows"]} == {"skipped"}
    code, report = smoke("--require", "npu")
    (row,) = rows_of(report, "device")
    assert (code, report["device"], row["status"]) == (1, "npu", "failed")
    assert "npu" in row["why"]


def test_require_and_another_device_contradict_each_other(run_cli):
    result = run_cli("smoke", "--require", "npu", "--device", "cpu")
    assert result.exit_code == 2
    assert "contradict" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--only", "everything"), "--only"),
        (("--only", "operators", "--operator", "no_such"), "no operator is called 'no_such'"),
        (("--device", "sim"), "needs --chip"),
        (("--waive-limits", "sizes"), "cannot waive limits"),
        (("no-such-checkpoint",), "no-such-checkpoint"),
    ],
    ids=str,
)
def test_wrong_usage_exits_with_2(run_cli, arguments, words):
    result = run_cli("smoke", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_checkpoint_lends_its_widths_and_its_official_logits(smoke, golden_dir):
    code, report = smoke(golden_dir("nano"), *parts("layer", "model", "chat"))
    assert code == 0
    names = [row["name"] for row in rows_of(report, "model")]
    assert "official logits of nano, exact" in names
    assert len([name for name in names if "nano" in name]) == 2
    (chat,) = rows_of(report, "chat")
    assert chat["status"] == "skipped"
    assert "no tokenizer" in chat["why"]


def test_a_pack_lends_its_widths_too(smoke, golden_dir, tmp_path):
    run_repack(RepackConfig(source=golden_dir("nano"), output=tmp_path / "pack", target=PackTarget.W4A8))
    code, report = smoke(tmp_path / "pack", *ON_SIM, *parts("layer", "repeat"))
    assert code == 0
    assert "one layer of HCA, w4a8" in {row["name"] for row in report["rows"]}


def test_logits_that_differ_from_the_official_ones_fail(smoke, tmp_path):
    checkpoint = tmp_path / "changed"
    synthesize(checkpoint, plan_synthesis(shipped_fields(SMALL)))
    ids, logits = torch.arange(6), torch.randn(6, 512)
    expected = {"p0.input_ids": ids, "p0.decode_ids": ids[:0], "p0.prefill_logits": logits}
    save_file({**expected, "p0.decode_logits": logits[:0]}, checkpoint / "expected-native.safetensors")
    code, report = smoke(checkpoint, *parts("model"))
    (row,) = [row for row in report["rows"] if row["status"] == "failed"]
    assert code == 1
    assert row["name"] == "official logits of changed, native"
    assert row["difference"] > row["bound"]


def test_a_check_that_raises_is_a_failed_row_and_the_next_one_runs(recorder):
    def fail() -> Outcome:
        raise IndexError("row 7")

    recorder.check("layer", "first", fail, do="look")
    recorder.check("layer", "second", lambda: Outcome(compared="nothing"), do="look")
    first, second = recorder.rows
    assert (first.status, first.why, first.do) == (Status.FAILED, "IndexError: row 7", "look")
    assert (second.status, second.do) == (Status.PASSED, None)


def test_nothing_is_asked_of_a_device_that_answers_no_more(recorder):
    def fail() -> Outcome:
        raise RuntimeError("aicore exception")

    def lost() -> None:
        raise RuntimeError("error 507015")

    recorder.synchronize = lost
    recorder.check("operators", "linear", fail, do="look")
    recorder.check("operators", "rotate", lambda: Outcome(compared="nothing"), do="look")
    assert recorder.rows[1].status is Status.SKIPPED
    assert "since linear" in (recorder.rows[1].why or "")


def test_a_required_device_allows_no_skipped_check(recorder):
    def cannot() -> Outcome:
        raise SkippedError("no tokenizer")

    recorder.check("chat", "all", cannot, do="look")
    recorder.required = "npu"
    recorder.check("chat", "all", cannot, do="look")
    assert [row.status for row in recorder.rows] == [Status.SKIPPED, Status.FAILED]


def test_logits_that_are_not_finite_fail():
    got = torch.randn(4, 8)
    got[1, 1] = torch.nan
    outcome = Agreement(distance=2.0).judge(got, torch.randn(4, 8), against="others")
    assert not outcome.is_good
    assert "NaN" in (outcome.why or "")


def test_another_most_probable_token_fails_where_few_are_allowed():
    want = torch.eye(4)
    agreement = Agreement(distance=2.0, argmax_share=0.97)
    assert agreement.judge(want, want, against="others").is_good
    assert not agreement.judge(want.flip(0), want, against="others").is_good


def test_errors_are_told_in_one_line():
    assert told(ValueError("\n  first  \nsecond")) == "ValueError: first"
    assert told(AssertionError("off by 2")) == "off by 2"
    assert told(MemoryError()) == "MemoryError"


def test_golden_logits_come_with_the_package_for_every_way():
    found = golden_logits()
    assert {f"{SMALL}.{way.golden}" for way in (EXACT, NATIVE, W8A8)} <= found.keys()
    assert {name.split(".")[1] for name in found if name.startswith(RELEASED)} == {"w8a8", "w4a8", "mx"}
    assert all(tensor.shape == (len(GOLDEN_ROWS), 512) for tensor in found.values())


def test_a_chip_whose_limits_hold_is_given_a_model_of_released_widths():
    strict = Target(device="sim", chip=Chip.A3, packages=simulator.packages(Chip.A3))
    assert fitting_config(strict) == RELEASED
    assert fitting_config(replace(strict, waived=frozenset(WAIVABLE))) == SMALL
    assert fitting_config(CPU) == SMALL
    assert [way.name for way in ways_of(CPU)] == ["exact", "native"]


def test_wide_layers_and_ideal_arithmetic_have_bounds_of_their_own():
    chip = Target(device="sim", chip=Chip.A3)
    ideal = replace(chip, arithmetic=Arithmetic.IDEAL)
    assert layer_agreement(chip, W8A8, is_wide=False) == Agreement(distance=1e-3, argmax_share=0.97)
    assert layer_agreement(ideal, W8A8, is_wide=False) == Agreement(distance=1e-4, argmax_share=0.99)
    assert layer_agreement(ideal, W8A8, is_wide=True) == Agreement(distance=1e-3, argmax_share=0.9)
    assert layer_agreement(CPU, EXACT, is_wide=True) == Agreement(distance=1e-8, argmax_share=1.0)


@pytest.mark.slow
def test_shipped_logits_of_released_widths_are_those_of_this_version(tmp_path):
    path = draw_checkpoint(tmp_path, RELEASED, shipped_fields(RELEASED))
    got = score(open_runner(path, CPU, W8A8, packs=tmp_path))[list(GOLDEN_ROWS)]
    want = golden_logits()[f"{RELEASED}.w8a8"]
    assert deep_agreement(W8A8).judge(got, want, against="the shipped ones").is_good


def test_a_drawn_checkpoint_is_drawn_once(tmp_path):
    first = draw_checkpoint(tmp_path, SMALL, shipped_fields(SMALL))
    stamp = (first / "config.json").stat().st_mtime_ns
    assert draw_checkpoint(tmp_path, SMALL, shipped_fields(SMALL)) == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
