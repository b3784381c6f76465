"""`ascend-v4 ops`: what runs where and why, whatever is missing; and the options that name a device."""

from __future__ import annotations

import json
from dataclasses import asdict

import click
import pytest

from ascend_v4.cli import ops, options
from ascend_v4.cli.options import DeviceOptions
from ascend_v4.config import ModelConfig, resolve_config_path
from ascend_v4.device.soc import Chip
from ascend_v4.device.target import CPU, DEVICES, ON_CPU, Arithmetic, Target
from ascend_v4.errors import ConfigError
from ascend_v4.model.sizes import model_sizes, require_attention_parallel
from ascend_v4.operators.contract import BITWISE, CATALOG, WAIVABLE, Limit, Needs, Operator, Where, implements
from ascend_v4.operators.select import load_backend, select
from ascend_v4.operators.status import load_status, operator_rows, parse_status, verified_on

EMPTY = "defaults: {cpu: tested in CI, cuda: written, npu: written}\n"


def flash() -> ModelConfig:
    return ModelConfig.from_file(resolve_config_path("flash"))


def pro() -> ModelConfig:
    return ModelConfig.from_file(resolve_config_path("pro"))


def scale(x):
    return x


@pytest.fixture
def one_operator(monkeypatch):
    """A catalogue of one operator: an npu candidate for 950, one with a limit, one that is slow."""
    declared: Operator[..., object] = Operator(
        name="scale",
        family="tests",
        reference=scale,
        source="a test",
        tolerance=BITWISE,
        specs={},
        mutates=(),
        plan=None,
        prepare=None,
    )
    few_heads = Limit(size="heads", choices=(4, 8), source="its tiling")
    implements(declared, backend="npu", provider="best", needs=Needs(chips=(Chip.A950,)))(scale)
    implements(declared, backend="npu", provider="narrow", limits=(few_heads,), capturable=True)(scale)
    implements(declared, backend="npu", provider="best", too_slow="it copies rows")(scale)
    for module in ("contract", "select", "status"):
        monkeypatch.setattr(f"ascend_v4.operators.{module}.CATALOG", {"scale": declared})
    monkeypatch.setattr("ascend_v4.operators.status.load_backend", lambda backend: None)
    return declared


def on(chip: Chip, **fields: object) -> Target:
    return Target(device="sim", chip=chip, **fields)  # type: ignore[arg-type]


def test_every_operator_of_the_model_is_listed_with_its_choice(run_cli):
    result = run_cli("ops", "tiny", "--json")
    found = json.loads(result.stdout)
    chosen = select("cpu").choices
    assert result.exit_code == 0
    assert [(row["operator"], row["provider"]) for row in found["operators"]] == [
        (name, choice.provider) for name, choice in chosen.items() if CATALOG[name].where is Where.DEVICE
    ]
    listed = {row["operator"] for row in found["operators"]} | {each["operator"] for each in found["host"]}
    assert listed == set(CATALOG)
    assert found["sizes"]["hidden"] == ModelConfig.from_file(resolve_config_path("tiny")).hidden_size


def test_flash_is_assumed_without_a_model(run_cli):
    result = run_cli("ops")
    assert result.stdout.startswith("operators of flash on cpu\n")
    assert "host: fake_quantize_fp8" in result.stdout


def test_a_row_names_the_chosen_candidate_even_where_another_has_its_name(one_operator):
    (row,) = operator_rows(on(Chip.A3), {"heads": 64})
    assert (row.provider, row.chosen is row.candidates[2]) == ("best", True)
    assert [each.reason for each in row.candidates] == [
        "for chip 950, this is a3",
        "heads is 64, it takes heads in {4, 8} (its tiling)",
        None,
    ]
    assert [each.is_for_chip for each in row.candidates] == [False, True, True]
    assert row.candidates[2].too_slow == "it copies rows"


def test_a_waived_limit_is_named(one_operator):
    (row,) = operator_rows(on(Chip.A3, waived=frozenset({"heads"})), {"heads": 64})
    assert row.chosen is not None
    assert (row.provider, row.chosen.waived, row.chosen.capturable) == ("narrow", ("heads",), True)


def test_where_nothing_can_run_the_row_is_still_there(one_operator):
    del one_operator.implementations[2]
    (row,) = operator_rows(on(Chip.A3), {"heads": 64})
    assert (row.backend, row.provider, row.chosen, len(row.candidates)) == ("", "", None, 2)


def test_the_table_shows_why_better_candidates_were_refused(one_operator):
    rows = [asdict(row) for row in operator_rows(on(Chip.A3), {"heads": 64})]
    report = {"operators": rows, "too_slow": ops.too_slow(rows), "host": [], "sizes": {"heads": 64}}
    assert list(ops.table_lines(report, with_candidates=False)) == [
        "scale  best           written, too slow",
        "       not narrow: heads is 64, it takes heads in {4, 8} (its tiling)",
    ]
    assert list(ops.summary_lines(report)) == ["too slow to serve: scale: it copies rows", "host: "]
    full = list(ops.table_lines(report, with_candidates=True))
    assert "       narrow needs nothing; limits: heads in {4, 8}" in full


def test_missing_operators_are_listed_and_the_status_is_2(run_cli, one_operator, monkeypatch):
    one_operator.implementations.clear()
    monkeypatch.setattr("ascend_v4.operators.targets.open_target", lambda asked: on(Chip.A3))
    result = run_cli("ops", "--device", "sim", "--chip", "a3")
    assert result.exit_code == 2
    assert "scale  nothing" in result.stdout
    assert "error: 1 operator(s) have nothing usable on sim (a3): scale." in result.stderr


@pytest.mark.parametrize(
    ("config", "ranks", "chip", "is_taken"),
    [
        (flash, 1, Chip.A950, True),
        (flash, 2, Chip.A950, False),
        (pro, 2, Chip.A950, True),
        (pro, 4, Chip.A950, False),
        (flash, 8, Chip.A3, True),
        (pro, 16, None, True),
    ],
)
def test_on_950_attention_is_shared_by_one_rank_of_flash_and_two_of_pro(config, ranks, chip, is_taken):
    if is_taken:
        require_attention_parallel(config(), ranks, chip=chip)
        return
    with pytest.raises(ConfigError, match=r"takes 64 or 128 heads per rank.*at most [12]\."):
        require_attention_parallel(config(), ranks, chip=chip)
    require_attention_parallel(config(), ranks, chip=chip, waived=frozenset({"heads"}))


def test_heads_must_divide_over_the_ranks(run_cli):
    with pytest.raises(
        ConfigError, match=r"64 attention heads do not divide over 3 ranks. Use one of 1, 2, 4"
    ):
        require_attention_parallel(flash(), 3, chip=None)
    result = run_cli("ops", "flash", "--tp", "3")
    assert (result.exit_code, "operators of flash on cpu" in result.stdout) == (2, True)


def test_parallel_ranks_have_fewer_heads(run_cli):
    assert model_sizes(flash(), attention_parallel=4)["heads"] == 16
    assert json.loads(run_cli("ops", "--tp", "4", "--json").stdout)["sizes"]["heads"] == 16


def test_the_status_table_names_operators_and_providers_that_exist():
    for backend in ("cuda", "npu"):
        load_backend(backend)
        for provider, operators in load_status()[backend].items():
            for operator in operators:
                known = [
                    each.provider for each in CATALOG[operator].implementations if each.backend == backend
                ]
                assert provider in known, f"{backend}/{provider}/{operator}"


def test_nothing_is_verified_without_machine_and_date(monkeypatch):
    text = EMPTY + "npu: {torch_npu: {rms_norm: {950: simulated, a3: 'Atlas 800 A3, 2026-10-01'}}}"
    parsed = parse_status(text)
    monkeypatch.setattr("ascend_v4.operators.status.load_status", lambda: parsed)
    said = {
        chip: verified_on("rms_norm", backend="npu", provider="torch_npu", chip=chip)
        for chip in ("950", "a3", "a2")
    }
    assert said == {"950": "simulated", "a3": "Atlas 800 A3, 2026-10-01", "a2": "written"}
    for claim in ("supported", "works", "Atlas 800 A3", "2026-10-01"):
        with pytest.raises(ConfigError, match="neither written, simulated"):
            parse_status(EMPTY + f"npu: {{torch_npu: {{rms_norm: {{a3: '{claim}'}}}}}}")


def test_options_offer_what_the_device_layer_knows():
    offered = {}
    for option in options.DEVICE_OPTIONS:
        (parameter,) = click.command(option(lambda **typed: None)).params
        assert isinstance(parameter, click.Option)
        offered[parameter.name] = (tuple(getattr(parameter.type, "choices", ())), parameter.help or "")
    assert offered["device"][0] == DEVICES
    assert offered["chip"][0] == tuple(chip.value for chip in Chip)
    assert offered["arithmetic"][0] == tuple(each.value for each in Arithmetic)
    assert all(name in offered["waive"][1] for name in WAIVABLE)


def test_what_was_typed_becomes_one_request():
    typed = {"device": "sim", "chip": "a3", "waive": ("sizes",), "arithmetic": "ideal"}
    request = DeviceOptions(**typed, without=("vllm_ascend,custom_ops",)).request()  # type: ignore[arg-type]
    assert {name: getattr(request, name) for name in typed} == typed
    assert request.without == ("vllm_ascend,custom_ops",)
    plain = DeviceOptions(device="cpu", chip=None, waive=(), arithmetic="chip", without=())
    assert plain.request() == ON_CPU


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--device", "sim"), "--device sim needs --chip, one of a2, a3, 950"),
        (("--device", "cpu", "--chip", "a3"), "--chip is for npu and sim; --device is cpu"),
        (("--waive-limits", "sizes"), "--device cpu cannot waive limits"),
        (("--waive-limits", "dtypes"), "--waive-limits 'dtypes' is not a model size"),
        (("--sim-arithmetic", "ideal"), "--device cpu cannot choose the arithmetic"),
        (("--without", "vllm_ascend"), "--without is for npu and sim; --device is cpu"),
        (("--device", "sim", "--without", "vllm"), "--without 'vllm' is no package. Known: torch_npu"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(args, message, run_cli):
    result = run_cli("ops", *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_the_cpu_is_the_default_target():
    assert operator_rows(CPU, {})
