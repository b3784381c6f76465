"""Recipes and plans: what becomes what, for every target, option and kind of source."""

from __future__ import annotations

import pytest

from ascend_v4.errors import CheckpointError, ConfigError
from ascend_v4.repack.plan import Action, parse_keep, plan_outputs, plan_totals
from ascend_v4.repack.recipes import (
    RoundingChoice,
    Target,
    Wanted,
    WeightForm,
    classify,
    explain,
    load_recipe,
    model_parts,
    recipe_names,
)
from tests.repack.planning import (
    Shape,
    conversion,
    draft_model,
    model_config,
    planned,
    release_tensors,
    written_tensors,
)

QUANTISED = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b", "shared_experts", "experts", "mtp.proj")
EVERY_RECIPE = [(target, name) for target in Target for name in recipe_names(target)]


@pytest.mark.parametrize(
    ("name", "int8"),
    [
        ("accurate", {"experts", "shared_experts", "wq_b", "wo_b", "indexer.wq_b"}),
        ("modelslim", {"experts", "shared_experts", "wq_a", "wq_b", "wkv", "indexer.wq_b"}),
        ("cann", {"experts", "shared_experts", "wq_b", "wo_b", "indexer.wq_b", "mtp.proj"}),
    ],
)
def test_w8a8_recipe_makes_these_parts_int8_and_the_other_quantised_ones_bf16(name, int8):
    rules = {rule.part: rule.wanted for rule in load_recipe(Target.W8A8, name).rules}

    assert {part for part, wanted in rules.items() if wanted is Wanted.INT8} == int8
    assert {part for part, wanted in rules.items() if wanted is Wanted.BF16} == set(QUANTISED) - int8


def test_the_accurate_recipe_is_the_default_of_w8a8():
    assert load_recipe(Target.W8A8) == load_recipe(Target.W8A8, "accurate")


@pytest.mark.parametrize("name", recipe_names(Target.W8A8))
def test_w4a8_differs_from_w8a8_in_the_routed_experts_only(name):
    eight = {rule.part: rule for rule in load_recipe(Target.W8A8, name).rules}
    four = {rule.part: rule for rule in load_recipe(Target.W4A8, name).rules}

    assert {part for part in four if four[part] != eight[part]} == {"experts"}
    assert four["experts"].wanted is Wanted.INT4


@pytest.mark.parametrize(("target", "name"), EVERY_RECIPE)
def test_recipe_has_a_rule_for_every_quantised_part(target, name):
    assert {rule.part for rule in load_recipe(target, name).rules} == set(QUANTISED)


def test_unknown_recipe_is_refused_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"no recipe 'best' for --to w8a8.*accurate, modelslim, cann"):
        load_recipe(Target.W8A8, "best")


def test_modelslim_recipe_says_that_nothing_is_rotated():
    assert "not rotated" in load_recipe(Target.W8A8, "modelslim").summary


@pytest.mark.parametrize(("target", "name"), EVERY_RECIPE)
def test_explanation_names_every_part_with_its_reason(target, name):
    recipe = load_recipe(target, name)

    text = explain(recipe)

    assert all(f"  {part}" in text for part in model_parts())
    assert all(rule.why in text for rule in recipe.rules)


def test_every_tensor_of_the_release_belongs_to_a_part_or_to_a_weight():
    assert planned(Target.W8A8).unruled == ()


def test_scales_and_names_outside_the_blocks_have_no_part():
    assert classify("layers.3.attn.wq_a.scale") is None
    assert classify("vision.3.attn.wq_a.weight") is None
    assert classify("attn.wq_a.weight") is None


@pytest.mark.parametrize(
    ("config_name", "target", "gib"),
    [
        ("flash", Target.W8A8, 274.4),
        ("pro", Target.W8A8, 1497.9),
    ],
)
def test_output_of_the_real_configs_has_this_many_gib(config_name, target, gib):
    totals = plan_totals(planned(target, config=model_config(config_name)).conversions)

    assert round(totals.written_bytes / 2**30, 1) == gib


def test_release_of_the_release_has_the_published_bytes():
    totals = plan_totals(planned(Target.RELEASE, config=model_config("flash")).conversions)

    assert totals.written_bytes == totals.read_bytes == 159_609_485_896
    assert set(totals.bytes_by_action) == {"copy"}


def test_totals_by_dtype_and_by_action_add_up():
    totals = plan_totals(planned(Target.W4A8).conversions)

    assert sum(totals.bytes_by_dtype.values()) == totals.written_bytes
    assert sum(totals.bytes_by_action.values()) == totals.written_bytes


@pytest.mark.parametrize(
    ("target", "name", "action", "outputs"),
    [
        (
            Target.W8A8,
            "layers.0.ffn.experts.3.w1",
            Action.FP4_TO_INT8,
            {"weight": ("I8", (128, 256)), "weight_scale": ("F32", (128, 1))},
        ),
        (
            Target.W4A8,
            "layers.0.ffn.experts.3.w2",
            Action.FP4_TO_INT4,
            {
                "weight": ("I8", (128, 128)),
                "weight_scale": ("F32", (256, 1)),
                "weight_bias": ("F32", (256, 1)),
            },
        ),
        (
            Target.W8A8,
            "layers.2.attn.indexer.wq_b",
            Action.FP8_TO_INT8,
            {"weight": ("I8", (4096, 128)), "weight_scale": ("F32", (4096, 1))},
        ),
        (Target.W8A8, "layers.0.attn.wkv", Action.FP8_TO_BF16, {"weight": ("BF16", (128, 256))}),
        (
            Target.MX,
            "layers.0.attn.wq_a",
            Action.FP8_TO_MX,
            {"weight": ("F8_E4M3", (128, 256)), "scale": ("F8_E8M0", (128, 8))},
        ),
        (
            Target.MX,
            "layers.0.ffn.experts.0.w3",
            Action.COPY,
            {"weight": ("I8", (128, 128)), "scale": ("F8_E8M0", (128, 8))},
        ),
        (Target.BF16, "mtp.0.ffn.experts.1.w1", Action.FP4_TO_BF16, {"weight": ("BF16", (128, 256))}),
    ],
)
def test_weight_becomes_these_tensors(target, name, action, outputs):
    item = conversion(planned(target), f"{name}.weight")

    assert item.action is action
    assert {output.name: (output.dtype, output.shape) for output in item.outputs} == {
        f"{name}.{suffix}": value for suffix, value in outputs.items()
    }


def test_rounding_is_stated_for_experts_born_in_fp4_only():
    plan = planned(Target.W8A8, rounding=RoundingChoice.ABSMAX)

    assert conversion(plan, "layers.0.ffn.experts.0.w1.weight").rounding is RoundingChoice.ABSMAX
    assert conversion(plan, "layers.0.attn.wq_b.weight").rounding is None


@pytest.mark.parametrize(
    "name", ["embed.weight", "layers.0.ffn.gate.tid2eid", "layers.2.attn.compressor.wkv.weight"]
)
def test_plain_tensors_of_the_release_are_copied(name):
    item = conversion(planned(Target.W4A8), name)

    assert item.action is Action.COPY
    assert [output.shape for output in item.outputs] == [source.shape for source in item.sources]
    assert "stored" in item.reason


def test_order_is_layers_then_mtp_blocks_then_the_rest():
    sections = [item.name.split(".")[0] for item in planned(Target.W8A8).conversions]

    assert list(dict.fromkeys(sections))[:2] == ["layers", "mtp"]
    assert sections == sorted(sections, key=lambda section: {"layers": 0, "mtp": 1}.get(section, 2))


def test_order_does_not_depend_on_that_of_the_files():
    config = model_config()
    tensors = release_tensors(config)
    turned = dict(reversed(tensors.items()))

    assert planned(Target.W8A8, tensors=turned).conversions == planned(Target.W8A8).conversions


def test_layer_ten_comes_after_layer_nine():
    config = model_config(num_hidden_layers=11, compress_ratios=[0] * 12)
    plan = planned(Target.W8A8, config=config)
    layers = [int(item.name.split(".")[1]) for item in plan.conversions if item.name.startswith("layers.")]

    assert layers == sorted(layers)


def test_keep_leaves_a_weight_exact_in_bf16():
    plan = planned(Target.W8A8, keep=["*.attn.wo_b.weight"])

    assert conversion(plan, "layers.0.attn.wo_b.weight").action is Action.FP8_TO_BF16
    assert conversion(plan, "layers.0.attn.wq_b.weight").action is Action.FP8_TO_INT8


def test_keep_may_name_weights_no_rule_is_for():
    config, tensors = draft_model()

    plan = planned(Target.W8A8, config=config, tensors=tensors, keep=["mtp.2.markov.weight"])

    assert conversion(plan, "mtp.2.markov.weight").action is Action.FP8_TO_BF16


@pytest.mark.parametrize("pattern", ["*.wo_c.weight", "embed.weight", "wo_b"])
def test_keep_pattern_that_changes_nothing_is_refused(pattern):
    with pytest.raises(ConfigError, match="matches no weight"):
        planned(Target.W8A8, keep=["*.attn.wo_b.weight", pattern])


def test_each_of_two_keep_patterns_counts_where_they_overlap():
    plan = planned(Target.W8A8, keep=["*.wo_b.weight", "layers.0.attn.wo_b.weight"])

    assert conversion(plan, "layers.0.attn.wo_b.weight").after is WeightForm.PLAIN


@pytest.mark.parametrize("value", ["fp8=*.wo_b.weight", "*.wo_b.weight", "bf16=", "bf16", ""])
def test_keep_of_another_kind_is_refused(value):
    with pytest.raises(ConfigError, match="bf16=PATTERN"):
        parse_keep([value])


def test_keep_gives_its_patterns():
    assert parse_keep(["bf16=*.wo_b.weight", "bf16=a=b"]) == ("*.wo_b.weight", "a=b")


def test_draft_blocks_follow_the_same_rules():
    config, tensors = draft_model()

    plan = planned(Target.W8A8, config=config, tensors=tensors)

    for block in range(3):
        prefix = f"mtp.{block}."
        assert conversion(plan, f"{prefix}ffn.experts.7.w2.weight").action is Action.FP4_TO_INT8
        assert conversion(plan, f"{prefix}attn.wq_b.weight").action is Action.FP8_TO_INT8
        assert conversion(plan, f"{prefix}e_proj.weight").action is Action.FP8_TO_BF16


def test_tensors_without_a_rule_pass_through_and_are_listed():
    config, tensors = draft_model()
    unknown = ("mtp.1.confidence", "mtp.2.markov.weight", "mtp.2.markov.scale")

    plan = planned(Target.W8A8, config=config, tensors=tensors)

    assert plan.unruled == unknown
    written = written_tensors(plan)
    assert {name: written[name] for name in unknown} == {name: tensors[name] for name in unknown}


def test_scale_without_a_weight_passes_through_and_is_listed():
    config = model_config()
    tensors = {**release_tensors(config), "layers.0.attn.wz.scale": Shape("F8_E8M0", (1, 1))}

    plan = planned(Target.W8A8, tensors=tensors)

    assert plan.unruled == ("layers.0.attn.wz.scale",)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.attn.wq_b.scale", Shape("F8_E8M0", (8, 2))),
        ("layers.0.attn.wq_b.scale", Shape("F32", (8, 1))),
        ("layers.0.ffn.experts.0.w1.scale", Shape("F8_E8M0", (128, 4))),
        ("layers.0.ffn.experts.0.w1.scale", None),
    ],
)
def test_scale_that_does_not_fit_its_weight_is_refused(name, change):
    tensors = release_tensors(model_config())
    del tensors[name]
    if change is not None:
        tensors[name] = change

    with pytest.raises(CheckpointError, match="no scale fits it"):
        planned(Target.W8A8, tensors=tensors)


def test_linear_in_float32_is_refused_where_it_would_be_rounded():
    tensors = release_tensors(model_config())
    del tensors["layers.0.attn.wq_b.scale"]
    tensors["layers.0.attn.wq_b.weight"] = Shape("F32", (1024, 128))

    with pytest.raises(CheckpointError, match="stored in F32"):
        planned(Target.W8A8, tensors=tensors)


def test_experts_in_fp8_become_int8_but_not_int4():
    config = model_config(expert_dtype="fp8")
    plan = planned(Target.W8A8, config=config)

    assert conversion(plan, "layers.0.ffn.experts.0.w1.weight").action is Action.FP8_TO_INT8
    with pytest.raises(CheckpointError, match="INT4 is made from FP4 experts only: use --to w8a8"):
        planned(Target.W4A8, config=config)


def test_unquantised_checkpoint_becomes_int8_from_bf16():
    plan = planned(Target.W8A8, config=model_config(quantization_config=None))

    assert conversion(plan, "layers.0.ffn.experts.0.w1.weight").action is Action.BF16_TO_INT8
    assert conversion(plan, "layers.0.attn.wq_a.weight").action is Action.COPY


@pytest.mark.parametrize("option", [{"keep": ["*.wo_b.weight"]}, {"reversible": True}])
def test_release_takes_no_options_that_change_weights(option):
    with pytest.raises(ConfigError, match="does not go with --to release"):
        planned(Target.RELEASE, **option)


def test_reversible_does_not_go_with_absmax():
    with pytest.raises(ConfigError, match="--reversible does not go with --rounding absmax"):
        planned(Target.W8A8, reversible=True, rounding=RoundingChoice.ABSMAX)


def test_reversible_keeps_scales_and_negative_zeros_of_fp4_and_the_codes_of_fp8():
    plan = planned(Target.W8A8, reversible=True)

    expert = conversion(plan, "layers.0.ffn.experts.0.w1.weight")
    linear = conversion(plan, "layers.0.attn.wq_b.weight")

    assert [(output.kind.value, output.dtype, output.shape) for output in expert.outputs[2:]] == [
        ("release_scale", "F8_E8M0", (128, 8)),
        ("negative_zeros", "U8", (128, 32)),
    ]
    assert [(output.kind.value, output.dtype, output.shape) for output in linear.outputs[2:]] == [
        ("release_weight", "F8_E4M3", (1024, 128)),
        ("release_scale", "F8_E8M0", (8, 1)),
    ]
    assert expert.reversible
    assert linear.reversible


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (Target.MX, {}),
        (Target.BF16, {}),
        (Target.BF16, {"reversible": True}),
        (Target.W8A8, {"reversible": True}),
    ],
)
def test_pack_goes_back_to_the_tensors_of_the_release(target, options):
    original = release_tensors(model_config())
    pack = planned(target, **options)

    back = planned(Target.RELEASE, tensors=written_tensors(pack))

    assert written_tensors(back) == original
    assert back.stuck == ()


@pytest.mark.parametrize(
    ("target", "options", "reversible"),
    [
        (Target.MX, {}, True),
        (Target.BF16, {}, False),
        (Target.BF16, {"reversible": True}, True),
        (Target.W8A8, {"reversible": True}, True),
    ],
)
def test_way_back_says_whether_the_bytes_are_identical(target, options, reversible):
    pack = planned(target, **options)
    back = planned(Target.RELEASE, tensors=written_tensors(pack))
    weights = [item for item in back.conversions if item.part in QUANTISED]

    # experts of MX are bit for bit MXFP4 already, and so are copied
    assert {item.reversible for item in weights if item.action is not Action.COPY} <= {reversible}
    assert all(item.reversible for item in pack.conversions) is reversible


def test_reversible_w8a8_reads_the_kept_tensors_on_the_way_back():
    pack = planned(Target.W8A8, reversible=True)
    back = planned(Target.RELEASE, tensors=written_tensors(pack))

    expert = conversion(back, "layers.0.ffn.experts.0.w1.weight")
    linear = conversion(back, "layers.0.attn.wq_b.weight")

    assert expert.action is Action.INT8_TO_FP4
    assert [source.kind.value for source in expert.sources] == [
        "weight",
        "weight_scale",
        "release_scale",
        "negative_zeros",
    ]
    assert linear.action is Action.COPY
    assert [source.name.rsplit(".", 1)[1] for source in linear.sources] == ["release_weight", "release_scale"]


def test_int8_from_fp8_stays_as_it_is_where_the_pack_kept_nothing():
    pack = planned(Target.W8A8)

    back = planned(Target.RELEASE, tensors=written_tensors(pack))

    assert "layers.0.attn.wq_b.weight" in back.stuck
    assert not any(".ffn.experts." in name for name in back.stuck)
    assert conversion(back, "layers.0.ffn.experts.0.w1.weight").action is Action.INT8_TO_FP4
    stuck = conversion(back, "layers.0.attn.wq_b.weight")
    assert "rounded to int8_channel when it was packed" in stuck.reason
    assert not stuck.reversible


def test_int4_cannot_go_back():
    back = planned(Target.RELEASE, tensors=written_tensors(planned(Target.W4A8, reversible=True)))

    assert conversion(back, "layers.0.ffn.experts.0.w1.weight").after is WeightForm.INT4_CHANNEL
    assert all(".ffn.experts." in name for name in back.stuck)
    assert len(back.stuck) == 7 * 16 * 3


@pytest.mark.parametrize("target", [Target.W4A8, Target.BF16, Target.MX])
def test_pack_becomes_another_target_only_through_the_release(target):
    tensors = written_tensors(planned(Target.W8A8))

    with pytest.raises(CheckpointError, match="give this pack back first with --to release"):
        planned(target, tensors=tensors)


def test_pack_of_the_same_target_is_copied():
    tensors = written_tensors(planned(Target.W8A8, reversible=True))

    again = planned(Target.W8A8, tensors=tensors)

    assert written_tensors(again) == tensors
    assert {item.action for item in again.conversions} == {Action.COPY}


def test_description_that_differs_from_the_files_is_refused():
    config = model_config()
    name = "layers.0.attn.wq_b.weight"
    tensors = written_tensors(planned(Target.W8A8))

    with pytest.raises(CheckpointError, match="described as int4_channel and stored as int8_channel"):
        plan_outputs(
            config,
            tensors,
            load_recipe(Target.RELEASE),
            described={name: WeightForm.INT4_CHANNEL},
        )


def test_description_decides_where_one_row_reads_both_ways():
    tensors = {"mtp.0.x.weight": Shape("F8_E4M3", (1, 32)), "mtp.0.x.scale": Shape("F8_E8M0", (1, 1))}

    guessed = planned(Target.W8A8, tensors=tensors)
    described = planned(Target.W8A8, tensors=tensors, described={"mtp.0.x.weight": WeightForm.MXFP8})

    assert guessed.conversions[0].after is WeightForm.FP8_BLOCK
    assert described.conversions[0].after is WeightForm.MXFP8


def test_columns_that_do_not_divide_into_groups_are_refused_for_mx():
    tensors = {
        "layers.0.attn.wq_a.weight": Shape("F8_E4M3", (128, 200)),
        "layers.0.attn.wq_a.scale": Shape("F8_E8M0", (1, 2)),
    }

    with pytest.raises(CheckpointError, match="has 200 columns; fp8_to_mx needs a multiple of 32"):
        planned(Target.MX, tensors=tensors)
