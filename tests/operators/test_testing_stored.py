"""The comparison kit on targets that store, limit and round their own way: it finds what is wrong there."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ascend_v4.device.soc import Chip
from ascend_v4.device.target import NoPackages, Target
from ascend_v4.operators.contract import Implementation, Limit, Needs, Tolerance, always_usable
from ascend_v4.operators.contracts.cache import CacheStorage, scatter_rows, write_index_keys, write_kv
from ascend_v4.operators.contracts.indexer import select_entries
from ascend_v4.operators.contracts.linear import linear
from ascend_v4.operators.contracts.norm import rms_norm
from ascend_v4.operators.testing.cases import Case, all_recipes

CPU = torch.device("cpu")


class EveryPackage(NoPackages):
    def missing_module(self, name):
        return None

    missing_operator = missing_symbol = missing_module


def sim(chip: Chip) -> Target:
    return Target(device="sim", chip=chip, packages=EveryPackage())


def case_on(chip, declared, call, recipe, *, dtype=torch.bfloat16, **changed) -> Case:
    """A function in an adapter's place."""
    implementation = Implementation(
        backend="npu",
        provider="stand-in",
        call=call,
        unusable=always_usable,
        needs=Needs(),
        tolerance=declared.tolerance,
        because=None,
        plan=declared.plan,
        prepare=declared.prepare,
        storage=declared.storage,
        limits=(),
        too_slow=None,
        capturable=False,
    )
    (found,) = [each for each in all_recipes()[declared.name] if each.name == recipe]
    chosen = dataclasses.replace(implementation, **changed)
    return Case(declared, chosen, found, dtype, CPU, True, sim(chip))


@dataclasses.dataclass(frozen=True, slots=True)
class NegatedStorage(CacheStorage):
    """Rows with their signs turned."""

    def pack(self, pages_CSD):
        return (-pages_CSD).to(self.dtype)

    def unpack(self, stored_CSW):
        return -stored_CSW.float()


def negated(*, width, nope_dim, format, dtype):
    return NegatedStorage(dtype, width)


def write_negated(cache_CSD, kv_TD, slots_T, *, nope_dim, format):
    write_kv.reference(cache_CSD, -kv_TD, slots_T, nope_dim=nope_dim, format=format)


PLAIN_WRITE = "vendor-poison-plain"


def test_rows_are_compared_as_the_numbers_they_stand_for():
    case_on(Chip.A3, write_kv, write_negated, PLAIN_WRITE, storage=negated).require_correct()


def test_a_row_stored_the_wrong_way_is_found():
    with pytest.raises(AssertionError, match="cache_CSD: differs"):
        case_on(Chip.A3, write_kv, write_kv.reference, PLAIN_WRITE, storage=negated).require_correct()


def test_a_row_changed_beside_the_written_ones_is_found_in_any_storage():
    def spills(cache_CSD, kv_TD, slots_T, *, nope_dim, format):
        write_negated(cache_CSD, kv_TD, slots_T, nope_dim=nope_dim, format=format)
        cache_CSD[-1, -1] = 1.0

    for storage, call in ((negated, spills), (write_kv.storage, spills_plainly)):
        with pytest.raises(AssertionError, match="cache_CSD changed outside"):
            case_on(Chip.A3, write_kv, call, PLAIN_WRITE, storage=storage).require_correct()


def spills_plainly(cache_CSD, kv_TD, slots_T, *, nope_dim, format):
    write_kv.reference(cache_CSD, kv_TD, slots_T, nope_dim=nope_dim, format=format)
    cache_CSD[-1, -1] = 1.0


def test_the_reserved_page_may_be_written_on_chips():
    def parks_skipped_rows(cache_CSD, kv_TD, slots_T, *, nope_dim, format):
        scatter_rows(cache_CSD, kv_TD, slots_T.clamp_min(0))

    case_on(Chip.A3, write_kv, parks_skipped_rows, PLAIN_WRITE).require_correct()


def worst_choice(**arguments):
    """All tokens' last entries instead of the best."""
    chosen = select_entries.reference(**arguments)
    assert chosen is not None
    batch, ratio = arguments["batch"], arguments["ratio"]
    for token, position in enumerate(batch.positions_T.tolist()):
        kept = int((chosen[token] >= 0).sum())
        visible = (position + 1) // ratio
        chosen[token, :kept] = torch.arange(visible - 1, visible - 1 - kept, -1)
    return chosen


def swapped(select):
    """The first entry behind all others."""

    def select_swapped(*args, **kwargs):
        chosen = select(*args, **kwargs)
        for row in chosen:
            kept = int((row >= 0).sum())
            row[:kept] = row[:kept].roll(-1)
        return chosen

    return select_swapped


def reference_choice(*args, **kwargs):
    return select_entries.reference(*args, **kwargs)


def in_the_contracts_order(q_THD, weights_TH, **rest):
    return select_entries.reference(q_THD, weights_TH, **rest)


ROUNDED = Tolerance(1, "summed in another order")


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda q, w, **rest: worst_choice(q_THD=q, weights_TH=w, **rest), "was left out"),
        (swapped(reference_choice), "stands behind"),
        (lambda *args, **kwargs: reference_choice(*args, **kwargs).clamp_min(0), "entries"),
        (lambda *args, **kwargs: reference_choice(*args, **kwargs).long(), "int64"),
    ],
    ids=["others", "order", "padding", "dtype"],
)
def test_a_choice_of_entries_is_judged_by_their_scores(call, problem):
    def by_keyword(q_THD, weights_TH, **rest):
        return call(q_THD, weights_TH, **rest)

    def case_of(chosen):
        return case_on(
            Chip.A3,
            select_entries,
            chosen,
            "vendor-ragged-int8",
            tolerance=ROUNDED,
            because="a test",
            storage=write_index_keys.storage,
        )

    case_of(in_the_contracts_order).require_correct()
    with pytest.raises(AssertionError, match=problem):
        case_of(by_keyword).require_correct()


@pytest.mark.parametrize(
    ("chip", "recipe", "reason"),
    [
        (Chip.A2, "vendor-fp8+mxfp8-odd", "a2 does not multiply FP8_BLOCK by MXFP8"),
        (Chip.A950, "vendor-int8-odd", "950 does not multiply INT8_CHANNEL by INT8_TOKEN"),
        (Chip.A950, "vendor-fp4+mxfp8-odd", None),
        (Chip.A3, "vendor-int4-odd", None),
    ],
)
def test_formats_of_other_chips_are_left_out(chip, recipe, reason):
    assert case_on(chip, linear, linear.reference, recipe).left_out == reason


def test_sizes_outside_of_limits_are_left_out_unless_waived():
    even = (Limit(size="hidden", multiple=2, source="a test"),)
    case = case_on(Chip.A3, rms_norm, rms_norm.reference, "edge-127", limits=even)
    assert case.left_out == "hidden is 127, it takes hidden a multiple of 2 (a test)"
    waived = dataclasses.replace(case.target, waived=frozenset({"hidden"}))
    assert dataclasses.replace(case, target=waived).left_out is None


def test_far_pages_lie_beyond_what_32_bits_address():
    (recipe,) = [each for each in all_recipes()["write_kv"] if each.name == "vendor-far"]
    case = case_on(Chip.A3, write_kv, write_kv.reference, recipe.name)
    run = case.run_implementation()
    rows = run.inputs.written_rows["cache_CSD"]
    assert rows is not None
    cache = run.arguments["cache_CSD"]
    assert int(rows.min()) * cache.stride(1) * cache.itemsize > 2**31
    assert int(rows.min()) // cache.shape[1] >= 30_000
