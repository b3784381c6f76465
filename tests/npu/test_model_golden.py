"""The whole model over simulated operators beside the CPU engine of the same numerics, on the golden sets.

What is judged is the Ascend path, not the numerics of a pack: both sides run the same weights, the CPU by its
own operators, the chip by the adapters and the vendors' documented semantics. Sizes are waived here, since
the sets are small; tests/npu/test_model_width.py runs at true width.
"""

from __future__ import annotations

import pytest

from tools.sim_report import CHUNKS, PACKS, ROUNDINGS, GoldenSet, closeness

ONE_LAYER = ("layer-swa", "layer-csa", "layer-hca", "layer-hash", "layer-clamp")
DEEP = ("nano", "flash-tiny", "pro-tiny")
QUICK = {
    ("a3", "w8a8", "ideal", None),
    ("a3", "w4a8", "chip", 7),
    ("950", "release", "ideal", 7),
    ("950", "mx", "chip", None),
}
"""Of the one-layer sets; the rest takes minutes."""

WITHOUT = "vllm_ascend,custom_ops,ops_transformer"

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden(golden_dir, tmp_path_factory):
    """Sets by name; their packs and the CPU's logits are made once."""
    made: dict[str, GoldenSet] = {}

    def find(name: str) -> GoldenSet:
        if name not in made:
            made[name] = GoldenSet(golden_dir(name), tmp_path_factory.mktemp(name))
        return made[name]

    return find


def cases(names: tuple[str, ...], quick: set[tuple[str, str, str, int | None]]) -> list[object]:
    return [
        pytest.param(
            *(name, chip, pack, (arithmetic, chunk)),
            id=f"{name}-{chip}-{pack}-{arithmetic}-{chunk or 'whole'}",
            marks=() if (chip, pack, arithmetic, chunk) in quick else pytest.mark.slow,
        )
        for name in names
        for chip, packs in PACKS.items()
        for pack in packs
        for arithmetic in ROUNDINGS
        for chunk in CHUNKS
    ]


@pytest.mark.parametrize(
    ("name", "chip", "pack", "how"),
    [*cases(ONE_LAYER, QUICK), *cases(DEEP[:1], {("a2", "w8a8", "chip", 128)}), *cases(DEEP[1:], set())],
)
def test_a_golden_set_agrees_with_the_cpu_engine(golden, name, chip, pack, how):
    arithmetic, chunk = how
    scored: GoldenSet = golden(name)
    expected = scored.on_cpu(pack)
    body, draft = closeness(scored.on_chip(pack, chip, arithmetic=arithmetic, chunk=chunk), expected)
    assert scored.meets(arithmetic, body, draft), f"{body}, MTP {draft}"


@pytest.mark.parametrize(
    ("name", "chip", "pack"),
    [
        ("layer-csa", "a3", "w8a8"),
        ("layer-hca", "950", "release"),
        pytest.param("layer-swa", "a2", "w4a8", marks=pytest.mark.slow),
        pytest.param("layer-hash", "950", "mx", marks=pytest.mark.slow),
        pytest.param("layer-clamp", "a3", "w4a8", marks=pytest.mark.slow),
        pytest.param("layer-csa", "950", "release", marks=pytest.mark.slow),
    ],
)
def test_without_vendor_packages_a_golden_set_agrees_too(golden, name, chip, pack):
    scored: GoldenSet = golden(name)
    expected = scored.on_cpu(pack)
    found = scored.on_chip(pack, chip, arithmetic="ideal", chunk=None, without=WITHOUT)
    body, draft = closeness(found, expected)
    assert scored.meets("ideal", body, draft, without=WITHOUT), f"{body}, MTP {draft}"
