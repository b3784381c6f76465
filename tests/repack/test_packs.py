"""Packs are read by their description: what it says is loaded, what cannot be run rightly is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ascend_v4.checkpoint.describe import examine
from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.errors import AscendV4Error, CheckpointError
from ascend_v4.model.weights import WeightSource
from ascend_v4.operators.contracts.quantize import StoredWeight
from ascend_v4.repack.config import RepackConfig
from ascend_v4.repack.layouts import LayoutName
from ascend_v4.repack.pipeline import run_repack
from ascend_v4.repack.recipes import Target
from tests.repack.packs import array, stored_tensors
from tests.unit.checkpoints import make_small

DESCRIPTIONS = {"native": "ascend_v4.json", "modelslim": "quant_model_description.json"}
EXPERT = "layers.1.ffn.experts.2.w2.weight"


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Path:
    """A folder with the packs that tests copy: one per target and layout."""
    folder = tmp_path_factory.mktemp("packs")
    source = make_small(folder / "official")
    kinds = [
        ("w8a8", "native"),
        ("w8a8", "modelslim"),
        ("w4a8", "modelslim"),
        ("mx", "native"),
        ("mx", "modelslim"),
    ]
    for target, layout in kinds:
        repack(source, folder / f"{target}-{layout}", target=target, layout=layout)
    return folder


@pytest.fixture
def pack(sources, tmp_path):
    """A private copy of a pack by target and layout."""

    def copy(target: str, layout: str) -> Path:
        return Path(shutil.copytree(sources / f"{target}-{layout}", tmp_path / f"{target}-{layout}"))

    return copy


def repack(source: Path, output: Path, *, target: str, layout: str = "native", **options) -> Path:
    config = RepackConfig(
        source=source, output=output, target=Target(target), layout=LayoutName(layout), jobs=1, **options
    )
    run_repack(config)
    return output


def edit(directory: Path, layout: str, change) -> Path:
    """Apply a change to the description in place."""
    path = directory / DESCRIPTIONS[layout]
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    return directory


def described_weight(directory: Path, name: str) -> StoredWeight:
    """A weight as the model gets it."""
    reader = CheckpointReader.open(directory)
    assert reader.pack is not None
    return WeightSource(reader).packed(name, reader.pack)


def refusal(directory: Path) -> str:
    """What loading says; it must say it."""
    with pytest.raises(AscendV4Error) as caught:
        CheckpointReader.open(directory).verify()
    return str(caught.value)


@pytest.mark.parametrize(
    ("target", "layout"),
    [("w8a8", "native"), ("w8a8", "modelslim"), ("w4a8", "modelslim"), ("mx", "native"), ("mx", "modelslim")],
)
def test_a_pack_holds_what_its_description_says(sources, target, layout):
    reader = CheckpointReader.open(sources / f"{target}-{layout}")
    reader.verify()
    assert reader.pack is not None
    assert (reader.pack.scheme.value, reader.pack.layout.value) == (target, layout)
    assert reader.unexpected == ()


def numbers_of(entry: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    """A stored tensor; bfloat16 widened by hand."""
    if entry[0] == "BF16":
        return (array(entry, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array(entry, {"I8": np.int8, "F32": np.float32, "I64": np.int64}[entry[0]])


def nibbles(packed: np.ndarray) -> np.ndarray:
    """Signed 4-bit codes of bytes, both halves: [.., 2] with the low one first."""
    pair = np.stack((packed.view(np.uint8) & 15, packed.view(np.uint8) >> 4), axis=-1).astype(np.int16)
    return np.where(pair > 7, pair - 16, pair)


def decode_from_description(directory: Path) -> dict[str, np.ndarray]:
    """Every weight of a ModelSlim pack as numbers, by a loader that knows the format's own documents only."""
    types = json.loads((directory / "quant_model_description.json").read_text())
    weight_map = json.loads((directory / "quant_model_weights.safetensors.index.json").read_text())[
        "weight_map"
    ]
    tensors = {name: numbers_of(entry) for name, entry in stored_tensors(directory).items()}
    assert tensors.keys() == weight_map.keys()
    numbers = {}
    for name, kind in types.items():
        if name not in weight_map or name.endswith(("_scale", "_offset", "_bias")):
            continue
        array = tensors[name]
        stem = name.removesuffix("weight")
        if kind == "W8A8_DYNAMIC":
            offset = tensors[f"{stem}weight_offset"]
            array = (array.astype(np.float64) - offset) * tensors[f"{stem}weight_scale"]
        elif kind == "W4A8_DYNAMIC":
            codes = nibbles(array)
            rows = np.moveaxis(codes, -1, 1).reshape(2 * array.shape[0], array.shape[1])
            scaled = rows * tensors[f"{stem}weight_scale"].astype(np.float64)
            bias = 8 * scaled.sum(1)
            np.testing.assert_allclose(tensors[f"{stem}scale_bias"].sum(1), bias, rtol=1e-4, atol=1e-5)
            array = scaled
        else:
            assert kind == "FLOAT", (name, kind)
        numbers[name] = array
    return numbers


@pytest.mark.parametrize("target", ["w8a8", "w4a8"])
def test_a_modelslim_pack_is_read_as_a_loader_of_its_description_reads_it(sources, target):
    directory = sources / f"{target}-modelslim"
    wanted = decode_from_description(directory)
    reader = CheckpointReader.open(directory)
    assert reader.pack is not None
    quantised = 0
    for name, numbers in wanted.items():
        if name.endswith("weight") and len(numbers.shape) == 2 and reader.pack.weight(name).scale is not None:
            got = described_weight(directory, name).to_float32().numpy()
            quantised += 1
        else:
            got = reader.tensor(name).float().numpy()
        np.testing.assert_array_equal(got, numbers.astype(np.float32), err_msg=name)
    assert quantised > 30


def test_mx_codes_and_scales_are_the_same_in_both_layouts(sources):
    for name in ("layers.0.attn.wq_b.weight", EXPERT):
        weights = [described_weight(sources / f"mx-{layout}", name) for layout in DESCRIPTIONS]
        assert torch.equal(weights[0].to_float32(), weights[1].to_float32())


def test_another_tools_files_and_neighbouring_types_are_taken(pack):
    directory = pack("w8a8", "modelslim")
    # bfloat16 is widened by reading, token ids are narrowed, and there is no MTP block and no index
    tensors = {
        name: numbers_of(entry).astype(np.int32 if name.endswith("tid2eid") else numbers_of(entry).dtype)
        for name, entry in stored_tensors(directory).items()
        if not name.startswith("mtp.")
    }
    for path in [*directory.glob("quant_model_weights*"), directory / "manifest.json"]:
        path.unlink()
    save_file(tensors, directory / "quant_model_weight_w8a8_dynamic-00001-of-00001.safetensors")
    edit(directory, "modelslim", lambda d: [d.pop(name) for name in list(d) if name.startswith("mtp.")])
    reader = CheckpointReader.open(directory)
    reader.verify()
    assert reader.tensor("layers.0.ffn.gate.tid2eid").dtype is torch.int32
    assert reader.dtype("embed.weight") == "F32"


@pytest.mark.parametrize(
    "sign",
    [
        {"mtp.0.emb.tok_emb.weight": "FLOAT"},
        {"mtp.0.head.weight": "FLOAT"},
        {"metadata": {"rotation": "hadamard"}},
        {"optional": {"quarot": {"rotation_map": {"global_rotation": "quarot.safetensors"}}}},
    ],
    ids=["own embedding", "own head", "metadata", "optional"],
)
def test_a_rotated_description_is_refused_in_one_sentence(pack, sign):
    message = refusal(edit(pack("w8a8", "modelslim"), "modelslim", lambda described: described.update(sign)))
    assert "rotated" in message
    assert message.count(". ") == 0


def test_a_rotated_pack_is_recognised_by_its_tensors_alone(pack):
    directory = pack("w8a8", "modelslim")
    extra = {"mtp.0.head.weight": np.zeros((4, 4), np.float32)}
    save_file(extra, directory / "quant_model_weights-00002-of-00002.safetensors")
    (directory / "quant_model_weights.safetensors.index.json").unlink()
    assert "mtp.0.head.weight" in refusal(directory)


def test_a_native_pack_that_says_rotation_is_refused(pack):
    directory = edit(pack("w8a8", "native"), "native", lambda described: described.update(rotation="quarot"))
    assert "rotated" in refusal(directory)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "'other'"),
        ({"scheme": "w2a2"}, "w2a2"),
        ({"tensors": {}}, "no tensors"),
        ({"ranks": {"tp": 2, "ep": 2}}, "names the folders None"),
    ],
)
def test_a_native_description_of_another_kind_is_refused(pack, change, said):
    assert said in refusal(edit(pack("w8a8", "native"), "native", lambda described: described.update(change)))


@pytest.mark.parametrize("kind", ["W8A8", "W4A4", "W8A8_MIX", 7, None])
def test_an_unknown_type_is_refused_by_tensor_and_type(pack, kind):
    message = refusal(edit(pack("w8a8", "modelslim"), "modelslim", lambda d: d.update({EXPERT: kind})))
    assert EXPERT in message
    assert str(kind) in message


def test_an_unknown_native_form_is_refused(pack):
    change = {EXPERT: {"format": "int3"}}
    message = refusal(edit(pack("w8a8", "native"), "native", lambda d: d["tensors"].update(change)))
    assert EXPERT in message
    assert "int3" in message


@pytest.mark.parametrize("layout", DESCRIPTIONS)
def test_a_weight_the_description_leaves_out_is_refused(pack, layout):
    def forget(described):
        (described["tensors"] if layout == "native" else described).pop(EXPERT)

    assert EXPERT in refusal(edit(pack("w8a8", layout), layout, forget))


def test_a_form_on_a_tensor_that_is_always_plain_is_refused(pack):
    change = {"head.weight": "W8A8_DYNAMIC"}
    assert "head.weight" in refusal(edit(pack("w8a8", "modelslim"), "modelslim", lambda d: d.update(change)))


def test_the_description_and_not_the_looks_of_a_tensor_decide(pack):
    change = {EXPERT: "FLOAT"}
    message = refusal(edit(pack("w8a8", "modelslim"), "modelslim", lambda d: d.update(change)))
    assert "wrong dtype" in message
    assert EXPERT in message


def test_int4_with_scales_per_group_is_refused(pack):
    change = {EXPERT.replace("weight", "weight_scale_second"): "W4A8_DYNAMIC"}
    assert "per group" in refusal(edit(pack("w4a8", "modelslim"), "modelslim", lambda d: d.update(change)))


def test_both_descriptions_at_once_are_refused(pack, sources):
    directory = pack("w8a8", "native")
    shutil.copy(sources / "w8a8-modelslim" / DESCRIPTIONS["modelslim"], directory)
    assert "one of them" in refusal(directory)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', "[" * 100_000], ids=len)
@pytest.mark.parametrize("layout", DESCRIPTIONS)
def test_a_damaged_description_names_its_file(pack, layout, text):
    directory = pack("w8a8", layout)
    (directory / DESCRIPTIONS[layout]).write_text(text)
    assert DESCRIPTIONS[layout] in refusal(directory)


def test_an_oversized_description_is_not_read(pack):
    directory = pack("w8a8", "native")
    with (directory / DESCRIPTIONS["native"]).open("r+b") as stream:
        stream.truncate((1 << 28) + 1)
    assert str(1 << 28) in refusal(directory)


def test_a_pack_without_a_manifest_is_unfinished(pack):
    directory = pack("w8a8", "native")
    (directory / "manifest.json").unlink()
    assert "Run the same ascend-v4 repack again" in refusal(directory)


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_an_interrupted_output_says_how_to_go_on(tmp_path, run_cli, verb):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "repack.journal").write_text("")
    (tmp_path / "in.json").write_text('{"prompts": [{"input_ids": [1]}]}')
    options = {
        "score": ["--input", tmp_path / "in.json", "--output", tmp_path / "x.safetensors"],
        "generate": ["--prompt", "x"],
    }
    result = run_cli(verb, tmp_path / "out", *options[verb])
    assert result.exit_code == 2
    assert "goes on from where it was interrupted" in " ".join(result.stderr.split())


def test_a_missing_scale_is_named_with_its_file(pack):
    directory = pack("mx", "native")
    scale = "layers.0.attn.wq_b.scale"
    (part,) = directory.glob("*.safetensors")
    raw = part.read_bytes()
    part.write_bytes(raw.replace(scale.encode(), b"layers.0.attn.wq_b.scalX", 1))
    message = refusal(directory)
    assert scale in message
    assert part.name in message


def test_asymmetric_weights_are_refused(pack):
    directory = pack("w8a8", "modelslim")
    (part,) = directory.glob("*.safetensors")
    stored = CheckpointReader.open(directory).stored(EXPERT + "_offset")
    with part.open("r+b") as stream:
        stream.seek(stored.offset_bytes)
        stream.write(np.float32(3).tobytes())
    with pytest.raises(CheckpointError, match="asymmetric"):
        described_weight(directory, EXPERT)


def test_a_scale_that_is_not_finite_is_named(pack):
    directory = pack("w8a8", "native")
    (part,) = directory.glob("*.safetensors")
    stored = CheckpointReader.open(directory).stored(EXPERT + "_scale")
    with part.open("r+b") as stream:
        stream.seek(stored.offset_bytes + 4)
        stream.write(np.float32(np.nan).tobytes())
    with pytest.raises(CheckpointError, match=r"w2\.weight_scale is nan in row 1"):
        described_weight(directory, EXPERT)


def test_kept_release_tensors_are_no_surprise(sources, tmp_path):
    output = repack(sources / "official", tmp_path / "reversible", target="w8a8", reversible=True)
    reader = CheckpointReader.open(output)
    reader.verify()
    assert EXPERT.replace("weight", "release_scale") in reader._files.tensors
    assert reader.unexpected == ()


@pytest.mark.parametrize("layout", DESCRIPTIONS)
def test_inspect_describes_a_pack(sources, layout):
    summary = examine(sources / f"w8a8-{layout}").summary
    assert summary["pack"]["scheme"] == "w8a8"
    assert summary["missing"] == summary["unexpected"] == []
    assert summary["quantization"]["experts"] == "int8_channel"
    assert summary["parameters"] == examine(sources / "official").summary["parameters"]


def test_a_checkpoint_in_the_release_layout_is_no_pack(sources):
    assert CheckpointReader.open(sources / "official").pack is None
    assert examine(sources / "official").summary["pack"] is None
