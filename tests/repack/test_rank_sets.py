"""Packs divided over ranks are read whole: described slices are joined, and what does not fit is named."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file

from ascend_v4.checkpoint.describe import examine
from ascend_v4.checkpoint.pack import MAX_RANKS, find_pack
from ascend_v4.checkpoint.rank_sets import scan_pack
from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.engine.quantize import quantized_source
from ascend_v4.errors import CheckpointError
from ascend_v4.repack.job import plan_job
from ascend_v4.repack.layouts import Ranks
from ascend_v4.repack.layouts import ranks as rank_layout
from ascend_v4.repack.recipes import Target
from tests.model.builders import make_model, token_ids, write_prompts
from tests.repack.packs import config_of, repacked, stored_tensors
from tests.unit.checkpoints import edit_entry, edit_weight_map, make_small, shard_of, small_config

TARGETS = ("w8a8", "w4a8", "mx", "bf16")
RANKS = (Ranks(tp=1, ep=2), Ranks(tp=2, ep=2), Ranks(tp=2, ep=4), Ranks(tp=4, ep=4))
PACK = "ascend_v4.json"
ROWS, COLUMNS, EXPERT = "embed.weight", "layers.0.attn.wo_b.weight", "layers.1.ffn.experts.2.w2.weight"


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """The small checkpoint with output groups for four tensor ranks."""
    return make_small(tmp_path_factory.mktemp("official") / "checkpoint", o_groups=4)


@pytest.fixture(scope="module")
def divided(official, tmp_path_factory) -> Path:
    """A w8a8 pack over two tensor and four expert ranks: every slice is on two ranks, every expert on one."""
    output = tmp_path_factory.mktemp("divided") / "pack"
    repacked(official, output, ranks=Ranks(tp=2, ep=4))
    return output


@pytest.fixture
def copy(divided, tmp_path) -> Path:
    """One to damage."""
    return Path(shutil.copytree(divided, tmp_path / "pack"))


@pytest.fixture
def one_thread():
    """Layers this small gain nothing from threads, and lose much to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def edit(directory: Path, change: Callable[[dict], object]) -> Path:
    """Apply a change to a description in place."""
    described = json.loads((directory / PACK).read_text())
    change(described)
    (directory / PACK).write_text(json.dumps(described))
    return directory


def refusal(directory: Path) -> str:
    """What opening and verifying says; it must say it."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader.open(directory).verify()
    return str(caught.value)


@pytest.mark.parametrize("target", TARGETS)
def test_joined_tensors_are_those_of_the_undivided_pack(official, tmp_path, target):
    options = {"reversible": target != "w4a8"}
    repacked(official, tmp_path / "whole", Target(target), **options)
    wanted = stored_tensors(tmp_path / "whole")
    for ranks in RANKS:
        output = tmp_path / f"{ranks.tp}-{ranks.ep}"
        repacked(official, output, Target(target), ranks=ranks, **options)
        with CheckpointReader.open(output) as reader:
            reader.verify()
            got = {
                name: (
                    reader.dtype(name),
                    reader.stored(name).shape,
                    reader.raw_bytes(name).numpy().tobytes(),
                )
                for name in wanted
            }
            assert reader.num_tensors == len(wanted)
            assert reader.unexpected == ()
        assert got == wanted, ranks


@pytest.mark.parametrize("target", TARGETS)
def test_scores_are_those_of_the_undivided_pack(run_cli, tmp_path, one_thread, target):
    source = make_model(tmp_path / "official", num_hidden_layers=3, compress_ratios=[0, 4, 128, 0])
    prompts = write_prompts(tmp_path / "in.json", (token_ids(40, seed=1), token_ids(2, seed=2)))
    scores = {}
    for name, flags in (("whole", ()), ("ranks", ("--ranks", "tp=2,ep=6"))):
        assert run_cli("repack", source, tmp_path / name, "--to", target, *flags).exit_code == 0
        result = run_cli("score", tmp_path / name, "--input", prompts, "--output", tmp_path / f"{name}.st")
        assert result.exit_code == 0, result.stderr
        scores[name] = load_file(tmp_path / f"{name}.st")
    assert scores["ranks"].keys() == scores["whole"].keys()
    assert all(torch.equal(rows, scores["whole"][name]) for name, rows in scores["ranks"].items())


@pytest.mark.parametrize(
    ("target", "options"), [("w8a8", {"reversible": True}), ("mx", {}), ("bf16", {"reversible": True})]
)
def test_release_gives_back_the_identical_bytes(official, tmp_path, target, options):
    repacked(official, tmp_path / "pack", Target(target), ranks=Ranks(tp=2, ep=4), **options)
    repacked(tmp_path / "pack", tmp_path / "back", Target.RELEASE)
    assert stored_tensors(tmp_path / "back") == stored_tensors(official)


def test_release_of_rank_sets_may_be_a_rank_set(official, tmp_path):
    repacked(official, tmp_path / "pack", Target.MX, ranks=Ranks(tp=2, ep=4))
    repacked(official, tmp_path / "wanted", Target.RELEASE, ranks=Ranks(tp=4, ep=4))
    repacked(tmp_path / "pack", tmp_path / "back", Target.RELEASE, ranks=Ranks(tp=4, ep=4))
    for rank in range(4):
        folder = f"rank-{rank:03d}"
        assert stored_tensors(tmp_path / "back" / folder) == stored_tensors(tmp_path / "wanted" / folder)


def test_a_slice_that_changes_under_a_repack_stops_it(copy, tmp_path):
    job = plan_job(config_of(copy, tmp_path / "out", Target.RELEASE))
    (shard,) = {copy / place.file for place in job.stored._reader.stored(ROWS).slices[1:]}
    os.utime(shard, ns=(0, 0))
    with pytest.raises(CheckpointError, match=r"rank-001.* changed while it was read"):
        job.stored.require_unchanged([ROWS])


def test_a_kept_pack_is_recognised_as_made_of_a_rank_set(divided, tmp_path):
    kept = quantized_source(divided, "w8a8", cache_dir=tmp_path)
    assert quantized_source(divided, "w8a8", cache_dir=tmp_path) == kept == tmp_path / "pack-w8a8"


def test_inspect_describes_the_whole(official, divided, tmp_path, run_cli):
    repacked(official, tmp_path / "whole")
    got, want = examine(divided).summary, examine(tmp_path / "whole").summary
    assert got["pack"] == {**want["pack"], "ranks": {"tp": 2, "ep": 4}}
    same = ("tensors", "bytes", "dtype_bytes", "parameters", "missing", "unexpected", "quantization")
    assert {key: got[key] for key in same} == {key: want[key] for key in same}
    assert set(got["shards"]) == {
        path.relative_to(divided).as_posix() for path in divided.rglob("*.safetensors")
    }
    assert run_cli("inspect", divided).exit_code == 0


def test_what_one_rank_holds_whole_is_mapped_and_what_is_joined_is_a_copy(divided):
    reader = CheckpointReader.open(divided)
    assert reader.tensor(EXPERT).data_ptr() == reader.tensor(EXPERT).data_ptr()
    first, second = reader.tensor(COLUMNS), reader.tensor(COLUMNS)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


def test_rows_of_several_ranks_are_read_one_after_another_without_a_copy(divided):
    reader = CheckpointReader.open(divided)
    runs = reader.byte_runs(ROWS)
    assert [run.data_ptr() for run in runs] == [run.data_ptr() for run in reader.byte_runs(ROWS)]
    assert torch.equal(torch.cat(runs), reader.raw_bytes(ROWS))
    assert len(reader.byte_runs(COLUMNS)) == 1


def test_copies_are_read_from_the_lowest_rank(divided):
    reader = CheckpointReader.open(divided)
    assert reader.stored("norm.weight").file.startswith("rank-000/")
    assert [place.file[:8] for place in reader.stored(ROWS).slices] == ["rank-000", "rank-001"]


class Cut(NamedTuple):
    """One weight as ranks may share it out, of forms and axes that recipes have or may come to have."""

    form: str
    of: tuple[int, int]
    axis: int
    edges: list[tuple[int, int]]
    tensors: dict[str, tuple[tuple[int, int], int | None]]
    """Suffix -> stored shape, and numbers along the axis behind one element; None where it is not cut."""


CUTS = {
    "int4 rows": Cut(
        "int4_channel",
        (6, 5),
        0,
        [(0, 2), (2, 6)],
        {"weight": ((3, 5), 2), "weight_scale": ((6, 1), 1), "weight_bias": ((6, 16), 1)},
    ),
    "int4 columns": Cut(
        "int4_channel", (6, 5), 1, [(0, 4), (4, 5)], {"weight": ((3, 5), 1), "weight_scale": ((6, 1), None)}
    ),
    "fp4 rows": Cut(
        "fp4_group", (4, 64), 0, [(0, 1), (1, 4)], {"weight": ((4, 32), 1), "scale": ((4, 2), 1)}
    ),
    "fp4 columns": Cut(
        "fp4_group", (4, 96), 1, [(0, 64), (64, 96)], {"weight": ((4, 48), 2), "scale": ((4, 3), 32)}
    ),
    "fp8 rows": Cut(
        "fp8_block", (300, 2), 0, [(0, 256), (256, 300)], {"weight": ((300, 2), 1), "scale": ((3, 1), 128)}
    ),
    "fp8 columns": Cut(
        "fp8_block", (2, 200), 1, [(0, 128), (128, 200)], {"weight": ((2, 200), 1), "scale": ((1, 2), 128)}
    ),
    "ranks in another order": Cut(
        "mxfp8", (4, 32), 0, [(3, 4), (0, 3)], {"weight": ((4, 32), 1), "scale": ((4, 1), 1)}
    ),
    "mx columns": Cut(
        "mxfp8", (3, 96), 1, [(0, 32), (32, 64), (64, 96)], {"weight": ((3, 96), 1), "scale": ((3, 3), 32)}
    ),
    "zeros rows": Cut(
        "int8_channel", (4, 32), 0, [(0, 3), (3, 4)], {"weight": ((4, 32), 1), "negative_zeros": ((4, 4), 1)}
    ),
    "zeros columns": Cut(
        "int8_channel", (4, 20), 1, [(0, 8), (8, 20)], {"weight": ((4, 20), 1), "negative_zeros": ((4, 3), 8)}
    ),
    "kept groups": Cut(
        "int8_channel",
        (4, 64),
        1,
        [(0, 32), (32, 64)],
        {"weight": ((4, 64), 1), "release_scale": ((4, 2), 32)},
    ),
    "kept blocks": Cut(
        "plain",
        (3, 256),
        1,
        [(0, 128), (128, 256)],
        {"weight": ((3, 256), 1), "release_scale": ((1, 2), 128)},
    ),
    "kept codes": Cut(
        "int8_channel", (4, 6), 1, [(0, 2), (2, 6)], {"weight": ((4, 6), 1), "release_weight": ((4, 6), 1)}
    ),
}


def write_cut(directory: Path, cut: Cut) -> dict[str, np.ndarray]:
    """A rank set of one weight, `a.weight`, cut by numpy; returns the whole tensors, random bytes."""
    wholes = {
        f"a.{suffix}": np.random.randint(0, 256, shape).astype(np.uint8)
        for suffix, (shape, _) in cut.tensors.items()
    }
    shared = {"format": "ascend_v4", "version": 1, "scheme": "mx", "rotation": "none"}
    tensors = {"a.weight": {"format": cut.form}}
    folders = [f"share {rank}" for rank in range(len(cut.edges))]
    counts = {"tp": len(folders), "ep": len(folders)}
    for rank, (first, stop) in enumerate(cut.edges):
        kept = {}
        for name, whole in wholes.items():
            unit = cut.tensors[name.removeprefix("a.")][1]
            chosen = range(whole.shape[cut.axis]) if unit is None else range(first // unit, -(-stop // unit))
            kept[name] = np.take(whole, chosen, axis=cut.axis)
        place = directory / folders[rank]
        place.mkdir()
        save_file(kept, place / "model.safetensors")
        slices = {"a.weight": {"axis": cut.axis, "range": [first, stop], "of": list(cut.of)}}
        own = {"rank": {"index": rank, **counts}, "slices": slices, "tensors": tensors}
        (place / PACK).write_text(json.dumps(shared | own))
    ranks = {**counts, "folders": folders}
    (directory / PACK).write_text(json.dumps({**shared, "ranks": ranks, "tensors": tensors}))
    (directory / "manifest.json").write_text("{}")
    return wholes


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_every_form_is_joined_in_its_own_units(tmp_path, cut):
    wholes = write_cut(tmp_path, cut)
    files = scan_pack(tmp_path, find_pack(tmp_path))
    assert files.problems == ()
    reader = CheckpointReader(tmp_path, small_config(), files)
    for name, whole in wholes.items():
        np.testing.assert_array_equal(reader.tensor(name).numpy(), whole, err_msg=name)


def test_released_slices_read_the_same_again(tmp_path):
    edges = [(0, 512), (512, 1024)]
    (whole,) = write_cut(
        tmp_path, Cut("plain", (1024, 2048), 0, edges, {"weight": ((1024, 2048), 1)})
    ).values()
    reader = CheckpointReader(tmp_path, small_config(), scan_pack(tmp_path, find_pack(tmp_path)))
    for run in reader.byte_runs("a.weight"):
        run.fill_(1)
    reader.release("a.weight")
    differing = (reader.tensor("a.weight").numpy() != whole).sum()
    # whole pages only: the edges of each slice keep what was written
    assert differing < 4 * mmap.PAGESIZE < whole.size / 4


def test_a_slice_through_a_packed_pair_is_no_slice(tmp_path):
    write_cut(tmp_path, Cut("int4_channel", (8, 2), 0, [(0, 3), (3, 8)], {"weight": ((4, 2), 2)}))
    (problem,) = scan_pack(tmp_path, find_pack(tmp_path)).problems
    assert problem.kind == "slice misfit"
    assert "[0, 3) cuts through it" in problem.detail


def test_an_empty_tensor_in_slices_is_empty(tmp_path):
    write_cut(tmp_path, Cut("int8_channel", (0, 4), 1, [(0, 2), (2, 4)], {"weight": ((0, 4), 1)}))
    reader = CheckpointReader(tmp_path, small_config(), scan_pack(tmp_path, find_pack(tmp_path)))
    assert reader.tensor("a.weight").shape == (0, 4)


@pytest.mark.parametrize("rank", [0, 3])
def test_the_folder_of_a_single_rank_names_the_one_of_all(divided, run_cli, tmp_path, rank):
    folder = divided / f"rank-{rank:03d}"
    assert f"Name the folder that holds those of all ranks ({divided})" in refusal(folder)
    prompts = write_prompts(tmp_path / "in.json", ([1], []))
    result = run_cli("score", folder, "--input", prompts, "--output", tmp_path / "out.st")
    assert result.exit_code == 2
    assert "share of a single rank" in " ".join(result.stderr.split())


def test_a_share_with_a_manifest_is_still_a_share(copy):
    shutil.copy(copy / "manifest.json", copy / "rank-001" / "manifest.json")
    assert "share of a single rank" in refusal(copy / "rank-001")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tp": 0}, "tp=0"),
        ({"tp": True}, "tp=True"),
        ({"tp": "2"}, "tp='2'"),
        ({"ep": MAX_RANKS + 1}, "[1, 1024]"),
        ({"ep": None}, "ep=None"),
        ({"ep": 3}, "for 3 ranks"),
        ({"folders": "rank"}, "one name for each"),
        ({"folders": ["rank-000"] * 4}, "one folder for several"),
        *[
            ({"folders": ["rank-000", "rank-001", "rank-002", bad]}, "directly below it")
            for bad in ("../rank-003", "/rank-003", "rank-003/.", "..", ".", "", "a\\b", "a\0", "x" * 256, 3)
        ],
    ],
    ids=str,
)
def test_ranks_that_cannot_be_are_refused(copy, change, said):
    assert said in refusal(edit(copy, lambda described: described["ranks"].update(change)))


def test_ranks_that_are_no_object_are_refused(copy):
    assert "tp=None" in refusal(edit(copy, lambda described: described.update(ranks=[2, 4])))


BAD_SLICES: tuple[dict[str, object], ...] = (
    {"axis": 2},
    {"axis": -1},
    {"axis": False},
    {"of": []},
    {"of": [1 << 60, 64]},
    {"of": [512.0, 64]},
    {"range": [0, 513]},
    {"range": [256, 256]},
    {"range": [-1, 256]},
    {"range": [0]},
    {"range": [0, True]},
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(scheme="bf16"), "scheme 'bf16'"),
        (lambda d: d.update(recipe="cann"), "recipe 'cann'"),
        (lambda d: d.update(source={}), "source {}"),
        (lambda d: d.pop("rounding"), "rounding None"),
        (lambda d: d.update(extra=1), "extra 1"),
        (lambda d: d.pop("rank"), "index None"),
        (lambda d: d["rank"].update(index=1), "index 1, not 2"),
        (lambda d: d["rank"].update(ep=8), "ep 8, not 4"),
        (lambda d: d.pop("tensors"), "lists no tensors"),
        (lambda d: d["tensors"].update({ROWS: {"format": "mxfp8"}}), "'mxfp8'"),
        (lambda d: d["tensors"].update({"other": {"format": "plain"}}), "no such tensor"),
        (lambda d: d.pop("slices"), "which slices"),
        (lambda d: d["slices"].update({"norm.weigh": d["slices"][ROWS]}), "norm.weigh"),
        (lambda d: d["slices"].update({ROWS: [0, 1]}), ROWS),
        *[(bad, "two rising integers") for bad in BAD_SLICES],
    ],
)
def test_a_description_that_is_none_of_this_packs_is_refused(copy, change, said):
    apply = change if callable(change) else lambda described: described["slices"][ROWS].update(change)
    edit(copy / "rank-002", apply)
    message = refusal(copy)
    assert said in message
    assert f"rank-002/{PACK}" in message
    assert "\n" not in message


def test_folders_that_were_swapped_are_noticed(copy):
    (copy / "rank-000").rename(copy / "kept")
    (copy / "rank-001").rename(copy / "rank-000")
    (copy / "kept").rename(copy / "rank-001")
    assert "of a rank with index 1, not 0" in refusal(copy)


@pytest.mark.parametrize(
    ("remove", "said"),
    [
        (lambda copy: shutil.rmtree(copy / "rank-003"), "rank-003 is not there"),
        (lambda copy: (copy / "rank-003" / PACK).unlink(), f"rank-003/{PACK}"),
        (lambda copy: [p.unlink() for p in (copy / "rank-003").glob("model*")], "neither"),
        (lambda copy: (copy / "manifest.json").unlink(), "unfinished"),
    ],
    ids=["folder", "description", "shards", "manifest"],
)
def test_what_is_missing_is_named(copy, remove, said):
    remove(copy)
    assert said in refusal(copy)


def cut_short(copy: Path, *, rank: int = 1) -> None:
    shard = shard_of(copy / f"rank-{rank:03d}", ROWS)
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 1)


def place_elsewhere(copy: Path) -> None:
    edit_weight_map(copy / "rank-001", lambda placed: placed.update({ROWS: "../rank-000/x.safetensors"}))


def forget(copy: Path, name: str) -> None:
    shard = shard_of(copy / "rank-001", name)
    raw = shard.read_bytes()
    shard.write_bytes(raw.replace(f'"{name}"'.encode(), f'"{name[:-1]}X"'.encode(), 1))
    edit_weight_map(copy / "rank-001", lambda placed: placed.pop(name))


def reslice(copy: Path, ranks: tuple[int, ...], **change) -> None:
    for rank in ranks:
        edit(copy / f"rank-{rank:03d}", lambda described: described["slices"][ROWS].update(change))


def whole_on_one(copy: Path) -> None:
    edit(copy / "rank-001", lambda described: described["slices"].pop(ROWS))


def drop_odd_ranks(copy: Path) -> None:
    for rank in (1, 3):
        edit(copy / f"rank-{rank:03d}", lambda d: (d["slices"].pop(ROWS), d["tensors"].pop(ROWS)))


def move_edge(copy: Path) -> None:
    reslice(copy, (0, 2), range=[0, 100])
    reslice(copy, (1, 3), range=[100, 512])


def retype_odd_ranks(copy: Path) -> None:
    for rank in (1, 3):
        edit_entry(copy / f"rank-{rank:03d}", ROWS, dtype="F16")


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing shard": (lambda copy: shard_of(copy / "rank-001", ROWS).unlink(), "missing shard", "rank-001"),
    "short shard": (cut_short, "truncated shard", "rank-001"),
    "unsafe path": (place_elsewhere, "unsafe path", ROWS),
    "missing slice": (lambda copy: forget(copy, ROWS), "missing", ROWS),
    "missing copy": (lambda copy: forget(copy, "norm.weight"), "missing", "norm.weight"),
    "missing scale": (
        lambda copy: forget(copy, "layers.0.attn.wq_b.weight_scale"),
        "missing",
        "layers.0.attn.wq_b.weight_scale in rank-001",
    ),
    "overlap": (
        lambda copy: reslice(copy, (1, 3), range=[250, 512]),
        "overlapping slices",
        "[250, 256) along axis 0 of [512, 64] is in two different slices",
    ),
    "gap": (lambda copy: reslice(copy, (0, 2), range=[0, 250]), "gap between slices", "[250, 256)"),
    "end": (lambda copy: reslice(copy, (1, 3), range=[256, 500]), "gap between slices", "[500, 512)"),
    "start": (lambda copy: reslice(copy, (0, 2), range=[10, 256]), "gap between slices", "[0, 10)"),
    "only one of two": (drop_odd_ranks, "gap between slices", "[256, 512)"),
    "other shape": (lambda copy: reslice(copy, (1,), of=[1024, 64]), "slices disagree", "of [1024, 64]"),
    "other axis": (
        lambda copy: reslice(copy, (1,), axis=1, range=[0, 32]),
        "slices disagree",
        f"{ROWS} in rank-001/{PACK}",
    ),
    "whole on one": (whole_on_one, "slices disagree", "the whole of it"),
    "another whole": (
        lambda copy: reslice(copy, (0, 1, 2, 3), of=[512, 32]),
        "slice misfit",
        "[256, 64], expected [256, 32] for [0, 256)",
    ),
    "another range": (
        move_edge,
        "slice misfit",
        "rank-000",
    ),
    "other copy": (
        lambda copy: edit_entry(copy / "rank-002", ROWS, shape=[64, 256]),
        "copies differ",
        "BF16 [64, 256], and BF16 [256, 64] in rank-000",
    ),
    "other dtype": (
        retype_odd_ranks,
        "slice misfit",
        "BF16 [256, 64], F16 [256, 64]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_listed_with_its_place(copy, damage):
    harm, kind, said = DAMAGE[damage]
    harm(copy)
    message = refusal(copy)
    assert f"- {kind}: " in message
    assert said in message
    damaged = {problem.kind for problem in examine(copy).damage}
    assert kind in damaged or kind == "missing"


def test_slices_that_do_not_fit_are_one_line_with_all_that_lies_beside_them(copy):
    name = "layers.0.attn.wq_b.weight"
    for rank in (1, 3):
        edit(
            copy / f"rank-{rank:03d}", lambda described: described["slices"][name]["range"].__setitem__(0, 1)
        )
    assert "1 difference" in refusal(copy)


def test_a_tensor_that_lost_a_slice_is_not_called_missing_as_well(copy):
    for rank in (1, 3):
        cut_short(copy, rank=rank)
    message = refusal(copy)
    assert "2 differences" in message
    assert message.count("truncated shard: ") == 2


def test_what_lay_in_a_lost_shard_is_not_called_missing_as_well(copy):
    shard_of(copy / "rank-002", EXPERT).unlink()
    message = refusal(copy)
    assert f"missing shard: {EXPERT} in rank-002/" in message
    assert "missing: " not in message


def test_a_tensor_with_an_entry_of_its_own_is_cut_with_no_other(tmp_path):
    cut = Cut("mxfp8", (4, 64), 0, [(0, 2), (2, 4)], {"weight": ((4, 64), 1), "scale": ((3, 1), None)})
    wholes = write_cut(tmp_path, cut)
    for folder in (tmp_path, *tmp_path.glob("share*")):
        edit(folder, lambda described: described["tensors"].update({"a.scale": {"format": "plain"}}))
    files = scan_pack(tmp_path, find_pack(tmp_path))
    assert files.problems == ()
    assert files.tensors["a.scale"].shape == wholes["a.scale"].shape


def test_both_sides_bound_ranks_alike():
    assert rank_layout.MAX_RANKS == MAX_RANKS
