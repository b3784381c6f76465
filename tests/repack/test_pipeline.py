"""Whole repacks of a small checkpoint: what the numbers become, and what the files hold."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from ascend_v4.errors import CheckpointError
from ascend_v4.repack.layouts import LayoutName, Ranks
from ascend_v4.repack.manifest import read_manifest
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import RoundingChoice, Target
from ascend_v4.repack.report import report_lines
from tests.repack.packs import (
    array,
    bf16_numbers,
    config_of,
    fp4_numbers,
    fp8_numbers,
    int4_numbers,
    int8_numbers,
    repacked,
    stored_tensors,
    tree,
)
from tests.unit.checkpoints import edit_weight_map, make_small, read_header, shard_of, write_header

EXPERT = "layers.1.ffn.experts.2.w2"
LINEAR = "layers.1.attn.wq_b"


def test_every_int8_expert_row_holds_the_sources_real_numbers(source, tmp_path):
    repacked(source, tmp_path / "out")
    was, now = stored_tensors(source), stored_tensors(tmp_path / "out")
    experts = [
        name.removesuffix(".weight") for name in was if ".experts." in name and name.endswith(".weight")
    ]
    assert experts
    for name in experts:
        wanted = fp4_numbers(was[f"{name}.weight"], was[f"{name}.scale"])
        got = int8_numbers(now[f"{name}.weight"], now[f"{name}.weight_scale"])
        np.testing.assert_array_equal(got, wanted)


def test_bf16_output_equals_the_source_exactly(source, tmp_path):
    repacked(source, tmp_path / "out", Target.BF16)
    was, now = stored_tensors(source), stored_tensors(tmp_path / "out")
    np.testing.assert_array_equal(
        bf16_numbers(now[f"{EXPERT}.weight"]), fp4_numbers(was[f"{EXPERT}.weight"], was[f"{EXPERT}.scale"])
    )
    np.testing.assert_array_equal(
        bf16_numbers(now[f"{LINEAR}.weight"]), fp8_numbers(was[f"{LINEAR}.weight"], was[f"{LINEAR}.scale"])
    )


def test_int8_linears_are_off_by_half_a_step_at_most(source, tmp_path):
    repacked(source, tmp_path / "out")
    was, now = stored_tensors(source), stored_tensors(tmp_path / "out")
    wanted = fp8_numbers(was[f"{LINEAR}.weight"], was[f"{LINEAR}.scale"])
    got = int8_numbers(now[f"{LINEAR}.weight"], now[f"{LINEAR}.weight_scale"])
    step = np.abs(wanted).max(axis=1, keepdims=True) / 127
    assert (np.abs(got - wanted) <= step * 0.5001).all()
    assert (got != wanted).any()


def test_report_counts_what_a_decoder_counts(source, tmp_path):
    report = repacked(source, tmp_path / "out", Target.W4A8)
    was, now = stored_tensors(source), stored_tensors(tmp_path / "out")
    wanted = fp4_numbers(was[f"{EXPERT}.weight"], was[f"{EXPERT}.scale"])
    got = int4_numbers(now[f"{EXPERT}.weight"], now[f"{EXPERT}.weight_scale"])
    said = report.manifest.tensors[f"{EXPERT}.weight"]
    assert said["changed_weights"] == (got != wanted).sum()
    assert said["exact_rows"] == (got == wanted).all(axis=1).sum()
    error = np.sqrt(((got - wanted) ** 2).sum() / (wanted**2).sum())
    assert said["relative_error"] == pytest.approx(error, rel=1e-12)
    assert said["relative_error"] <= said["absmax_relative_error"]


def test_mx_repeats_the_block_scale_and_keeps_every_code(source, tmp_path):
    repacked(source, tmp_path / "out", Target.MX)
    was, now = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert now[f"{LINEAR}.weight"] == was[f"{LINEAR}.weight"]
    rows, columns = was[f"{LINEAR}.weight"][1]
    blocks = array(was[f"{LINEAR}.scale"], np.uint8)
    wanted = np.repeat(np.repeat(blocks, 128, axis=0)[:rows], 4, axis=1)[:, : columns // 32]
    np.testing.assert_array_equal(array(now[f"{LINEAR}.scale"], np.uint8), wanted)


@pytest.mark.parametrize(
    ("target", "options"),
    [(Target.W8A8, {"reversible": True}), (Target.BF16, {"reversible": True}), (Target.MX, {})],
    ids=["w8a8", "bf16", "mx"],
)
def test_release_gives_back_the_identical_bytes(source, tmp_path, target, options):
    repacked(source, tmp_path / "pack", target, **options)
    repacked(tmp_path / "pack", tmp_path / "back", Target.RELEASE)
    assert stored_tensors(tmp_path / "back") == stored_tensors(source)


def test_modelslim_pack_goes_back_to_the_numbers_of_its_experts(source, tmp_path):
    repacked(source, tmp_path / "pack", layout=LayoutName.MODELSLIM)
    repacked(tmp_path / "pack", tmp_path / "back", Target.RELEASE)
    was, now = stored_tensors(source), stored_tensors(tmp_path / "back")
    np.testing.assert_array_equal(
        fp4_numbers(now[f"{EXPERT}.weight"], now[f"{EXPERT}.scale"]),
        fp4_numbers(was[f"{EXPERT}.weight"], was[f"{EXPERT}.scale"]),
    )


def test_release_of_a_plain_pack_gives_back_the_numbers_and_names_what_stays_rounded(source, tmp_path):
    repacked(source, tmp_path / "pack")
    report = repacked(tmp_path / "pack", tmp_path / "back", Target.RELEASE)
    was, now = stored_tensors(source), stored_tensors(tmp_path / "back")
    np.testing.assert_array_equal(
        fp4_numbers(now[f"{EXPERT}.weight"], now[f"{EXPERT}.scale"]),
        fp4_numbers(was[f"{EXPERT}.weight"], was[f"{EXPERT}.scale"]),
    )
    assert f"{LINEAR}.weight" in report.manifest.totals["kept_rounded"]
    assert any("stay rounded" in line for line in report_lines(report.manifest.totals))


def test_numbers_that_absmax_changed_are_not_called_the_release(source, tmp_path):
    repacked(source, tmp_path / "pack", rounding=RoundingChoice.ABSMAX)
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.experts\.0\.w1\.weight.*Repack the official"):
        repacked(tmp_path / "pack", tmp_path / "back", Target.RELEASE)


def test_modelslim_offsets_are_zeros(source, tmp_path):
    repacked(source, tmp_path / "out", layout=LayoutName.MODELSLIM)
    offsets = [
        entry for name, entry in stored_tensors(tmp_path / "out").items() if name.endswith("weight_offset")
    ]
    assert offsets
    assert not any(any(content) for _, _, content in offsets)


@pytest.mark.parametrize("ranks", [Ranks(tp=2, ep=4), Ranks(tp=2, ep=2)], ids=str)
def test_slices_of_all_ranks_make_the_whole_tensors(source, tmp_path, ranks):
    repacked(source, tmp_path / "whole")
    repacked(source, tmp_path / "ranks", ranks=ranks)
    whole = stored_tensors(tmp_path / "whole")
    each = [stored_tensors(tmp_path / "ranks" / f"rank-{rank:03d}") for rank in range(ranks.ep)]
    seen = {name for tensors in each for name in tensors}
    assert seen == set(whole)
    for name, (dtype, shape, content) in whole.items():
        holders = [tensors[name] for tensors in each[: ranks.tp] if name in tensors]
        if ".experts." in name:
            holders = [tensors[name] for tensors in each if name in tensors][:1]
        if holders[0][1] == shape:
            assert all(holder == (dtype, shape, content) for holder in holders), name
            continue
        axis = next(index for index, extent in enumerate(shape) if extent != holders[0][1][index])
        pieces = [np.frombuffer(raw, np.uint8).reshape(*cut[:1], -1) for _, cut, raw in holders]
        assert np.concatenate(pieces, axis=axis).tobytes() == content, name


def test_unknown_tensors_pass_through_and_are_listed(tmp_path):
    source = make_small(tmp_path / "source")
    shard = shard_of(source, "norm.weight")
    header = read_header(shard)
    end = max(entry["data_offsets"][1] for entry in header.values())
    extra = bytes(range(24))
    write_header(
        shard, header | {"vision.patch": {"dtype": "F32", "shape": [2, 3], "data_offsets": [end, end + 24]}}
    )
    shard.write_bytes(shard.read_bytes() + extra)
    edit_weight_map(source, lambda placed: placed.update({"vision.patch": shard.name}))
    report = repacked(source, tmp_path / "out")
    assert stored_tensors(tmp_path / "out")["vision.patch"] == ("F32", (2, 3), extra)
    assert report.manifest.totals["passed_through"] == ["vision.patch"]


def test_output_does_not_depend_on_threads_or_time(source, tmp_path):
    repacked(source, tmp_path / "one", jobs=1)
    repacked(source, tmp_path / "many", jobs=5)
    assert tree(tmp_path / "one") == tree(tmp_path / "many")


def test_workers_share_torchs_threads_and_give_them_back(source, tmp_path):
    seen, before = set(), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        config = config_of(source, tmp_path / "out", jobs=2)
        run_repack(config, on_bytes=lambda num_bytes: seen.add(torch.get_num_threads()))
        with ThreadPoolExecutor(1) as later:
            assert (seen, later.submit(torch.get_num_threads).result()) == ({2}, 4)
    finally:
        torch.set_num_threads(before)


def test_finished_output_has_nothing_of_the_run_in_it(source, tmp_path):
    repacked(source, tmp_path / "out")
    names = set(tree(tmp_path / "out"))
    assert {name for name in names if not name.endswith(".safetensors")} == {
        "ascend_v4.json",
        "config.json",
        "manifest.json",
        "model.safetensors.index.json",
    }
    assert names - {"manifest.json"} == set(read_manifest(tmp_path / "out").files)


def test_tokenizer_and_generation_settings_are_taken_over(source, tmp_path):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    (copy / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    repacked(copy, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'


def test_keep_leaves_a_weight_in_bf16(source, tmp_path):
    repacked(source, tmp_path / "out", keep=(f"{LINEAR}.weight",))
    assert stored_tensors(tmp_path / "out")[f"{LINEAR}.weight"][0] == "BF16"


def test_the_share_of_one_rank_is_no_source(source, tmp_path):
    repacked(source, tmp_path / "ranks", ranks=Ranks(tp=1, ep=2))
    with pytest.raises(CheckpointError, match="share of a single rank"):
        repacked(tmp_path / "ranks" / "rank-000", tmp_path / "out", Target.RELEASE)


def test_table_says_copied_or_counts_per_part_of_the_model(source, tmp_path):
    report = repacked(source, tmp_path / "out")
    lines = report_lines(report.manifest.totals)
    (experts,) = [line for line in lines if line.startswith("experts")]
    assert experts.split()[1:6] == ["fp4_group", "int8_channel", "48", "4,096", "100%"]
    assert any(line.startswith("embed") and line.endswith("copied") for line in lines)


def test_summary_is_json_and_counts_this_runs_bytes(source, tmp_path):
    report = repacked(source, tmp_path / "out")
    summary = json.loads(json.dumps(report.summary(), allow_nan=False))
    parts = [path.stat().st_size for path in Path(tmp_path / "out").glob("*.safetensors")]
    assert summary["bytes"] == summary["written_bytes"] == sum(parts)
    assert summary["parts"] == len(parts)
    assert summary["operators"]["fp4_to_int8"] in ("native", "reference")
