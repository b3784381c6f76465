"""Layouts: the files a plan becomes, their headers and their descriptions."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from ascend_v4.checkpoint.index import DTYPE_BYTES
from ascend_v4.checkpoint.shards import scan_shards
from ascend_v4.config import parse_model_config
from ascend_v4.errors import CheckpointError, ConfigError
from ascend_v4.repack.layouts import (
    DocumentInputs,
    LayoutName,
    Ranks,
    copied_files,
    disk_bytes,
    layout_for,
    parse_ranks,
    restore_release_fields,
)
from ascend_v4.repack.recipes import Target
from ascend_v4.repack.source_forms import TensorKind
from tests.repack.planning import (
    Shape,
    conversion,
    draft_model,
    model_config,
    model_fields,
    planned,
    release_tensors,
    written_tensors,
)

SMALL_PARTS = 1 << 20
LAYOUTS = [
    (LayoutName.NATIVE, Target.W8A8, {}),
    (LayoutName.NATIVE, Target.W8A8, {"reversible": True}),
    (LayoutName.NATIVE, Target.W4A8, {}),
    (LayoutName.NATIVE, Target.MX, {}),
    (LayoutName.NATIVE, Target.RELEASE, {}),
    (LayoutName.MODELSLIM, Target.W8A8, {}),
    (LayoutName.MODELSLIM, Target.W4A8, {}),
    (LayoutName.MODELSLIM, Target.MX, {}),
    (LayoutName.HUGGINGFACE, Target.BF16, {}),
]


def laid_out(layout, target, *, max_part_bytes=SMALL_PARTS, ranks=None, fields=None, **options):
    fields = fields or model_fields()
    plan = planned(target, config=parse_model_config(fields), **options)
    chosen = layout_for(layout)
    parts = chosen.parts(parse_model_config(fields), plan, max_part_bytes=max_part_bytes, ranks=ranks)
    inputs = DocumentInputs(config_fields=fields, source={"config_sha256": "00"}, ranks=ranks)
    return parts, chosen.documents(plan, parts, inputs)


def write_empty(directory, parts, documents):
    """The planned files with real headers and zeros for weights."""
    for name, text in documents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)
    for part in parts:
        with (directory / part.file_name).open("wb") as stream:
            stream.write(part.header)
            stream.truncate(part.num_bytes)


def outputs_of(parts):
    return {placed.output.name: placed.output for part in parts for placed in part.tensors}


@pytest.mark.parametrize(("layout", "target", "options"), LAYOUTS)
def test_reader_finds_every_planned_tensor_where_the_plan_puts_it(tmp_path, layout, target, options):
    parts, documents = laid_out(layout, target, **options)
    write_empty(tmp_path, parts, documents)

    found = scan_shards(tmp_path)

    assert found.problems == ()
    assert {name: (item.file, item.offset_bytes, item.dtype) for name, item in found.tensors.items()} == {
        placed.output.name: (part.file_name, placed.offset_bytes, placed.output.dtype)
        for part in parts
        for placed in part.tensors
    }


@pytest.mark.parametrize(("layout", "target", "options"), LAYOUTS)
def test_index_places_every_tensor_and_counts_its_bytes(layout, target, options):
    parts, documents = laid_out(layout, target, **options)
    index = json.loads(next(text for name, text in documents.items() if name.endswith(".index.json")))

    assert index["weight_map"] == {
        placed.output.name: part.file_name for part in parts for placed in part.tensors
    }
    assert index["metadata"]["total_size"] == sum(output.num_bytes for output in outputs_of(parts).values())


@pytest.mark.parametrize(("layout", "target", "options"), LAYOUTS)
def test_tensors_are_aligned_and_leave_no_gaps(layout, target, options):
    parts, _ = laid_out(layout, target, **options)

    for part in parts:
        ends = [placed.offset_bytes + placed.num_bytes for placed in part.tensors]
        starts = [placed.offset_bytes for placed in part.tensors]
        assert [len(part.header), *ends[:-1]] == starts
        assert ends[-1] == part.num_bytes
        assert all(placed.offset_bytes % DTYPE_BYTES[placed.output.dtype] == 0 for placed in part.tensors)


def test_odd_shapes_are_aligned_too():
    # a long integer after three floats, a byte-sized scale and an odd row of bf16
    tensors = {
        "layers.0.hc_attn_scale": Shape("F32", (3,)),
        "layers.0.attn.wq_a.weight": Shape("F8_E4M3", (3, 36)),
        "layers.0.attn.wq_a.scale": Shape("F8_E8M0", (1, 1)),
        "layers.0.attn.wq_b.weight": Shape("F8_E4M3", (3, 36)),
        "layers.0.attn.wq_b.scale": Shape("F8_E8M0", (1, 1)),
        "layers.0.ffn.gate.bias": Shape("BF16", (5,)),
        "layers.0.ffn.gate.tid2eid": Shape("I64", (7, 3)),
        "layers.0.odd": Shape("U8", (5,)),
    }
    parts, _ = laid_out(LayoutName.NATIVE, Target.W8A8, tensors=tensors)

    (part,) = parts
    assert len(part.tensors) == 7
    assert all(placed.offset_bytes % DTYPE_BYTES[placed.output.dtype] == 0 for placed in part.tensors)


@pytest.mark.parametrize(("layout", "target", "options"), LAYOUTS)
def test_tensors_are_in_order_with_the_uneven_ones_at_the_end(layout, target, options):
    parts, _ = laid_out(layout, target, **options)

    for part in parts:
        planned_order = [
            (output, index) for index, item in enumerate(part.conversions) for output in item.outputs
        ]
        even = [entry for entry in planned_order if entry[0].num_bytes % 8 == 0]
        placed = [(placed.output, placed.conversion_index) for placed in part.tensors]
        assert placed[: len(even)] == even
        assert len(placed) == len(planned_order)
        assert all(item.outputs[0].kind is TensorKind.WEIGHT for item in part.conversions)


def test_parts_keep_to_their_bound_and_fill_it():
    parts, _ = laid_out(LayoutName.NATIVE, Target.W8A8)
    data_bytes = [part.num_bytes - len(part.header) for part in parts]

    assert len(parts) > 3
    assert max(data_bytes) <= SMALL_PARTS
    assert all(first + second > SMALL_PARTS for first, second in pairwise(data_bytes))


def test_matrices_of_an_expert_share_a_file():
    parts, _ = laid_out(LayoutName.NATIVE, Target.W4A8, max_part_bytes=1 << 16)
    files: dict[str, set[str]] = {}
    for part in parts:
        for item in part.conversions:
            if item.part == "experts":
                files.setdefault(item.name.rsplit(".", 2)[0], set()).add(part.file_name)

    assert len(files) == 7 * 16
    assert all(len(names) == 1 for names in files.values())


def test_tensor_larger_than_a_part_gets_a_file_of_its_own():
    parts, _ = laid_out(LayoutName.NATIVE, Target.W8A8, max_part_bytes=1 << 16)
    large = [part for part in parts if part.num_bytes - len(part.header) > 1 << 16]

    assert large
    # one conversion, or the three of one expert
    assert all(len(part.conversions) in (1, 3) for part in large)


@pytest.mark.parametrize("max_part_bytes", [0, 1000, 1 << 50])
def test_part_size_out_of_bounds_is_refused(max_part_bytes):
    with pytest.raises(ConfigError, match="the part size is"):
        laid_out(LayoutName.NATIVE, Target.W8A8, max_part_bytes=max_part_bytes)


def test_equal_plans_give_equal_bytes():
    first, second = (laid_out(LayoutName.MODELSLIM, Target.W4A8) for _ in range(2))

    assert [part.header for part in first[0]] == [part.header for part in second[0]]
    assert first[1] == second[1]


def test_free_disk_asked_for_covers_every_file():
    parts, documents = laid_out(LayoutName.NATIVE, Target.W8A8)
    files = sum(part.num_bytes for part in parts) + sum(map(len, documents.values()))

    assert files + 1000 < disk_bytes(parts, documents, copied_bytes=1000) < files + (100 << 20)


def test_native_pack_describes_every_weight():
    parts, documents = laid_out(LayoutName.NATIVE, Target.W8A8, reversible=True)
    pack = json.loads(documents["ascend_v4.json"])

    assert (pack["format"], pack["version"], pack["scheme"]) == ("ascend_v4", 1, "w8a8")
    assert (pack["recipe"], pack["rounding"], pack["rotation"]) == ("accurate", "exact", "none")
    assert pack["source"] == {"config_sha256": "00"}
    assert pack["tensors"]["layers.0.attn.wq_b.weight"] == {"format": "int8_channel", "reversible": True}
    assert pack["tensors"].keys() == {item.name for part in parts for item in part.conversions}


@pytest.mark.parametrize("target", [Target.W8A8, Target.W4A8, Target.MX, Target.BF16])
def test_native_config_gives_its_release_fields_to_the_description(target):
    fields = model_fields()
    _, documents = laid_out(LayoutName.NATIVE, target)
    config = json.loads(documents["config.json"])
    pack = json.loads(documents["ascend_v4.json"])

    assert not {"quantization_config", "expert_dtype"} & config.keys()
    assert restore_release_fields(config, pack) == fields


def test_release_config_is_that_of_the_source():
    _, documents = laid_out(LayoutName.NATIVE, Target.RELEASE)

    assert json.loads(documents["config.json"]) == model_fields()


def test_release_config_of_an_older_release_gains_no_fields():
    fields = model_fields()
    del fields["expert_dtype"]

    _, documents = laid_out(LayoutName.NATIVE, Target.RELEASE, fields=fields)

    assert json.loads(documents["config.json"]) == fields


def test_pack_without_a_description_of_ours_gets_the_usual_release_fields():
    fields = model_fields()
    plain = {key: fields[key] for key in fields if key not in ("quantization_config", "expert_dtype")}

    assert restore_release_fields(plain) == fields


def test_config_of_an_unquantised_source_stays_unquantised():
    fields = model_fields()
    del fields["quantization_config"], fields["expert_dtype"]
    _, documents = laid_out(LayoutName.NATIVE, Target.W8A8, fields=fields)

    pack = json.loads(documents["ascend_v4.json"])

    assert restore_release_fields(json.loads(documents["config.json"]), pack) == fields


def test_tensors_without_a_rule_are_listed_in_the_pack():
    config, tensors = draft_model()
    plan = planned(Target.W8A8, config=config, tensors=tensors)
    layout = layout_for(LayoutName.NATIVE)
    parts = layout.parts(config, plan)

    documents = layout.documents(plan, parts, DocumentInputs(config_fields=model_fields()))

    assert json.loads(documents["ascend_v4.json"])["unruled"] == [
        "mtp.1.confidence",
        "mtp.2.markov.weight",
        "mtp.2.markov.scale",
    ]


def test_modelslim_description_gives_every_tensor_a_type():
    parts, documents = laid_out(LayoutName.MODELSLIM, Target.W4A8)
    description = json.loads(documents["quant_model_description.json"])
    expert, linear = "layers.0.ffn.experts.0.w1", "layers.0.attn.wq_b"

    assert description.keys() - outputs_of(parts).keys() == {
        "version",
        "model_quant_type",
        "group_size",
        "metadata",
        "optional",
    }
    assert {description[f"{expert}.{suffix}"] for suffix in ("weight", "weight_scale", "scale_bias")} == {
        "W4A8_DYNAMIC"
    }
    assert description[f"{linear}.weight_offset"] == "W8A8_DYNAMIC"
    assert description["layers.0.attn.wkv.weight"] == description["embed.weight"] == "FLOAT"
    assert (description["version"], description["model_quant_type"]) == ("1.0.0", "W4A8_DYNAMIC")


def test_modelslim_int8_has_scale_and_zero_offset_per_row():
    parts, _ = laid_out(LayoutName.MODELSLIM, Target.W8A8)
    outputs = outputs_of(parts)
    stem = "layers.0.attn.wq_b"

    assert {suffix: outputs[f"{stem}.{suffix}"].shape for suffix in ("weight", "weight_scale")} == {
        "weight": (1024, 128),
        "weight_scale": (1024, 1),
    }
    assert outputs[f"{stem}.weight_offset"].shape == (1024, 1)
    assert outputs[f"{stem}.weight_offset"].kind is TensorKind.OFFSET


def test_modelslim_int4_packs_rows_and_splits_the_bias_of_the_down_projection():
    parts, _ = laid_out(LayoutName.MODELSLIM, Target.W4A8)
    outputs = outputs_of(parts)
    stem = "mtp.0.ffn.experts.5"

    assert outputs[f"{stem}.w1.weight"].shape == (64, 256)
    assert outputs[f"{stem}.w1.scale_bias"].shape == outputs[f"{stem}.w3.scale_bias"].shape == (128, 1)
    assert outputs[f"{stem}.w2.weight"].shape == (128, 128)
    assert outputs[f"{stem}.w2.scale_bias"].shape == (256, 16)
    assert f"{stem}.w2.weight_bias" not in outputs


def test_modelslim_mx_spells_codes_and_scales_as_bytes():
    parts, documents = laid_out(LayoutName.MODELSLIM, Target.MX)
    outputs = outputs_of(parts)
    description = json.loads(documents["quant_model_description.json"])
    expert, linear = "layers.0.ffn.experts.0.w1", "layers.0.attn.wq_a"

    assert (outputs[f"{expert}.weight"].dtype, outputs[f"{expert}.weight_scale"].dtype) == ("U8", "U8")
    assert (outputs[f"{linear}.weight"].dtype, outputs[f"{linear}.weight_scale"].dtype) == ("F8_E4M3", "U8")
    assert (description[f"{expert}.weight"], description[f"{linear}.weight"]) == ("W4A8_MXFP", "W8A8_MXFP8")


@pytest.mark.parametrize("target", [Target.W8A8, Target.W4A8, Target.MX])
def test_modelslim_pack_is_a_source_of_the_same_weights(target):
    parts, _ = laid_out(LayoutName.MODELSLIM, target)
    tensors = {name: Shape(output.dtype, output.shape) for name, output in outputs_of(parts).items()}

    again = planned(target, tensors=tensors)

    native = written_tensors(planned(target))
    biases = {name for name in native if name.endswith("w2.weight_bias")}
    assert written_tensors(again).keys() == native.keys()
    assert {name: shape for name, shape in written_tensors(again).items() if name not in biases} == {
        name: shape for name, shape in native.items() if name not in biases
    }


def test_modelslim_config_has_no_quantization_config():
    _, documents = laid_out(LayoutName.MODELSLIM, Target.W8A8)

    assert "quantization_config" not in json.loads(documents["config.json"])
    assert documents.keys() == {
        "config.json",
        "quant_model_weights.safetensors.index.json",
        "quant_model_description.json",
    }


def test_modelslim_refuses_a_native_int4_pack_whose_bias_is_not_split():
    tensors = written_tensors(planned(Target.W4A8))

    with pytest.raises(ConfigError, match=r"has shape \[256, 1\]; --layout modelslim needs \[256, 16\]"):
        laid_out(LayoutName.MODELSLIM, Target.W4A8, tensors=tensors)


@pytest.mark.parametrize(
    ("layout", "target", "options", "words"),
    [
        (LayoutName.MODELSLIM, Target.BF16, {}, "does not hold --to bf16"),
        (LayoutName.MODELSLIM, Target.RELEASE, {}, "does not hold --to release"),
        (LayoutName.MODELSLIM, Target.W8A8, {"reversible": True}, "no place for the release's scales"),
        (LayoutName.MODELSLIM, Target.W8A8, {"ranks": Ranks(tp=2, ep=2)}, "--ranks does not go with"),
        (LayoutName.HUGGINGFACE, Target.W8A8, {}, "holds bf16 only"),
        (LayoutName.HUGGINGFACE, Target.BF16, {"reversible": True}, "--reversible does not go with"),
        (LayoutName.HUGGINGFACE, Target.BF16, {"ranks": Ranks(tp=2, ep=2)}, "--ranks does not go with"),
    ],
)
def test_layout_refuses_what_it_cannot_hold(layout, target, options, words):
    with pytest.raises(ConfigError, match=words):
        laid_out(layout, target, **options)


def test_huggingface_config_suits_transformers():
    _, documents = laid_out(LayoutName.HUGGINGFACE, Target.BF16)
    config = json.loads(documents["config.json"])

    assert not {"quantization_config", "expert_dtype"} & config.keys()
    assert config["rope_scaling"]["rope_type"] == config["rope_scaling"]["type"] == "yarn"
    assert config["torch_dtype"] == "bfloat16"
    assert not parse_model_config(config).quantized


def test_huggingface_holds_the_release_names_with_the_mtp_blocks():
    parts, _ = laid_out(LayoutName.HUGGINGFACE, Target.BF16)
    weights = {name for name in release_tensors(model_config()) if not name.endswith(".scale")}

    assert outputs_of(parts).keys() == weights


RANKS = Ranks(tp=2, ep=4)


def test_each_rank_has_a_folder_that_is_a_whole_pack(tmp_path):
    parts, documents = laid_out(LayoutName.NATIVE, Target.W8A8, ranks=RANKS)
    write_empty(tmp_path, parts, documents)

    for rank in range(4):
        found = scan_shards(tmp_path / f"rank-{rank:03d}")
        own = json.loads((tmp_path / f"rank-{rank:03d}" / "ascend_v4.json").read_text())
        assert found.problems == ()
        assert found.tensors.keys() == outputs_of(part for part in parts if part.rank == rank).keys()
        assert own["rank"] == {"index": rank, "tp": 2, "ep": 4, "tp_rank": rank % 2, "ep_rank": rank}
    assert json.loads(documents["ascend_v4.json"])["ranks"]["folders"] == [
        f"rank-00{rank}" for rank in range(4)
    ]


def test_experts_go_to_ranks_in_contiguous_ranges_without_overlap():
    parts, _ = laid_out(LayoutName.NATIVE, Target.W4A8, ranks=RANKS)
    experts = {
        rank: {
            int(item.name.split(".")[-3])
            for part in parts
            if part.rank == rank
            for item in part.conversions
            if item.part == "experts"
        }
        for rank in range(4)
    }

    assert experts == {rank: set(range(4 * rank, 4 * rank + 4)) for rank in range(4)}


@pytest.mark.parametrize("target", [Target.W8A8, Target.W4A8, Target.MX, Target.BF16, Target.RELEASE])
def test_windows_of_the_tensor_ranks_tile_every_sliced_tensor(target):
    whole = written_tensors(planned(target))
    parts, _ = laid_out(LayoutName.NATIVE, target, ranks=Ranks(tp=4, ep=4))
    windows: dict[str, list[tuple[tuple[int, int], ...]]] = {}
    for part in parts:
        for placed in part.tensors:
            if placed.output.window is not None:
                assert placed.output.shape == tuple(stop - start for start, stop in placed.output.window)
                windows.setdefault(placed.output.name, []).append(placed.output.window)

    assert {name.split(".", 2)[2] for name in windows if name.startswith("layers.2.")} >= {
        "attn.wq_b.weight",
        "attn.wo_a.weight",
        "attn.wo_b.weight",
        "attn.attn_sink",
        "attn.indexer.wq_b.weight",
        "attn.indexer.weights_proj.weight",
    }
    for name, ranked in windows.items():
        axis = 1 if ".wo_b." in name else 0
        edges = [window[axis] for window in ranked]
        assert [edges[0][0], edges[-1][1]] == [0, whole[name].shape[axis]]
        assert [stop for _, stop in edges[:-1]] == [start for start, _ in edges[1:]]
        assert all(
            window[other] == (0, whole[name].shape[other])
            for window in ranked
            for other in range(len(window))
            if other != axis
        )


def test_embedding_and_head_are_cut_by_vocabulary_rows():
    parts, _ = laid_out(LayoutName.NATIVE, Target.W8A8, ranks=RANKS)
    shapes = [
        placed.output.shape
        for part in parts
        for placed in part.tensors
        if placed.output.name in ("embed.weight", "head.weight")
    ]

    assert shapes == [(256, 256)] * 8


def test_scale_of_a_row_is_on_every_rank_where_columns_are_cut():
    parts, _ = laid_out(LayoutName.NATIVE, Target.W8A8, ranks=RANKS)
    items = [item for part in parts for item in part.conversions if item.name == "layers.0.attn.wo_b.weight"]

    assert [item.kept_columns for item in items] == [(0, 256), (256, 512), (0, 256), (256, 512)]
    assert {item.outputs[0].shape for item in items} == {(256, 256)}
    assert {item.outputs[1].shape for item in items} == {(256, 1)}


def test_slices_are_stated_with_their_range_and_whole_shape():
    _, documents = laid_out(LayoutName.NATIVE, Target.W8A8, ranks=RANKS)
    slices = json.loads(documents["rank-001/ascend_v4.json"])["slices"]

    assert slices["layers.0.attn.wq_b.weight"] == {"axis": 0, "range": [512, 1024], "of": [1024, 128]}
    assert slices["layers.0.attn.wo_b.weight"] == {"axis": 1, "range": [256, 512], "of": [256, 512]}
    assert "layers.0.attn.wq_a.weight" not in slices


def test_what_is_not_shared_out_is_on_every_rank():
    parts, _ = laid_out(LayoutName.NATIVE, Target.W8A8, ranks=RANKS)
    ranks = {part.rank for part in parts if "layers.3.attn.wkv.weight" in outputs_of([part])}

    assert ranks == {0, 1, 2, 3}


def test_one_rank_holds_what_no_ranks_hold():
    parts, _ = laid_out(LayoutName.NATIVE, Target.MX, ranks=Ranks(tp=1, ep=1))

    assert outputs_of(parts) == outputs_of(laid_out(LayoutName.NATIVE, Target.MX)[0])


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (Ranks(tp=1, ep=3), r"routed experts \(16\) do not divide over ep=3. Use one of: 1, 2, 4, 8, 16"),
        (Ranks(tp=8, ep=16), r"o_groups \(4\) do not divide over tp=8. Use one of: 1, 2, 4"),
    ],
)
def test_counts_that_do_not_divide_are_refused(ranks, words):
    with pytest.raises(ConfigError, match=words):
        laid_out(LayoutName.NATIVE, Target.W8A8, ranks=ranks)


def test_slice_through_a_scale_block_is_refused():
    # four groups of 64 rows: a block of 128 rows has one scale
    fields = model_fields(o_lora_rank=64)

    with pytest.raises(ConfigError, match=r"wo_a.scale, which has one element per 128. Use a smaller tp"):
        laid_out(LayoutName.NATIVE, Target.RELEASE, fields=fields, ranks=Ranks(tp=4, ep=4))


def test_slice_that_respects_groups_but_not_blocks_is_fine_for_mx():
    fields = model_fields(o_lora_rank=64)

    parts, _ = laid_out(LayoutName.NATIVE, Target.MX, fields=fields, ranks=Ranks(tp=4, ep=4))

    assert outputs_of(parts)["layers.0.attn.wo_b.scale"].shape == (256, 2)


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        ("tp=8,ep=16", Ranks(tp=8, ep=16)),
        ("ep=4", Ranks(tp=1, ep=4)),
        ("tp=2", Ranks(tp=2, ep=2)),
    ],
)
def test_ranks_are_read_from_text(text, ranks):
    assert parse_ranks(text) == ranks


@pytest.mark.parametrize("text", ["", "8", "tp=", "tp=two", "tp=-1", "tp=2,tp=2", "dp=2", "tp=1000000"])
def test_malformed_ranks_are_refused(text):
    with pytest.raises(ConfigError, match="is not of the form tp=8,ep=16"):
        parse_ranks(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=8,ep=4", "ep must be a multiple of tp"),
        ("tp=0", "both must be in"),
        ("ep=4096", "both must be in"),
    ],
)
def test_ranks_that_cannot_be_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_ranks(text)


def test_tokenizer_and_generation_files_are_copied_through(tmp_path):
    for name in ("tokenizer.json", "generation_config.json", "notes.txt", "config.json"):
        (tmp_path / name).write_text("{}")

    assert copied_files(tmp_path) == (("tokenizer.json", 2), ("generation_config.json", 2))


def test_file_too_large_to_copy_is_refused(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as stream:
        stream.truncate((64 << 20) + 1)

    with pytest.raises(CheckpointError, match="the bound for a copied file is 67108864"):
        copied_files(tmp_path)


def test_sliced_conversion_still_reads_the_whole_sources():
    parts, _ = laid_out(LayoutName.NATIVE, Target.W8A8, ranks=RANKS)
    whole = conversion(planned(Target.W8A8), "layers.0.attn.wq_b.weight")
    items = [item for part in parts for item in part.conversions if item.name == whole.name]

    assert {item.sources for item in items} == {whole.sources}
    assert [item.kept_rows for item in items] == [(0, 512), (512, 1024), (0, 512), (512, 1024)]
