"""The list of mutations is up to date, and a flip is judged by whether a test fails for it.

`make mutate` tries them all.
"""

from __future__ import annotations

import ast
import re
import shutil
from dataclasses import replace

import pytest

from tools.mutate import LIST, REPORT, ROOT, Mutation, Outcome, Sandbox, load_mutations

MUTATIONS = [mutation for family in load_mutations().values() for mutation in family]
NAMED = {
    "transpose",
    "nibble order",
    "scale direction",
    "cumulative lengths",
    "cumulative group list",
    "off-by-one window",
    "leading zero of cu_seqlens",
    "rope sign",
    "rope_sin and rope_cos",
    "ape missing from the stored score",
    "norm_eps and hc_eps",
    "W4A8 bias left out",
    "W4A8 bias added twice",
    "metadata of the previous step",
    "-1 in front of valid indices",
    "padded row's slot written",
    "k-major against token-major row index",
    "routing weight twice",
    "e8m0 dtype",
    "int4 view before the NZ cast",
    "reserved block 0",
}
"""What the check was asked for; there may be more."""
FLIP = next(mutation for mutation in MUTATIONS if mutation.id == "rope-table-order")
SECONDS = 100.0


def source_of(mutation: Mutation) -> str:
    return (ROOT / mutation.file).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutated")
    yield Sandbox(folder)
    shutil.rmtree(folder)


def test_every_named_assumption_is_flipped_and_thirty_more():
    assert {mutation.flips for mutation in MUTATIONS} >= NAMED
    assert len(MUTATIONS) >= 50
    assert len({mutation.id for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.id)
def test_a_mutation_still_has_its_place_and_its_test(mutation):
    assert mutation.file.startswith("operators/npu/")
    before = source_of(mutation)
    after = mutation.applied(before)
    assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
    file, _, test = mutation.test.partition("::")
    assert file.startswith("tests/")
    assert re.search(
        rf"^def {test.partition('[')[0]}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE
    )


def test_text_that_is_gone_or_there_twice_is_refused():
    for old, found in (("nothing of the kind", 0), ("def ", source_of(FLIP).count("def "))):
        with pytest.raises(ValueError, match=f"stands {found} times"):
            replace(FLIP, old=old).applied(source_of(FLIP))


def test_a_mutation_without_a_field_is_refused(tmp_path):
    (tmp_path / "family.yaml").write_text("- id: lonely\n", encoding="utf-8")
    with pytest.raises(ValueError, match="lonely has"):
        load_mutations(tmp_path)


def test_the_document_lists_every_mutation():
    listed = re.findall(r"^\| `([\w-]+)` \|", REPORT.read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [mutation.id for mutation in MUTATIONS], "run make mutate"


def test_the_lists_are_all_read():
    assert {path.suffix for path in LIST.iterdir()} == {".yaml"}


def test_a_flipped_layout_fails_its_test_and_leaves_no_trace(sandbox):
    copied = sandbox.folder / FLIP.file
    outcome = sandbox.run_mutated(FLIP, seconds=SECONDS)
    assert outcome.is_caught, outcome
    assert outcome.failed.startswith("test_views_are_turned_where_they_are[")
    assert copied.read_text(encoding="utf-8") == source_of(FLIP)


def test_a_flip_that_changes_nothing_is_not_caught(sandbox):
    harmless = replace(FLIP, new=FLIP.old.replace("dim=-1", "dim=1"))
    outcome = sandbox.run_mutated(harmless, seconds=SECONDS)
    assert (outcome.status, outcome.is_caught) == (0, False), outcome


def test_a_flip_that_breaks_the_program_is_not_caught(sandbox):
    outcome = sandbox.run_mutated(replace(FLIP, new="nowhere"), seconds=SECONDS)
    assert outcome.reason.startswith("NameError"), outcome
    assert not outcome.is_caught


def test_tests_that_did_not_run_catch_nothing():
    assert not Outcome(status=4, seconds=1.0, reason="ERROR: not found").is_caught
    assert not Outcome(status=-1, seconds=1.0, reason="no result after 60 s").is_caught
    assert Outcome(status=1, seconds=1.0, failed="test_x", reason="AssertionError").is_caught
