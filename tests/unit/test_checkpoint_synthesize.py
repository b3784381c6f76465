"""Random checkpoints: release layout, values of ordinary magnitude, the same for the same seed."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from ascend_v4.checkpoint.index import Role, expected_tensors
from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.checkpoint.synthesize import plan_synthesis, synthesize
from ascend_v4.checkpoint.tokenizer_files import TokenizerChoice
from ascend_v4.checkpoint.values import CHUNK_BYTES, RandomValues
from ascend_v4.config import parse_model_config
from ascend_v4.errors import CheckpointError, ConfigError
from tests.unit.checkpoints import INDEX, make_small, read_header, small_config, small_fields

FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
PINNED = {
    "layers.0.ffn.experts.0.w1.weight": "b11cd44cd271",
    "layers.0.attn.wkv.weight": "e7e9715f4cd9",
    "embed.weight": "11c0bdbfb23e",
}
"""First bytes of some tensors of seed 0."""


def dequantised(weight, scale):
    """Float32 of an FP8 or packed FP4 weight."""
    if weight.dtype == torch.int8:
        codes = weight.view(torch.uint8)
        table = torch.cat([FP4_VALUES, -FP4_VALUES])
        values = torch.stack([table[(codes & 15).long()], table[(codes >> 4).long()]], dim=-1).flatten(1)
        return values * scale.float().repeat_interleave(32, dim=1)
    blocks = scale.float().repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return weight.float() * blocks[: weight.shape[0], : weight.shape[1]]


def all_tensors(directory):
    tensors: dict[str, torch.Tensor] = {}
    for shard in directory.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(shard)
    return tensors


def same_values(one, other):
    return set(one) == set(other) and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


@pytest.fixture(scope="module")
def wide():
    """Tensors of one FP4 and FP8 model wide enough for statistics, with its specs."""
    config = small_config(hidden_size=512, moe_intermediate_size=512, q_lora_rank=512, vocab_size=4096)
    specs = expected_tensors(config)
    values = RandomValues(specs, seed=3, num_experts=config.n_routed_experts)
    return specs, values


def drawn(wide, name):
    specs, values = wide
    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8, "I64": torch.int64}
    dtypes |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}
    raw = bytearray(b"".join(values.draw(name)))
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtypes[specs[name].dtype]).view(specs[name].shape)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert_dtype": "fp8"},
        {"quantization_config": None},
        {"compress_ratios": [4, 4, 128, 0], "num_hash_layers": 3},
        {"num_nextn_predict_layers": 0},
        {"num_nextn_predict_layers": 2},
        {"rope_scaling": None, "hc_mult": 2},
    ],
    ids=str,
)
def test_reader_verifies_what_was_made(tmp_path, changes):
    with CheckpointReader.open(make_small(tmp_path / "out", **changes)) as reader:
        reader.verify()

        assert (reader.unexpected, reader.drafts) == ((), ())
        assert reader.num_tensors == len(reader.specs)


def test_same_seed_gives_the_same_values_whatever_the_shards(tmp_path):
    many = make_small(tmp_path / "many", max_shard_bytes=100_000)
    one = make_small(tmp_path / "one", max_shard_bytes=1 << 40)

    assert len(list(one.glob("*.safetensors"))) == 1
    assert len(list(many.glob("*.safetensors"))) > 5
    assert same_values(all_tensors(many), all_tensors(one))


def test_other_seed_gives_other_values(tmp_path):
    one, other = (all_tensors(make_small(tmp_path / str(seed), seed=seed)) for seed in (0, 1))

    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    assert not torch.equal(one["layers.0.ffn.experts.0.w1.weight"], one["layers.0.ffn.experts.1.w1.weight"])


def test_values_of_a_seed_are_these_for_ever():
    # whoever has published results with a seed must get the same weights from every version of this code
    config = small_config()
    values = RandomValues(expected_tensors(config), seed=0, num_experts=config.n_routed_experts)
    first = {
        name: b"".join(values.draw(name))[:6].hex()
        for name in ("layers.0.ffn.experts.0.w1.weight", "layers.0.attn.wkv.weight", "embed.weight")
    }

    assert first == PINNED


def test_random_words_are_the_raw_stream_of_the_bit_generator():
    # numpy promises the raw stream; the faster call used must be that stream
    generator = np.random.Generator(np.random.SFC64(5))

    assert np.array_equal(
        generator.integers(0, 1 << 64, size=64, dtype=np.uint64), np.random.SFC64(5).random_raw(64)
    )


def test_pieces_are_bounded(wide):
    specs, values = wide
    large = max(specs, key=lambda name: specs[name].num_bytes)

    pieces = [len(piece) for piece in values.draw(large)]

    assert sum(pieces) == specs[large].num_bytes > CHUNK_BYTES
    assert max(pieces) <= CHUNK_BYTES


@pytest.mark.parametrize(
    "name", ["layers.0.ffn.experts.0.w1", "layers.1.ffn.experts.3.w2", "mtp.0.ffn.experts.1.w3"]
)
def test_fp4_weights_have_all_codes_and_the_deviation_of_their_fan_in(wide, name):
    weight, scale = drawn(wide, f"{name}.weight"), drawn(wide, f"{name}.scale")
    nibbles = torch.cat([weight.view(torch.uint8).flatten() & 15, weight.view(torch.uint8).flatten() >> 4])
    values = dequantised(weight, scale)

    assert len(nibbles.unique()) == 16
    assert values.mean().abs() < 0.02 * values.std()
    assert values.std().item() == pytest.approx(1 / math.sqrt(values.shape[1]), rel=0.03)


def test_e8m0_scales_are_neighbouring_powers_of_two(wide):
    scale = drawn(wide, "layers.0.ffn.experts.0.w1.scale").view(torch.uint8)
    codes = scale.unique().tolist()

    assert len(codes) == 2
    assert codes[1] - codes[0] == 1


@pytest.mark.parametrize(
    "name", ["layers.0.attn.wq_b", "layers.1.attn.wo_b", "layers.0.ffn.shared_experts.w2"]
)
def test_fp8_weights_are_finite_with_the_deviation_of_their_fan_in(wide, name):
    weight, scale = drawn(wide, f"{name}.weight"), drawn(wide, f"{name}.scale")
    codes = weight.view(torch.uint8) & 0x7F
    values = dequantised(weight, scale)

    assert codes.max() < 0x7F
    assert len(codes.unique()) > 30
    # one of two scales per block of 128 x 128: with few blocks the deviation itself varies
    assert values.std().item() == pytest.approx(1 / math.sqrt(values.shape[1]), rel=0.35)
    assert values.mean().abs() < 0.02 * values.std()


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [
        ("embed.weight", 0.0, 1.0),
        ("head.weight", 0.0, 3 / math.sqrt(512)),
        ("layers.1.attn.compressor.wgate.weight", 0.0, 2 / math.sqrt(512)),
        ("layers.1.attn.compressor.wkv.weight", 0.0, 1 / math.sqrt(512)),
        ("layers.1.attn.indexer.weights_proj.weight", 0.0, 1 / math.sqrt(512)),
        ("layers.1.attn.compressor.ape", 0.0, 0.5),
        ("layers.0.hc_attn_fn", 0.0, 1.5 / math.sqrt(4 * 512)),
        ("layers.0.attn_norm.weight", 1.0, 0.2),
    ],
)
def test_unquantised_tensors_have_the_mean_and_deviation_of_their_role(wide, name, mean, deviation):
    values = drawn(wide, name).float()

    assert values.mean().item() == pytest.approx(mean, abs=0.2 * deviation)
    assert values.std().item() == pytest.approx(deviation, rel=0.1)


def test_norms_and_stream_scales_are_positive(wide):
    specs, _ = wide
    positive = [name for name, spec in specs.items() if spec.role in (Role.NORM, Role.HYPER_SCALE)]

    assert positive
    assert all(drawn(wide, name).min() > 0 for name in positive)


def test_token_experts_are_distinct_and_evenly_used():
    config = small_config(n_routed_experts=6, num_experts_per_tok=4, vocab_size=40_000)
    specs = expected_tensors(config)
    values = RandomValues(specs, seed=0, num_experts=6)
    name = next(name for name, spec in specs.items() if spec.role is Role.TOKEN_EXPERTS)

    ids = np.frombuffer(b"".join(values.draw(name)), dtype=np.int64).reshape(specs[name].shape)

    assert specs[name].num_bytes > CHUNK_BYTES
    assert all(len(set(row)) == 4 for row in ids[:1000].tolist())
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    assert np.allclose(np.bincount(ids.ravel(), minlength=6) / ids.size, 1 / 6, atol=0.01)


def test_tensors_of_a_shard_are_aligned_and_without_gaps(tmp_path):
    for shard in make_small(tmp_path / "out").glob("*.safetensors"):
        raw = shard.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        entries = sorted(entry["data_offsets"] for entry in read_header(shard).values())

        assert start % 8 == 0
        assert entries[0][0] == 0
        assert all(one[1] == other[0] for one, other in itertools.pairwise(entries))
        assert start + entries[-1][1] == len(raw)


def test_index_and_config_are_written(tmp_path):
    fields = small_fields(brand_new={"kept": True})
    directory = make_small(tmp_path / "out", brand_new={"kept": True})
    index = json.loads((directory / INDEX).read_text())
    specs = expected_tensors(parse_model_config(fields))

    assert list(index["weight_map"]) == list(specs)
    assert index["metadata"]["total_size"] == sum(spec.num_bytes for spec in specs.values())
    assert json.loads((directory / "config.json").read_text()) == fields


def test_draft_blocks_are_skipped_and_said_to_be(tmp_path):
    plan = plan_synthesis(small_fields(dspark_block_size=5))
    synthesize(tmp_path / "out", plan)

    assert plan.skips_drafts
    assert not [name for name in all_tensors(tmp_path / "out") if name.startswith("mtp.")]


def test_directory_that_holds_anything_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")

    with pytest.raises(CheckpointError, match="is not empty"):
        make_small(tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_empty_directory_is_filled(tmp_path):
    (tmp_path / "out").mkdir()

    assert (make_small(tmp_path / "out") / INDEX).exists()


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")

    with pytest.raises(CheckpointError, match="not a directory"):
        make_small(tmp_path / "out")


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ascend_v4.checkpoint.synthesize.os.fsync", fail)

    with pytest.raises(CheckpointError, match="No space left"):
        make_small(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_nothing_behind(tmp_path):
    def interrupt(num_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "out", plan_synthesis(small_fields()), on_bytes=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "ascend_v4.checkpoint.synthesize.shutil.disk_usage", lambda path: usage._replace(free=1000)
    )

    with pytest.raises(CheckpointError, match="1000 free"):
        make_small(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_byte(tmp_path):
    pieces: list[int] = []
    plan = plan_synthesis(small_fields(), tokenizer=TokenizerChoice.BYTES)
    synthesize(tmp_path / "out", plan, on_bytes=pieces.append)

    assert sum(pieces) == plan.num_bytes


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_field_that_json_cannot_spell_is_refused(value):
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        plan_synthesis(small_fields(extra=value))
