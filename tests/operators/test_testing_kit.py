"""The comparison kit itself: it accepts what is right and finds what is wrong, without a test framework."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ascend_v4.operators.contract import CATALOG, Implementation, Needs, Tolerance, always_usable
from ascend_v4.operators.contracts.attention import sparse_attention
from ascend_v4.operators.contracts.cache import write_kv
from ascend_v4.operators.contracts.moe import route_tokens
from ascend_v4.operators.contracts.norm import rms_norm
from ascend_v4.operators.contracts.rope import rotate
from ascend_v4.operators.testing.cases import Case, all_cases, all_recipes
from ascend_v4.operators.testing.close import Snapshot, require_close
from ascend_v4.operators.testing.draw import Draw, Layout
from ascend_v4.operators.testing.poison import poison, poisoned_memory

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
REFERENCES = {str(case): case for case in all_cases("cpu") if case.implementation is None}


def case_with(call, name: str, *, tolerance: Tolerance | None = None) -> Case:
    """A reference case with another function in the reference's place."""
    case = REFERENCES[name]
    declared = case.operator
    implementation = Implementation(
        backend="cpu",
        provider="broken",
        call=call,
        unusable=always_usable,
        needs=Needs(),
        storage=None,
        limits=(),
        too_slow=None,
        capturable=False,
        tolerance=tolerance or declared.tolerance,
        because=None,
        plan=declared.plan,
        prepare=declared.prepare,
    )
    return dataclasses.replace(case, implementation=implementation)


def test_a_right_implementation_passes():
    case_with(rms_norm.reference, "rms_norm-reference-odd-float32").require_correct()


def test_an_output_that_is_not_written_whole_is_found():
    def forgets_the_last_row(x_TD, weight_D, *, eps):
        out = torch.empty_like(x_TD)
        out[:-1] = rms_norm.reference(x_TD[:-1], weight_D, eps=eps)
        return out

    with pytest.raises(AssertionError, match="NaN values stand elsewhere"):
        case_with(forgets_the_last_row, "rms_norm-reference-odd-float32").require_correct()


def test_an_input_written_to_is_found():
    def works_in_place(x_TD, weight_D, *, eps):
        return x_TD.copy_(rms_norm.reference(x_TD, weight_D, eps=eps))

    with pytest.raises(AssertionError, match="x_TD was written to"):
        case_with(works_in_place, "rms_norm-reference-odd-float32").require_correct()


def test_a_write_beside_a_sliced_tensor_is_found():
    def spills(x_THD, rows, *, inverse=False):
        rotate.reference(x_THD, rows, inverse=inverse)
        torch.as_strided(x_THD, (1,), (1,), 0).fill_(7.0)

    with pytest.raises(AssertionError, match="x_THD changed outside"):
        case_with(spills, "rotate-reference-sliced-float32").require_correct()


def test_a_cache_row_written_by_mistake_is_found():
    def writes_one_more(cache_CSD, kv_TD, slots_T, *, nope_dim, format):
        write_kv.reference(cache_CSD, kv_TD, slots_T, nope_dim=nope_dim, format=format)
        cache_CSD[0, 0] = 0.0

    with pytest.raises(AssertionError, match="cache_CSD changed outside"):
        case_with(writes_one_more, "write_kv-reference-odd-bfloat16").require_correct()


def test_a_skipped_slot_that_is_written_is_found():
    def takes_slots_from_the_end(cache_CSD, kv_TD, slots_T, *, nope_dim, format):
        rows = cache_CSD.shape[0] * cache_CSD.shape[1]
        write_kv.reference(cache_CSD, kv_TD, slots_T % rows, nope_dim=nope_dim, format=format)

    with pytest.raises(AssertionError, match="cache_CSD changed outside"):
        case_with(takes_slots_from_the_end, "write_kv-reference-poison-float32").require_correct()


@pytest.mark.parametrize("window_tokens", [127, 129])
def test_a_window_off_by_one_is_found(window_tokens):
    def shifted(**arguments):
        return sparse_attention.reference(**{**arguments, "window_tokens": window_tokens})

    with pytest.raises(AssertionError, match=r"off by|NaN values"):
        case_with(shifted, "sparse_attention-reference-edge-swa-float32").require_correct()


def test_unseen_memory_that_is_read_is_found():
    def reads_page_zero(**arguments):
        out = sparse_attention.reference(**arguments)
        return out + 0.0 * arguments["window_cache_CSD"][0, 0]

    with pytest.raises(AssertionError, match="NaN values stand elsewhere"):
        case_with(reads_page_zero, "sparse_attention-reference-one-swa-float32").require_correct()


def test_a_selection_left_out_where_it_matters_is_found():
    with pytest.raises(AssertionError, match="None was returned, but 64 entries are more than 5"):
        case_with(lambda **_: None, "select_entries-reference-ragged-float32").require_correct()


def test_ties_in_another_order_are_found():
    def highest_first(logits_TE, *rest, experts_per_token, scaling, **named):
        settings = {"experts_per_token": experts_per_token, "scaling": scaling}
        weights, ids = route_tokens.reference(logits_TE.flip(-1), None, None, None, **settings)
        return weights, logits_TE.shape[1] - 1 - ids

    with pytest.raises(AssertionError, match="output 1: differs"):
        case_with(highest_first, "route_tokens-reference-edge-ties-float32").require_correct()


def test_another_dtype_or_shape_is_found():
    def widens(x_TD, weight_D, *, eps):
        return rms_norm.reference(x_TD, weight_D, eps=eps).float()

    def flattens(x_TD, weight_D, *, eps):
        return rms_norm.reference(x_TD, weight_D, eps=eps).flatten()

    for call, message in ((widens, "dtype torch.float32"), (flattens, "shape")):
        with pytest.raises(AssertionError, match=message):
            case_with(call, "rms_norm-reference-odd-bfloat16").require_correct()


def test_a_case_whose_reference_is_not_finite_is_refused():
    case = REFERENCES["rms_norm-reference-odd-float32"]
    broken = dataclasses.replace(
        case.recipe,
        build=lambda draw: dataclasses.replace(
            case.recipe.build(draw),
            arguments={**case.recipe.build(draw).arguments, "eps": float("nan")},
        ),
    )
    with pytest.raises(AssertionError, match="the reference itself is not finite"):
        dataclasses.replace(case, recipe=broken).require_correct()


def test_a_small_error_everywhere_is_found_though_no_element_is_far_off():
    want = torch.randn(1000).to(torch.bfloat16)
    loose = Tolerance(64, "many steps")
    shifted = (want.float() * 1.02).to(torch.bfloat16)
    loose.require(shifted, want)
    with pytest.raises(AssertionError, match="on average"):
        require_close(shifted, want, loose, contract=loose)


def test_a_tolerance_of_its_own_loosens_the_average_in_proportion():
    want = torch.randn(1000).to(torch.bfloat16)
    shifted = (want.float() * 1.02).to(torch.bfloat16)
    require_close(shifted, want, Tolerance(16, "coarser statistic"), contract=Tolerance(4, "one rounding"))


def test_only_named_rows_of_a_cache_may_change():
    cache = torch.zeros(2, 3, 4)
    before = Snapshot.of({"cache": cache})
    cache.view(6, 4)[4] = torch.nan
    before.require_untouched(written_rows={"cache": torch.tensor([4, 5])})
    with pytest.raises(AssertionError, match="cache changed outside"):
        before.require_untouched(written_rows={"cache": torch.tensor([5])})


def test_inputs_hold_the_same_values_in_every_layout():
    drawn = {
        layout: Draw("a name", dtype=torch.float32, device=CPU, layout=layout).normal(3, 5)
        for layout in Layout
    }
    for layout, tensor in drawn.items():
        assert torch.equal(tensor, drawn[Layout.PACKED])
        assert tensor.is_contiguous() == (layout is Layout.PACKED)
    other = Draw("another name", dtype=torch.float32, device=CPU).normal(3, 5)
    assert not torch.equal(other, drawn[Layout.PACKED])


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64],
    ids=str,
)
def test_poison_is_nan_in_every_float_format(dtype):
    values = poison(torch.zeros(4, dtype=dtype))
    wide = torch.view_as_real(values) if dtype.is_complex else values.float()
    assert torch.isnan(wide).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
def test_poison_is_no_plausible_index(dtype):
    value = poison(torch.zeros(2, dtype=dtype))[0].item()
    assert value < -60 or value > 250


def test_poisoned_memory_ends_with_its_block():
    originals = [torch.empty, torch.empty_like, torch.Tensor.new_empty]
    with poisoned_memory():
        assert torch.isnan(torch.empty(2)).all()
        assert torch.isnan(torch.empty_like(torch.zeros(2))).all()
        assert torch.isnan(torch.zeros(1).new_empty(2)).all()
    assert [torch.empty, torch.empty_like, torch.Tensor.new_empty] == originals


def test_cases_of_named_operators_only():
    assert {case.operator.name for case in all_cases("cpu", operators=("rotate",))} == {"rotate"}
    assert {case.operator.name for case in all_cases("cpu")} == set(all_recipes())
    assert set(all_recipes()) <= set(CATALOG)


def test_names_of_cases_are_their_own():
    names = [str(case) for case in all_cases("cpu")]
    assert len(set(names)) == len(names)


def test_the_kit_runs_where_pytest_is_not_installed():
    program = (
        "import sys\n"
        "sys.modules['pytest'] = sys.modules['hypothesis'] = sys.modules['numpy.testing'] = None\n"
        "from ascend_v4.operators.testing.cases import all_cases\n"
        "cases = [c for c in all_cases('cpu', operators=('rms_norm',)) if not c.slow and not c.unusable]\n"
        "for case in cases:\n"
        "    case.require_correct()\n"
        "print(len(cases))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
