"""`native` rounds where the release rounds, `exact` nowhere; neither reaches into the other."""

from __future__ import annotations

import pytest
import torch

from ascend_v4.cache.layout import CacheRole
from ascend_v4.engine.protocol import Chunk
from ascend_v4.errors import ConfigError
from ascend_v4.model.load import load_model
from ascend_v4.operators.contracts.quantize import FP4_GROUP, KV_GROUP, fake_quantize_fp4, fake_quantize_fp8
from tests.model.builders import all_rows, make_model, make_runner, token_ids

TOKENS = 260
ODD_SHAPES: dict[str, dict] = {
    "one head": {"num_attention_heads": 1, "o_groups": 1},
    "six heads in three groups, narrow ranks": {
        "num_attention_heads": 6,
        "o_groups": 3,
        "o_lora_rank": 48,
        "q_lora_rank": 96,
    },
    "head of 192": {"head_dim": 192, "num_attention_heads": 2},
    "smallest rope": {"head_dim": 66, "qk_rope_head_dim": 2, "index_head_dim": 32},
    "widths off the FP8 block": {"hidden_size": 160, "moe_intermediate_size": 96, "vocab_size": 300},
    "one stream": {"hc_mult": 1},
    "eight streams": {"hc_mult": 8},
    "one entry chosen": {"index_topk": 1},
    "one expert": {"n_routed_experts": 1, "num_experts_per_tok": 1},
    "every expert chosen": {"n_routed_experts": 4, "num_experts_per_tok": 4},
    "all layers hash": {"num_hash_layers": 4},
    "FP8 experts": {"expert_dtype": "fp8", "moe_intermediate_size": 160},
    "bfloat16 weights": {"quantization_config": None},
}


def cached_rows(runner, kind: str) -> torch.Tensor:
    """Rows that a sequence of TOKENS wrote into the caches of one kind, all layers together."""
    rows = []
    for caches in runner.loaded.model.caches:
        spec = getattr(caches, kind)
        if spec is not None:
            flat = runner._tensors[spec].flatten(0, 1)
            rows.append(flat[flat.abs().sum(1) > 0])
    return torch.cat(rows)


@pytest.fixture
def filled(checkpoint):
    """A runner by numerics, with a sequence of TOKENS in its caches."""

    def fill(numerics: str):
        runner = make_runner(checkpoint, numerics=numerics)
        runner.streams(Chunk(runner.open_sequence(TOKENS), token_ids(TOKENS, seed=1)))
        return runner

    return fill


@pytest.mark.parametrize(("numerics", "dtype"), [("native", torch.bfloat16), ("exact", torch.float32)])
def test_streams_and_caches_have_the_dtype_of_the_numerics(checkpoint, numerics, dtype):
    runner = make_runner(checkpoint, numerics=numerics, mtp=True)
    sequence, ids = runner.open_sequence(TOKENS), token_ids(TOKENS, seed=1)
    streams = runner.streams(Chunk(sequence, ids))
    assert streams.dtype is dtype
    caches = [spec for layer in runner.loaded.model.caches for spec in layer.specs()]
    assert {runner._tensors[spec].dtype for spec in caches if spec.role is not CacheRole.STATE} == {dtype}
    assert {runner._tensors[spec].dtype for spec in caches if spec.role is CacheRole.STATE} == {torch.float32}
    # logits are float32 whatever the streams are
    assert runner.logits(streams).dtype is torch.float32
    assert runner.forward([Chunk(runner.open_sequence(1), ids[:1])]).dtype is torch.float32
    assert runner.mtp_logits(sequence, streams[:1], ids[1:2]).dtype is torch.float32


@pytest.mark.parametrize("kind", ["window", "entries"])
def test_native_caches_hold_fp8_numbers_beside_untouched_rope_channels(filled, kind):
    nope_dim = 64
    rows = cached_rows(filled("native"), kind)
    nope, rope = rows[:, :nope_dim].contiguous(), rows[:, nope_dim:].contiguous()
    assert torch.equal(fake_quantize_fp8.reference(nope, group=KV_GROUP), nope)
    assert not torch.equal(fake_quantize_fp8.reference(rope, group=KV_GROUP), rope)


def test_native_index_keys_are_fp4_numbers(filled):
    keys = cached_rows(filled("native"), "index_keys")
    assert torch.equal(fake_quantize_fp4.reference(keys, group=FP4_GROUP), keys)


def test_exact_caches_are_not_rounded_at_all(filled):
    runner = filled("exact")
    for kind in ("window", "entries", "index_keys"):
        rows = cached_rows(runner, kind)
        # most float32 numbers are not bfloat16 numbers, and all FP8 and FP4 numbers are
        changed = (rows.bfloat16().float() != rows).double().mean().item()
        assert changed > 0.95, kind


def test_auto_is_native_for_a_release_checkpoint(checkpoint):
    ids = token_ids(140, seed=2)
    auto, native = (make_runner(checkpoint, numerics=name) for name in ("auto", "native"))
    assert auto.loaded.numerics.name == "native"
    assert torch.equal(all_rows(auto, ids), all_rows(native, ids))


def test_runners_of_both_numerics_do_not_disturb_each_other(checkpoint):
    ids = token_ids(140, seed=2)
    exact = make_runner(checkpoint)
    alone = all_rows(exact, ids)
    native = make_runner(checkpoint, numerics="native")
    rounded = all_rows(native, ids)
    assert torch.equal(all_rows(exact, ids), alone)
    assert not torch.equal(rounded, alone)


def test_float32_copies_do_not_change_native_logits(checkpoint, monkeypatch):
    ids = token_ids(140, seed=2)
    copied = all_rows(make_runner(checkpoint, numerics="native"), ids)
    monkeypatch.setattr("ascend_v4.model.load.UNPACK_BYTES", 0)
    mapped = all_rows(make_runner(checkpoint, numerics="native"), ids)
    cosine = torch.cosine_similarity(copied, mapped).mean().item()
    assert cosine >= 0.97


@pytest.mark.parametrize("changes", ODD_SHAPES.values(), ids=ODD_SHAPES.keys())
def test_native_runs_odd_shapes_near_their_exact_logits(tmp_path, changes):
    checkpoint = make_model(tmp_path / "model", **changes)
    exact = make_runner(checkpoint)
    native = make_runner(checkpoint, numerics="native", mtp=True)
    ids = token_ids(TOKENS, seed=1, vocab_size=exact.vocab_size)
    sequence = native.open_sequence(TOKENS)
    streams = native.streams(Chunk(sequence, ids))
    mtp_rows = native.mtp_logits(sequence, streams[:-1], ids[1:])
    assert mtp_rows.isfinite().all()
    cosine = torch.cosine_similarity(native.logits(streams), all_rows(exact, ids)).mean().item()
    # routing and top-k flip on single roundings and carry on: this guards against the gross
    assert cosine >= 0.95


def test_unknown_numerics_are_refused(checkpoint):
    with pytest.raises(ConfigError, match="numerics 'fast' is unknown; choose one of auto, native, exact"):
        load_model(checkpoint, numerics="fast")


def test_an_unknown_device_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="device 'tpu' is unknown; choose one of cpu, cuda, npu, sim"):
        load_model(checkpoint, device="tpu")
