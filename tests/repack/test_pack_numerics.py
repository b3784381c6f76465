"""Packs compute with the numerics of their target; `exact` computes with the numbers they hold."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.quantize import quantized_source
from ascend_v4.engine.runner import ModelRunner
from ascend_v4.engine.scheduler import SchedulerLimits
from ascend_v4.errors import CheckpointError, ConfigError
from ascend_v4.model.load import load_model
from ascend_v4.model.numerics import BF16, EXACT, MX, NATIVE, W4A8, W8A8, numerics_by_name
from ascend_v4.operators.contracts.linear import EXACT_INPUTS, linear, prepare_linear, whole_product
from ascend_v4.operators.contracts.moe import ExpertWeights, prepare_experts, routed_experts
from ascend_v4.operators.contracts.quantize import (
    ActivationFormat,
    IndexFormat,
    StoredWeight,
    WeightFormat,
    fake_quantize_mxfp8,
    quantize_index,
    quantize_int8_token,
    unpack_int4,
)
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.layouts import LayoutName
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import Target
from ascend_v4.serve.server import ServeConfig, _load_engine
from tests.operators.number_formats import e4m3_value

TARGETS = ("w8a8", "w4a8", "mx", "bf16")
BY_TARGET = {"w8a8": W8A8, "w4a8": W4A8, "mx": MX, "bf16": BF16}


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small gain nothing from threads, and lose much to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def golden() -> Path:
    """The one-layer set with an indexer."""
    return Path(__file__).resolve().parent.parent / "golden" / "layer-csa"


@pytest.fixture(scope="module")
def packs(golden, tmp_path_factory) -> dict[str, Path]:
    """Native packs of the set by target, and bf16 in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("packs")
    made = {target: repack(golden, folder / target, target) for target in TARGETS}
    made["huggingface"] = repack(golden, folder / "huggingface", "bf16", layout=LayoutName.HUGGINGFACE)
    return made


def repack(source: Path, output: Path, target: str, **options) -> Path:
    run_repack(RepackConfig(source=source, output=output, target=Target(target), jobs=1, **options))
    return output


def prompts_of(golden: Path) -> list[list[int]]:
    expected = load_file(golden / "expected-exact.safetensors")
    count = sum(name.endswith(".input_ids") for name in expected)
    return [expected[f"p{index}.input_ids"].tolist() for index in range(count)]


def expected_rows(golden: Path, numerics: str) -> torch.Tensor:
    expected = load_file(golden / f"expected-{numerics}.safetensors")
    return torch.cat([expected[f"p{index}.prefill_logits"] for index in range(len(prompts_of(golden)))])


def score(source, prompts: list[list[int]], numerics: str = "auto") -> torch.Tensor:
    """Logits after every token of every prompt."""
    runner = ModelRunner(
        load_model(source, numerics=numerics), max_sequence_tokens=1024, cache_tokens=1024, max_sequences=1
    )
    rows = []
    for ids in prompts:
        sequence = runner.open_sequence(len(ids))
        rows.append(runner.logits(runner.streams(Chunk(sequence, ids))))
        runner.close_sequence(sequence)
    return torch.cat(rows)


def mean_cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    return torch.cosine_similarity(found.double(), expected.double()).mean().item()


# what quantising does


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rows_are_rounded_to_even_by_their_own_scale(dtype):
    rows = (torch.randn(50, 96) * torch.logspace(-30, 30, 50).unsqueeze(1)).to(dtype)
    rows[7] = 0
    codes, scale = quantize_int8_token(rows)
    wide = rows.float().numpy()
    wanted = (np.abs(wide).max(1) / np.float32(127)).astype(np.float32)
    np.testing.assert_array_equal(scale.numpy(), wanted)
    with np.errstate(invalid="ignore"):
        quotient = np.nan_to_num(wide / wanted[:, None])
    np.testing.assert_array_equal(codes.numpy(), np.clip(np.rint(quotient), -127, 127))
    assert scale[7] == 0
    assert not codes[7].any()


def mx_by_definition(group: np.ndarray) -> np.ndarray:
    """The OCP rule with a search through every E4M3 number instead of a cast."""
    amax = np.abs(group).max()
    if amax == 0:
        return np.zeros_like(group)
    scale = 2.0 ** (np.floor(np.log2(amax)) - 8)
    table = np.array([e4m3_value(code) for code in range(127)])
    clipped = np.minimum(np.abs(group) / scale, 448.0)
    distance = np.abs(table[None, :] - clipped[:, None])
    nearest = distance.argmin(1)
    tied = (distance == distance.min(1, keepdims=True)).sum(1) > 1
    # of two equally near neighbours the even code; argmin takes the lower one
    nearest += tied & (nearest % 2 == 1)
    return np.sign(group) * table[nearest] * scale


@pytest.mark.parametrize("exponent", [-60, -9, 0, 8, 60])
def test_mxfp8_follows_the_ocp_rule(exponent):
    values = torch.randn(6, 80) * 2.0**exponent
    values[1, :32] = 0
    values[2, 0] = 511.0 * 2.0**exponent
    got = fake_quantize_mxfp8(values).numpy()
    wide = values.double().numpy()
    for low in range(0, 80, 32):
        for row in range(6):
            np.testing.assert_array_equal(
                got[row, low : low + 32], mx_by_definition(wide[row, low : low + 32])
            )


def test_mxfp8_values_are_exact_in_bfloat16():
    values = torch.randn(20, 64, dtype=torch.bfloat16)
    assert torch.equal(fake_quantize_mxfp8(values).float(), fake_quantize_mxfp8(values.float()))


def test_int4_bytes_hold_the_even_output_in_their_low_nibble():
    codes = torch.arange(256, dtype=torch.int64).to(torch.uint8).view(torch.int8).view(4, 64)
    rows = unpack_int4(codes)
    for byte in range(256):
        pair, column = divmod(byte, 64)
        low, high = byte & 15, byte >> 4
        assert rows[2 * pair, column] == low - 16 * (low > 7)
        assert rows[2 * pair + 1, column] == high - 16 * (high > 7)


def test_int8_indexer_keys_are_codes_times_a_float16_scale():
    rows = torch.randn(40, 128, dtype=torch.bfloat16) * 3
    got = quantize_index(rows, format=IndexFormat.INT8)
    assert got.dtype is torch.float32
    step = got.abs().amax(1) / 127
    assert torch.equal(step.half().float(), step)
    codes = got / step.unsqueeze(1)
    assert torch.equal(codes, codes.round())


def test_fp8_indexer_keys_use_the_whole_range_of_e4m3():
    got = quantize_index(torch.randn(40, 64) * 1e-3, format=IndexFormat.FP8)
    scale = got.abs().amax(1, keepdim=True) / 448
    again = (got / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(again, got, rtol=2**-20, atol=0)


# what products do


@pytest.mark.parametrize("inputs", [1, 96, EXACT_INPUTS, EXACT_INPUTS + 1, 7168, 16384])
def test_whole_products_are_exact_at_the_largest_codes(inputs):
    codes_TK = torch.full((3, inputs), 127.0)
    codes_NK = torch.full((4, inputs), -128.0)
    codes_TK[1] = torch.randint(-127, 128, (inputs,)).float()
    codes_NK[2] = torch.randint(-128, 128, (inputs,)).float()
    wanted = codes_TK.to(torch.int64).numpy() @ codes_NK.to(torch.int64).numpy().T
    np.testing.assert_array_equal(whole_product(codes_TK, codes_NK).numpy(), wanted.astype(np.float32))


def test_partial_sums_of_a_slice_stay_whole_in_float32():
    assert EXACT_INPUTS * 127 * 128 < 2**24


def int8_weight(outputs: int, inputs: int) -> StoredWeight:
    codes = torch.randint(-127, 128, (outputs, inputs)).to(torch.int8)
    return StoredWeight(codes, torch.rand(outputs) * 1e-2, WeightFormat.INT8_CHANNEL)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_layers_sum_integers_and_scale_once(copy, dtype):
    weight, x = int8_weight(130, 2100), torch.randn(5, 2100).to(dtype)
    x[3] = 0
    got = linear(x, prepare_linear(weight, copy=copy), activation=ActivationFormat.INT8_TOKEN)
    codes, scale = quantize_int8_token(x)
    assert weight.scale is not None
    sums = codes.to(torch.int64).numpy() @ weight.codes.to(torch.int64).numpy().T
    scaled = torch.from_numpy(sums.astype(np.float32)) * weight.scale * scale.unsqueeze(1)
    assert torch.equal(got, scaled.to(dtype))
    assert not got[3].any()


@pytest.mark.parametrize("activation", [ActivationFormat.INT8_TOKEN, ActivationFormat.MXFP8])
def test_routing_weights_multiply_after_the_down_projection_on_ascend_formats(activation):
    experts = ExpertWeights(((int8_weight(64, 96), int8_weight(64, 96)),), (int8_weight(96, 64),))
    if activation is ActivationFormat.MXFP8:
        plain = [StoredWeight(each.to_float32(), None, WeightFormat.PLAIN) for each in experts.gate_up[0]]
        down = StoredWeight(experts.down[0].to_float32(), None, WeightFormat.PLAIN)
        experts = ExpertWeights((tuple(plain),), (down,))
    x, ids = torch.randn(4, 96).to(torch.bfloat16), torch.zeros(4, 1, dtype=torch.int32)
    weights = torch.tensor([[1.0], [0.3], [0.7], [1.9]])
    block = [
        routed_experts(x, routing, ids, experts, swiglu_limit=10.0, activation=activation)
        for routing in (weights, torch.ones(4, 1))
    ]
    assert torch.equal(block[0], block[1] * weights)


def test_a_plain_expert_beside_integer_ones_gets_its_input_as_it_is():
    plain = StoredWeight(torch.randn(96, 64).to(torch.bfloat16), None, WeightFormat.PLAIN)
    gates = (int8_weight(64, 96), int8_weight(64, 96))
    x, ids = torch.randn(4, 96).to(torch.bfloat16), torch.zeros(4, 1, dtype=torch.int32)
    rows = [
        routed_experts(
            x,
            torch.ones(4, 1),
            ids,
            prepare_experts(ExpertWeights((gates,), (down,)), copy=copy),
            swiglu_limit=10.0,
            activation=ActivationFormat.INT8_TOKEN,
        )
        for down in (plain, StoredWeight(plain.codes.float(), None, WeightFormat.PLAIN))
        for copy in (True, False)
    ]
    assert all(torch.equal(row, rows[0]) for row in rows[1:])


# which numerics a pack gets


@pytest.mark.parametrize("target", TARGETS)
def test_auto_is_the_targets_numerics(packs, target):
    loaded = load_model(packs[target])
    assert loaded.numerics is BY_TARGET[target]
    assert load_model(packs[target], numerics="exact").numerics is EXACT


@pytest.mark.parametrize("target", TARGETS)
def test_native_on_a_pack_is_refused_in_one_sentence(packs, target):
    with pytest.raises(ConfigError, match=target) as caught:
        load_model(packs[target], numerics="native")
    assert str(caught.value).count(". ") == 0


def test_a_release_pack_is_native(golden, tmp_path):
    assert load_model(repack(golden, tmp_path / "release", "release")).numerics is NATIVE


def test_a_checkpoint_in_the_release_layout_keeps_its_numerics():
    assert numerics_by_name("auto") is numerics_by_name("native") is NATIVE


def test_only_quantised_weights_have_their_inputs_quantised():
    plain, integer = WeightFormat.PLAIN, WeightFormat.INT8_CHANNEL
    for numerics in (NATIVE, W8A8, W4A8, MX, BF16, EXACT):
        assert numerics.activation_of(plain) is ActivationFormat.NONE
    assert W8A8.activation_of(integer) is ActivationFormat.INT8_TOKEN
    assert MX.activation_of(WeightFormat.FP4_GROUP) is ActivationFormat.MXFP8
    assert NATIVE.activation_of(WeightFormat.FP4_GROUP) is ActivationFormat.FP8_GROUP
    assert EXACT.activation_of(integer) is BF16.activation_of(integer) is ActivationFormat.NONE


def test_experts_of_one_layer_quantised_differently_run_in_exact_only(golden, tmp_path):
    keep = ("layers.0.ffn.experts.1.*",)
    pack = repack(golden, tmp_path / "mixed", "mx", keep=keep)
    with pytest.raises(CheckpointError, match="quantised differently"):
        load_model(pack)
    assert load_model(pack, numerics="exact").numerics is EXACT


def test_experts_kept_in_bf16_run_beside_int8_ones(golden, tmp_path):
    pack = repack(golden, tmp_path / "kept", "w8a8", keep=("layers.0.ffn.experts.*.w2.weight",))
    prompt = prompts_of(golden)[0]
    assert mean_cosine(score(pack, [prompt]), score(pack, [prompt], "exact")) > 0.99


# what comes out


@pytest.mark.golden
@pytest.mark.parametrize("target", ["bf16", "mx", "huggingface"])
def test_packs_without_error_give_the_exact_golden_logits(golden, packs, target):
    found, expected = score(packs[target], prompts_of(golden), "exact"), expected_rows(golden, "exact")
    assert (found - expected).abs().max().item() <= 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.golden
@pytest.mark.parametrize(
    ("target", "floor"), [("w8a8", 0.9975), ("w4a8", 0.995), ("mx", 0.9965), ("bf16", 0.997)]
)
def test_packs_stay_near_the_release(golden, packs, target, floor):
    assert mean_cosine(score(packs[target], prompts_of(golden)), expected_rows(golden, "native")) > floor


@pytest.mark.golden
def test_transformers_loads_the_huggingface_layout_and_agrees(golden, packs):
    transformers = pytest.importorskip("transformers", reason="it needs Python 3.11 or newer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            packs["huggingface"], dtype=torch.float32, output_loading_info=True
        )
    assert not report["missing_keys"]
    with torch.inference_mode():
        rows = [model(torch.tensor([ids])).logits[0] for ids in prompts_of(golden)]
    found, expected = torch.cat(rows), expected_rows(golden, "exact")
    assert (found - expected).abs().max().item() <= 1e-4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


# repacked while loading


@pytest.mark.parametrize("numerics", ["auto", "exact"])
@pytest.mark.parametrize("target", TARGETS)
def test_quantising_while_loading_equals_the_pack(golden, packs, target, numerics):
    prompt = prompts_of(golden)[:1]
    on_the_way = score(quantized_source(golden, target), prompt, numerics)
    assert torch.equal(on_the_way, score(packs[target], prompt, numerics))


def test_the_cache_directory_keeps_the_pack_and_uses_it_again(golden, tmp_path):
    first = quantized_source(golden, "w8a8", cache_dir=tmp_path / "cache")
    assert isinstance(first, Path)
    assert first == tmp_path / "cache" / "layer-csa-w8a8"
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    assert quantized_source(golden, "w8a8", cache_dir=tmp_path / "cache") == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert load_model(first).numerics is W8A8


def test_a_kept_pack_of_other_files_is_refused(golden, tmp_path):
    other = Path(shutil.copytree(golden, tmp_path / "layer-csa"))
    quantized_source(golden, "bf16", cache_dir=tmp_path)
    fields = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(fields | {"routed_scaling_factor": 1.25}))
    with pytest.raises(CheckpointError, match="other files"):
        quantized_source(other, "bf16", cache_dir=tmp_path)


def test_a_pack_made_with_other_options_is_refused(golden, tmp_path):
    repack(golden, tmp_path / "layer-csa-w8a8", "w8a8", reversible=True)
    with pytest.raises(CheckpointError, match="other options"):
        quantized_source(golden, "w8a8", cache_dir=tmp_path)


def test_a_cache_directory_alone_is_refused(golden, tmp_path):
    with pytest.raises(ConfigError, match="--quantize"):
        quantized_source(golden, None, cache_dir=tmp_path)


def test_release_is_no_target_to_quantise_to(golden):
    with pytest.raises(ConfigError, match="w8a8, w4a8, mx, bf16"):
        quantized_source(golden, "release")


@pytest.mark.parametrize("is_kept", [False, True])
def test_score_quantises(golden, run_cli, tmp_path, packs, is_kept):
    prompt = prompts_of(golden)[0][:20]
    asked, answered = tmp_path / "in.json", tmp_path / "out.safetensors"
    asked.write_text(json.dumps({"prompts": [{"input_ids": prompt}]}))
    kept = ("--cache-dir", tmp_path / "kept") if is_kept else ()
    arguments = ("--input", asked, "--output", answered, "--quantize", "w8a8", "--json", *kept)
    result = run_cli("score", golden, *arguments)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["numerics"] == "w8a8"
    assert torch.equal(load_file(answered)["p0.prefill_logits"], score(packs["w8a8"], [prompt]))


def test_serve_quantises(golden):
    limits = SchedulerLimits(max_num_seqs=1)
    engine = _load_engine(ServeConfig(checkpoint=golden, limits=limits, quantize="w8a8", max_model_tokens=64))
    assert isinstance(engine._runner, ModelRunner)
    assert engine._runner.loaded.numerics is W8A8
