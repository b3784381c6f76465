"""`verify`: every damage to an output is found, and every number that does not follow from the source."""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ascend_v4.errors import AscendV4Error, CheckpointError
from ascend_v4.repack.decode import decode_rows
from ascend_v4.repack.files import hash_file
from ascend_v4.repack.layouts import LayoutName, Ranks
from ascend_v4.repack.manifest import MANIFEST_FILE, FileEntry, read_manifest
from ascend_v4.repack.recipes import Target, WeightForm
from ascend_v4.repack.source_forms import TensorKind
from ascend_v4.repack.verify import verify_output
from tests.repack.packs import fp4_numbers, fp8_numbers, int4_numbers, repacked, stored_tensors, tree
from tests.unit.checkpoints import INDEX, make_small

OUTPUTS = [
    (Target.W8A8, {}),
    (Target.W8A8, {"reversible": True}),
    (Target.W8A8, {"ranks": Ranks(tp=2, ep=4)}),
    (Target.W4A8, {"layout": LayoutName.MODELSLIM}),
    (Target.MX, {}),
    (Target.BF16, {"layout": LayoutName.HUGGINGFACE}),
]


@pytest.fixture(scope="module")
def pack(source, tmp_path_factory) -> Path:
    """A finished output; tests that damage it put it back."""
    output = tmp_path_factory.mktemp("pack") / "out"
    repacked(source, output)
    return output


@pytest.mark.parametrize(("target", "options"), OUTPUTS, ids=lambda value: str(value)[:40])
def test_every_kind_of_output_agrees_with_its_source(source, tmp_path, target, options):
    repacked(source, tmp_path / "out", target, **options)
    report = verify_output(tmp_path / "out", source=source)
    assert report.num_bytes > 0
    assert report.decoded_weights > 0


def test_report_counts_files_and_tensors(pack):
    report = verify_output(pack)
    assert report.num_files == len(tree(pack))
    assert report.num_tensors == len(stored_tensors(pack))
    assert json.dumps(report.summary())


def truncate(pack: Path, draw: random.Random) -> None:
    file = pack / draw.choice(list(tree(pack)))
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip_bit(pack: Path, draw: random.Random) -> None:
    file = pack / draw.choice(list(tree(pack)))
    flip(file, draw.randrange(8 * file.stat().st_size))


def flip_header_bit(pack: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(pack.glob("*.safetensors")))
    header_bytes = int.from_bytes(file.read_bytes()[:8], "little")
    flip(file, draw.randrange(8 * (8 + header_bytes)))


def flip_manifest_bit(pack: Path, draw: random.Random) -> None:
    flip(pack / MANIFEST_FILE, draw.randrange(8 * (pack / MANIFEST_FILE).stat().st_size))


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        (byte,) = stream.read(1)
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ 1 << bit % 8]))


def swap_shards(pack: Path, draw: random.Random) -> None:
    one, other = draw.sample(sorted(pack.glob("*.safetensors")), 2)
    one.rename(pack / "between")
    other.rename(one)
    (pack / "between").rename(other)


def edit_index(pack: Path, draw: random.Random) -> None:
    index = json.loads((pack / INDEX).read_text())
    name = draw.choice(list(index["weight_map"]))
    edits = (
        lambda placed: placed.pop(name),
        lambda placed: placed.update({name: "model-00099-of-00099.safetensors"}),
        lambda placed: placed.update({f"{name}.more": placed[name]}),
    )
    draw.choice(edits)(index["weight_map"])
    (pack / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def remove_file(pack: Path, draw: random.Random) -> None:
    (pack / draw.choice(list(tree(pack)))).unlink()


def append_bytes(pack: Path, draw: random.Random) -> None:
    with (pack / draw.choice(list(tree(pack)))).open("ab") as stream:
        stream.write(draw.randbytes(draw.randint(1, 9)))


def zero_a_run(pack: Path, draw: random.Random) -> None:
    file = draw.choice(sorted(pack.glob("*.safetensors")))
    raw = bytearray(file.read_bytes())
    start = draw.randrange(len(raw) // 2)
    raw[start : start + 4096] = bytes(4096)
    file.write_bytes(raw[: file.stat().st_size])


def add_shard(pack: Path, draw: random.Random) -> None:
    shutil.copy(
        draw.choice(sorted(pack.glob("*.safetensors"))), pack / f"model-{draw.randrange(9)}.safetensors"
    )


DAMAGES = (
    truncate, flip_bit, flip_header_bit, flip_manifest_bit, swap_shards, edit_index, remove_file,
    append_bytes, zero_a_run, add_shard,
)  # fmt: skip
DAMAGES_EACH = 20


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found(pack, damage, seed):
    draw = random.Random(seed)
    before = tree(pack)
    for _ in range(DAMAGES_EACH):
        damage(pack, draw)
        after = tree(pack)
        with pytest.raises(AscendV4Error) as caught:
            verify_output(pack)
        assert len(str(caught.value)) < 10_000
        for name in after.keys() | before.keys():
            if after.get(name) != before.get(name):
                (pack / name).unlink(missing_ok=True)
                if name in before:
                    (pack / name).write_bytes(before[name])
    assert verify_output(pack).num_files == len(before)


def test_damage_names_every_file(pack, tmp_path):
    shutil.copytree(pack, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    flip(shards[0], 8 * 4000)
    shards[1].unlink()
    os.truncate(shards[2], 100)
    with pytest.raises(CheckpointError) as caught:
        verify_output(tmp_path / "out")
    for kind, shard in zip(("wrong hash", "missing file", "wrong size"), shards, strict=False):
        assert f"{kind}: {shard.name}" in str(caught.value)


def sealed_again(pack: Path, **changes) -> None:
    """Make a manifest that agrees with the files as they are."""
    manifest = read_manifest(pack)
    files = {name: FileEntry((pack / name).stat().st_size, hash_file(pack / name)) for name in manifest.files}
    (pack / MANIFEST_FILE).write_bytes(replace(manifest, files=files, **changes).render())


def test_weight_that_does_not_follow_from_the_source_is_named(source, pack, tmp_path):
    shutil.copytree(pack, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    flip(shard, 8 * shard.stat().st_size - 80_000)
    sealed_again(tmp_path / "out")
    assert verify_output(tmp_path / "out").source is None
    with pytest.raises(CheckpointError, match=rf"differs from source: \S+ in {shard.name}"):
        verify_output(tmp_path / "out", source=source)


def test_description_that_does_not_follow_from_the_source_is_named(source, pack, tmp_path):
    shutil.copytree(pack, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace("64", "65", 1))
    sealed_again(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"differs from source: config\.json"):
        verify_output(tmp_path / "out", source=source)


def test_report_that_flatters_is_found(source, pack, tmp_path):
    shutil.copytree(pack, tmp_path / "out")
    tensors = read_manifest(pack).tensors
    name = next(name for name, entry in tensors.items() if entry["changed_weights"])
    flattered = tensors | {name: tensors[name] | {"changed_weights": 0}}
    sealed_again(tmp_path / "out", tensors=flattered)
    with pytest.raises(CheckpointError, match=f"wrong report: {name}"):
        verify_output(tmp_path / "out", source=source)


def test_other_weights_of_the_same_shape_are_another_source(pack, tmp_path):
    other = make_small(tmp_path / "other", seed=7)
    with pytest.raises(CheckpointError, match="differs from source"):
        verify_output(pack, source=other)


def test_checkpoint_that_repack_did_not_write_is_refused(source):
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        verify_output(source)


def test_manifest_that_names_files_elsewhere_is_refused(pack, tmp_path):
    shutil.copytree(pack, tmp_path / "out")
    manifest = read_manifest(pack)
    stray = manifest.files | {"../secret": FileEntry(1, "0" * 32)}
    (tmp_path / "out" / MANIFEST_FILE).write_bytes(replace(manifest, files=stray).render())
    with pytest.raises(CheckpointError, match=r"\.\./secret"):
        verify_output(tmp_path / "out")


def test_manifest_of_a_later_version_is_refused(pack, tmp_path, monkeypatch):
    shutil.copytree(pack, tmp_path / "out")
    manifest = read_manifest(pack)
    with monkeypatch.context() as patch:
        patch.setattr("ascend_v4.repack.manifest.FORMAT_VERSION", 2)
        (tmp_path / "out" / MANIFEST_FILE).write_bytes(manifest.render())
    with pytest.raises(CheckpointError, match="version 2"):
        verify_output(tmp_path / "out")


def test_decoder_agrees_with_one_written_from_the_formats(source, tmp_path):
    repacked(source, tmp_path / "out", Target.W4A8)
    was, now = stored_tensors(source), stored_tensors(tmp_path / "out")
    expert, linear = "layers.0.ffn.experts.1.w3", "mtp.0.attn.wq_b"
    for form, weight, scale, numbers in (
        (WeightForm.FP4_GROUP, was[f"{expert}.weight"], was[f"{expert}.scale"], fp4_numbers),
        (WeightForm.FP8_BLOCK, was[f"{linear}.weight"], was[f"{linear}.scale"], fp8_numbers),
        (WeightForm.INT4_CHANNEL, now[f"{expert}.weight"], now[f"{expert}.weight_scale"], int4_numbers),
    ):
        stored = {
            kind: torch.from_numpy(np.frombuffer(entry[2], np.uint8).copy()).view(entry[1][0], -1)
            for kind, entry in (
                (TensorKind.WEIGHT, weight),
                (TensorKind.SCALE, scale),
                (TensorKind.CHANNEL_SCALE, scale),
            )
        }
        wanted = numbers(weight, scale)
        np.testing.assert_array_equal(decode_rows(form, stored, first=0, stop=len(wanted)).numpy(), wanted)
        np.testing.assert_array_equal(decode_rows(form, stored, first=3, stop=70).numpy(), wanted[3:70])
