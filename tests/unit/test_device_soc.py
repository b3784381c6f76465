"""The chip table: names, and figures that are published or absent."""

from __future__ import annotations

import pytest

from ascend_v4.device.soc import CHIPS, GIB, SOCS, Chip, chip_of, soc_of
from ascend_v4.model.numerics import ON_CHIP


@pytest.mark.parametrize(
    ("name", "chip", "row"),
    [
        ("Ascend910B1", Chip.A2, "Ascend910B1"),
        ("Ascend910B2C", Chip.A2, "Ascend910B2"),
        ("ascend910b3", Chip.A2, "Ascend910B3"),
        ("Ascend910B4", Chip.A2, "Ascend910B4"),
        ("Ascend910B4-1", Chip.A2, None),
        ("Ascend910_9391", Chip.A3, "Ascend910_93"),
        ("910_9362", Chip.A3, "Ascend910_93"),
        ("Ascend950PR_957b", Chip.A950, "Ascend950PR"),
        ("Ascend950DT_9582", Chip.A950, "Ascend950DT"),
        ("Ascend910_9579", Chip.A950, None),
        ("950", Chip.A950, None),
        ("Ascend910B", None, None),
        ("Ascend910A", None, None),
        ("Ascend310P3", None, None),
        ("NVIDIA H100", None, None),
    ],
)
def test_a_soc_is_known_by_the_name_the_runtime_gives_it(name, chip, row):
    soc = soc_of(name)
    assert chip_of(name) is chip
    assert (None if soc is None else soc.name) == row


def test_each_row_belongs_to_the_chip_that_its_name_says():
    assert [soc.name for soc in SOCS if chip_of(soc.name) is not soc.chip] == []
    assert {soc.chip for soc in SOCS} == set(Chip) == set(CHIPS)


def test_every_figure_has_a_source_and_none_is_zero():
    for soc in SOCS:
        figures = (soc.hbm_bytes, soc.bytes_per_s, soc.matrix_cores, *soc.teraops.values())
        assert all(figure is None or figure > 0 for figure in figures), soc.name
        assert soc.source


def test_a_910b4_has_half_the_memory_of_its_sisters():
    memory = {soc.name: soc.hbm_bytes for soc in SOCS}
    assert (memory["Ascend910B4"], memory["Ascend910B3"]) == (32 * GIB, 64 * GIB)


@pytest.mark.parametrize("chip", Chip)
def test_packs_of_the_table_are_those_that_the_model_runs(chip):
    assert set(CHIPS[chip].packs) == {scheme.value for scheme in ON_CHIP[chip]}
