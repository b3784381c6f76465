"""The reader: mapped tensors of sound files, and one error with every difference of damaged ones."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch

from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.checkpoint.shards import MAX_HEADER_BYTES, SHOWN_PROBLEMS
from ascend_v4.config import ModelConfig
from ascend_v4.errors import CheckpointError, ConfigError
from tests.unit.checkpoints import (
    INDEX,
    edit_entry,
    edit_weight_map,
    make_small,
    read_header,
    shard_of,
    small_config,
    write_header,
)

WEIGHT = "layers.1.attn.wq_b.weight"
SCALE = "layers.1.attn.wq_b.scale"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint that nobody changes."""
    return make_small(tmp_path_factory.mktemp("sound") / "checkpoint")


@pytest.fixture
def checkpoint(sound, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(sound, tmp_path / "checkpoint")


def differences(directory):
    with CheckpointReader.open(directory) as reader, pytest.raises(CheckpointError) as caught:
        reader.verify()
    return str(caught.value)


def rewrite(directory, name, tensor):
    """Replace one tensor, leaving the rest of its shard alone."""
    shard = shard_of(directory, name)
    tensors = safetensors.torch.load_file(shard)
    tensors[name] = tensor
    safetensors.torch.save_file(tensors, shard)


def test_every_tensor_is_what_the_safetensors_package_reads(sound):
    with CheckpointReader.open(sound) as reader:
        reader.verify()
        for shard in sound.glob("*.safetensors"):
            for name, expected in safetensors.torch.load_file(shard).items():
                got = reader.tensor(name)
                assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
                assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.golden
@pytest.mark.parametrize("name", ["nano", "layer-csa", "layer-hash", "flash-tiny", "pro-tiny"])
def test_golden_checkpoint_verifies(golden_dir, name):
    with CheckpointReader.open(golden_dir(name)) as reader:
        reader.verify()

        assert reader.num_tensors == len(reader.specs)
        assert (reader.unexpected, reader.drafts) == ((), ())


def test_tensors_of_a_shard_lie_in_one_mapping(sound):
    with CheckpointReader.open(sound) as reader:
        names = list(read_header(shard_of(sound, WEIGHT)))
        bases = {reader.tensor(name).data_ptr() - reader.stored(name).offset_bytes for name in names}

        assert len(names) > 1
        assert len(bases) == 1


def test_writing_to_a_tensor_never_reaches_the_file(checkpoint):
    before = shard_of(checkpoint, WEIGHT).read_bytes()
    with CheckpointReader.open(checkpoint) as reader:
        reader.tensor(WEIGHT).view(torch.uint8).fill_(1)

        assert reader.tensor(WEIGHT).view(torch.uint8).max() == 1
    assert shard_of(checkpoint, WEIGHT).read_bytes() == before


def test_tensor_outlives_the_reader(sound):
    with CheckpointReader.open(sound) as reader:
        tensor = reader.tensor(WEIGHT)
        expected = tensor.clone()

    assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8))


def test_released_tensor_reads_the_same_again(sound):
    with CheckpointReader.open(sound) as reader:
        before = reader.tensor("embed.weight").clone()
        reader.release("embed.weight")

        assert torch.equal(reader.tensor("embed.weight"), before)


def test_unaligned_tensor_is_copied_and_right(tmp_path):
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    values = torch.tensor([1.5, -2.0])
    raw = len(text).to_bytes(8, "little") + text + b"\x07" + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)

    with CheckpointReader.open(tmp_path, config=small_config()) as reader:
        assert torch.equal(reader.tensor("b"), values)
        assert reader.tensor("b").data_ptr() % 4 == 0


def test_single_file_without_index_is_read(sound, tmp_path):
    tensors: dict[str, torch.Tensor] = {}
    for shard in sound.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(shard)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")

    with CheckpointReader.open(tmp_path, config=ModelConfig.from_file(sound)) as reader:
        reader.verify()


def test_shards_without_index_are_read(checkpoint):
    (checkpoint / INDEX).unlink()

    with CheckpointReader.open(checkpoint) as reader:
        reader.verify()


def test_tensor_in_two_shards_without_index_is_an_error(checkpoint):
    (checkpoint / INDEX).unlink()
    shutil.copy(next(checkpoint.glob("*.safetensors")), checkpoint / "copy.safetensors")

    assert "duplicate tensor" in differences(checkpoint)


def test_linked_shards_are_read(sound, tmp_path):
    for file in sound.iterdir():
        (tmp_path / file.name).symlink_to(file)

    with CheckpointReader.open(tmp_path) as reader:
        reader.verify()


def test_truncated_shard_names_the_tensors_that_are_cut_and_the_file(checkpoint):
    shard = shard_of(checkpoint, WEIGHT)
    last = max(read_header(shard).items(), key=lambda item: item[1]["data_offsets"][1])[0]
    shard.write_bytes(shard.read_bytes()[:-1])

    text = differences(checkpoint)

    assert f"truncated shard: {last} in {shard.name}" in text
    assert "1 difference from" in text


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 100])
def test_shard_cut_inside_its_header_names_every_tensor_of_it(checkpoint, num_bytes):
    shard = shard_of(checkpoint, WEIGHT)
    num_tensors = len(read_header(shard))
    shard.write_bytes(shard.read_bytes()[:num_bytes])

    text = differences(checkpoint)

    assert f"({num_tensors} truncated shard)" in text
    assert shard.name in text


def test_missing_shard_names_its_tensors_and_the_file(checkpoint):
    shard = shard_of(checkpoint, WEIGHT)
    weight_map = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    names = [name for name, file in weight_map.items() if file == shard.name]
    shard.unlink()

    text = differences(checkpoint)

    assert f"({len(names)} missing shard)" in text
    assert f"missing shard: {names[0]} in {shard.name}" in text


def test_tensor_the_index_misplaces_is_named(checkpoint):
    other = next(
        shard.name for shard in checkpoint.glob("*.safetensors") if shard != shard_of(checkpoint, WEIGHT)
    )
    edit_weight_map(checkpoint, lambda placed: placed.update({WEIGHT: other}))

    assert f"not in shard: {WEIGHT} in {other}" in differences(checkpoint)


def test_wrong_dtype_is_named(checkpoint):
    edit_entry(checkpoint, WEIGHT, dtype="I8")

    assert (
        f"wrong dtype: {WEIGHT} in {shard_of(checkpoint, WEIGHT).name}: I8, expected F8_E4M3"
        in differences(checkpoint)
    )


def test_wrong_shape_is_named(checkpoint):
    edit_entry(checkpoint, WEIGHT, shape=[160, 512])

    text = differences(checkpoint)

    assert f"wrong shape: {WEIGHT}" in text
    assert "[160, 512], expected [512, 160]" in text


def test_scale_that_does_not_fit_its_weight_is_named_with_it(checkpoint):
    rewrite(checkpoint, SCALE, torch.zeros(4, 3, dtype=torch.uint8).view(torch.float8_e8m0fnu))

    text = differences(checkpoint)

    assert f"scale misfit: {SCALE} in {shard_of(checkpoint, SCALE).name}" in text
    assert f"[4, 3], expected [4, 2] to fit {WEIGHT}" in text


def test_missing_scale_is_named(checkpoint):
    edit_weight_map(checkpoint, lambda placed: placed.pop(SCALE))

    assert f"missing scale: {SCALE}: no shard holds it" in differences(checkpoint)


def test_expert_id_out_of_range_is_named(checkpoint):
    name = "layers.0.ffn.gate.tid2eid"
    ids = torch.zeros(512, 2, dtype=torch.int64)
    ids[5, 1] = 4
    rewrite(checkpoint, name, ids)

    assert f"bad expert id: {name}" in differences(checkpoint)


def test_all_kinds_of_damage_are_in_one_error(checkpoint):
    edit_entry(checkpoint, WEIGHT, dtype="I8")
    edit_entry(checkpoint, "norm.weight", dtype="F16")
    edit_weight_map(checkpoint, lambda placed: placed.pop("layers.0.attn.wkv.scale"))
    gone = shard_of(checkpoint, "layers.0.attn.attn_sink")
    gone.unlink()

    text = differences(checkpoint)

    for part in ("wrong dtype: norm.weight", f"wrong dtype: {WEIGHT}", "missing scale", f"in {gone.name}"):
        assert part in text


def test_long_list_is_counted_in_full_and_shown_in_part(checkpoint):
    shards = list(checkpoint.glob("*.safetensors"))
    for shard in shards:
        shard.unlink()

    text = differences(checkpoint)

    num_tensors = len(json.loads((checkpoint / INDEX).read_text())["weight_map"])
    assert f"{num_tensors} differences" in text
    assert text.count("\n  - ") == SHOWN_PROBLEMS
    assert f"... and {num_tensors - SHOWN_PROBLEMS} more" in text
    assert all(shard.name in text for shard in shards)


def test_unexpected_tensor_is_listed_and_no_error(checkpoint):
    edit_weight_map(checkpoint, lambda placed: placed.update({"novel.weight": placed[WEIGHT]}))
    rewrite(checkpoint, "novel.weight", torch.zeros(3))

    with CheckpointReader.open(checkpoint) as reader:
        reader.verify()
        assert reader.unexpected == ("novel.weight",)


def test_draft_tensors_are_listed_apart(checkpoint):
    config = small_config(dspark_block_size=5)

    with CheckpointReader.open(checkpoint, config=config) as reader:
        reader.verify()
        assert reader.unexpected == ()
        assert reader.drafts
        assert all(name.startswith("mtp.") for name in reader.drafts)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "x.bin", "C:\\x"]
)
def test_index_cannot_name_files_outside_the_directory(checkpoint, file):
    edit_weight_map(checkpoint, lambda placed: placed.update({WEIGHT: file}))

    assert f"unsafe path: {WEIGHT} in {file}" in differences(checkpoint)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "must give a file name"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the same key twice"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
    ids=lambda value: value[:20],
)
def test_unusable_index_is_an_error(checkpoint, text, said):
    (checkpoint / INDEX).write_text(text)

    with pytest.raises(CheckpointError, match=said):
        CheckpointReader.open(checkpoint)


def header_difference(directory, header):
    """What verify says once a one-tensor shard has this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with CheckpointReader.open(directory, config=small_config()) as reader:
        problems = reader.comparison.problems
        return "\n".join(str(problem) for problem in problems if problem.file == "model.safetensors")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "two rising integers >= 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "two rising integers >= 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0]}, "two rising integers >= 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]}, "two rising integers >= 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 70]}, "two rising integers >= 0"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "takes 8 bytes and data_offsets span 4"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "shape is [-2]"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "shape is [True]"),
        ({"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}, "at most 8 integers"),
        ({"dtype": "F32", "shape": [1 << 40] * 8, "data_offsets": [0, 4]}, "data_offsets span 4"),
        ({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}, "shape is 2"),
        ({"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}, "dtype is 'X9'"),
        ({"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}, "dtype is"),
        ({}, "dtype is 'None'"),
        ([], "not an object"),
        ({"dtype": "U8", "shape": [17], "data_offsets": [0, 17]}, "truncated shard: a"),
        ({"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}, "truncated shard: a"),
        ({"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "allows no gaps"),
        ({"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}, "allows no gaps"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_header_entry_is_named(tmp_path, entry, said):
    assert said in header_difference(tmp_path, {"a": entry})


def test_overlapping_tensors_are_named(tmp_path):
    first = {"dtype": "U8", "shape": [10], "data_offsets": [0, 10]}
    second = {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}

    assert "bad header: b in model.safetensors: its bytes overlap" in header_difference(
        tmp_path, {"a": first, "b": second}
    )


@pytest.mark.parametrize(
    "header", [b"[]", b"{", b"\xff\xff", b"[" * 100_000, b'{"a": {}, "a": {}}', b"9" * 5000]
)
def test_header_that_is_no_object_is_an_unreadable_shard(tmp_path, header):
    assert "unreadable shard: model.safetensors" in header_difference(tmp_path, header)


@pytest.mark.parametrize("claimed", [MAX_HEADER_BYTES + 1, (1 << 64) - 1])
def test_header_length_beyond_the_bound_is_never_read(tmp_path, claimed):
    (tmp_path / "model.safetensors").write_bytes(claimed.to_bytes(8, "little") + bytes(64))

    with CheckpointReader.open(tmp_path, config=small_config()) as reader:
        assert f"the header claims {claimed} bytes" in str(reader.comparison.problems[0])


def test_header_longer_than_the_file_is_truncation(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{}")

    with CheckpointReader.open(tmp_path, config=small_config()) as reader:
        assert "truncated shard" in str(reader.comparison.problems[0])


def test_tensor_that_is_not_whole_cannot_be_read(checkpoint):
    shard_of(checkpoint, WEIGHT).unlink()

    with CheckpointReader.open(checkpoint) as reader, pytest.raises(CheckpointError, match=WEIGHT):
        reader.tensor(WEIGHT)


def test_directory_without_shards_or_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a directory"):
        CheckpointReader.open(tmp_path / "absent")
    with pytest.raises(ConfigError, match="does not exist"):
        CheckpointReader.open(tmp_path)
    with pytest.raises(CheckpointError, match="neither"):
        CheckpointReader.open(tmp_path, config=small_config())


def test_edited_header_keeps_its_tensors(checkpoint):
    shard = shard_of(checkpoint, WEIGHT)
    write_header(shard, read_header(shard))

    with CheckpointReader.open(checkpoint) as reader:
        reader.verify()
