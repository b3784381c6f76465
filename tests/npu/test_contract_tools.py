"""What the contract tests are made of, without the wheel: ELF tables, stub libraries, calls held against
schemas.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ascend_v4.checkpoint.pack import PackScheme
from ascend_v4.device.elf import exported_names
from ascend_v4.device.soc import Chip
from ascend_v4.operators import simulator
from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.npu.schemas import schema_strings
from ascend_v4.operators.select import load_backend
from tools.npu_contract import environment
from tools.npu_contract.elf import wants_of
from tools.npu_contract.source import MetaWeights, meta_source, short_config
from tools.npu_contract.stand_ins import compare_schemas
from tools.npu_contract.stub import COMPILERS, StubPlan, build_stub, plan_stub
from tools.npu_contract.versions import (
    FILE,
    Spelling,
    load_table,
    problems_of,
    text_of,
    wheel_schemas,
)

TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"
SCHEMA = "npu::tried(Tensor x, int k, *, Tensor? scale=None, int mode=0) -> Tensor"
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)) or sys.platform != "linux", reason="no C compiler for ELF is here"
)


def compiled(folder: Path, name: str, source: str, *links: str) -> Path:
    """A shared library of some C."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.c").write_text(source)
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    command = [compiler, "-shared", "-fPIC", f"{name}.c", "-o", name, f"-Wl,-soname,{name}", *links]
    subprocess.run(command, cwd=folder, check=True)
    return folder / name


@pytest.mark.skipif(sys.platform != "linux", reason="torch has no ELF libraries here")
def test_what_a_library_needs_is_read_from_its_file():
    wants = wants_of(next(TORCH_LIBRARIES.glob("libtorch_python.so")))
    assert {"libtorch.so", "libc10.so", "libc.so.6"} <= set(wants.libraries)
    assert "PyList_New" in wants.symbols
    assert b"THPVariable_Wrap" not in {name.encode() for name in wants.symbols}


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF\x02\x01" + b"\xff" * 100])
def test_a_file_that_is_no_library_is_refused(content, tmp_path):
    path = tmp_path / "libx.so"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"libx\.so"):
        wants_of(path)


@needs_compiler
def test_a_stub_defines_what_nothing_else_does_and_nothing_more(tmp_path):
    vendor = compiled(tmp_path / "vendor", "libvendor.so", "int vendor_a(void){return 7;} int vendor_b;")
    compiled(
        tmp_path / "package",
        "libuser.so",
        "#include <math.h>\nint vendor_a(void); extern int vendor_b; int own(void){return 1;}\n"
        "__attribute__((weak)) int vendor_c(void);\n"
        "double used(double x){return vendor_a()+vendor_b+own()+cos(x)+(vendor_c?1:0);}",
        f"-L{vendor.parent}",
        "-l:libvendor.so",
        "-lm",
    )
    shutil.rmtree(vendor.parent)
    plan = plan_stub(tmp_path / "package", TORCH_LIBRARIES, ["libuser.so"])
    assert plan == StubPlan(libraries=("libvendor.so",), symbols=("vendor_a", "vendor_b"))
    (made,) = build_stub(plan, tmp_path / "stub")
    assert {b"vendor_a", b"vendor_b"} <= exported_names(made)
    stamp = made.stat().st_mtime_ns
    assert build_stub(plan, tmp_path / "stub") == [made]
    assert made.stat().st_mtime_ns == stamp


def test_a_call_that_fits_has_no_problems():
    assert list(problems_of(Spelling(2, ("scale",)), SCHEMA, SCHEMA)) == []


@pytest.mark.parametrize(
    ("theirs", "problem"),
    [
        ("npu::tried(Tensor x, int k, *, Tensor? scales=None, int mode=0) -> Tensor", "it has no scale"),
        ("npu::tried(Tensor x, *, int k, Tensor? scale=None, int mode=0) -> Tensor", "first arguments are x"),
        ("npu::tried(int k, Tensor x, *, Tensor? scale=None, int mode=0) -> Tensor", "arguments are k, x"),
        ("npu::tried(Tensor x, int k, *, float? scale=None, int mode=0) -> Tensor", "scale is Optional"),
        ("npu::tried(Tensor x, int k, *, Tensor? scale=None, int mode=1) -> Tensor", "mode is 1 there"),
        ("npu::tried(Tensor x, int k, *, Tensor y, Tensor? scale=None, int mode=0) -> Tensor", "it wants y"),
        ("npu::tried(Tensor x, int k, *, Tensor? scale=None, int mode=0) -> (Tensor, Tensor)", "it returns"),
    ],
)
def test_a_call_that_another_release_takes_otherwise_is_found(theirs, problem):
    found = list(problems_of(Spelling(2, ("scale",)), SCHEMA, theirs))
    assert any(problem in each for each in found), found


def test_an_argument_that_is_new_and_optional_does_no_harm():
    theirs = "npu::tried(Tensor x, int k, *, Tensor? scale=None, int mode=0, int more=3) -> Tensor"
    assert list(problems_of(Spelling(2, ()), SCHEMA, theirs)) == []


def test_every_renamed_keyword_of_every_adapter_is_found():
    ours = schema_strings("npu")
    tried = 0
    for adapter in load_table().adapters:
        for name, spellings in adapter.calls:
            for spelling in spellings:
                for keyword in spelling.keywords:
                    renamed = ours[name].replace(f" {keyword}", f" {keyword}_renamed", 1)
                    assert renamed != ours[name]
                    assert f"it has no {keyword}" in problems_of(spelling, ours[name], renamed)
                    tried += 1
    assert tried > 100


def test_schemas_are_read_from_a_wheel_as_text(tmp_path):
    wheel = tmp_path / "torch_npu-9.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "torch_npu/lib/libtorch_npu.so",
            b"\0npu_a(Tensor x) -> Tensor\0npu::npu_b.out(Tensor x) -> ()\0acl_op::npu_a(self, x)\0",
        )
    assert wheel_schemas(wheel) == {
        "npu_a": "npu::npu_a(Tensor x) -> Tensor",
        "npu_b.out": "npu::npu_b.out(Tensor x) -> ()",
    }


def test_the_version_table_is_written_as_it_is_read():
    assert FILE.read_text(encoding="utf-8") == text_of(load_table())


def test_the_version_table_knows_every_adapter():
    load_backend("npu")
    known = {(each.operator, each.provider, each.chip) for each in load_table().adapters}
    wanted = {
        (declared.name, each.provider, chip.value)
        for declared in CATALOG.values()
        for each in declared.implementations
        for chip in each.needs.chips or tuple(Chip)
        if each.backend == "npu"
    }
    assert known == wanted, "run python -m tools.npu_contract.versions"


def test_adapters_fit_the_release_they_were_written_against():
    table = load_table()
    for adapter in table.adapters:
        assert table.misfits(adapter, environment.VERSION) == []
        for name, _ in adapter.calls:
            assert name in schema_strings("npu")


@pytest.mark.parametrize("version", environment.OTHER_VERSIONS)
def test_older_releases_cannot_route_by_hash(version):
    ours = schema_strings("npu")["npu_moe_gating_top_k"]
    theirs = load_table().schemas[version]["npu_moe_gating_top_k"]
    assert theirs is not None
    assert list(problems_of(Spelling(2, ("tid2eid",)), ours, theirs)) == ["it has no tid2eid"]
    assert list(problems_of(Spelling(2, ("bias",)), ours, theirs)) == []


def test_an_adapter_fits_the_releases_whose_schemas_take_its_calls():
    table = load_table()
    every = (*environment.OTHER_VERSIONS, environment.VERSION)
    assert table.fitting("linear", "torch_npu", "a3") == every
    ours = schema_strings("npu")["npu_quant_matmul"]
    renamed = {"npu_quant_matmul": ours.replace("pertoken_scale=", "scales=")}
    older = replace(table, schemas={"1": renamed, "2": {}})
    assert older.fitting("linear", "torch_npu", "a3") == ("2", environment.VERSION)


def test_a_schema_that_differs_from_the_registry_is_named():
    simulator.declare("custom")
    ours = dict(schema_strings("custom"))
    assert compare_schemas(ours, "custom") == []
    ours["npu_hc_post"] = ours["npu_hc_post"].replace("Tensor x", "Tensor renamed", 1)
    ours["never"] = "custom::never(Tensor x) -> Tensor"
    (different, absent) = compare_schemas(ours, "custom")
    assert different.startswith("custom::npu_hc_post is registered as custom::npu_hc_post(Tensor x")
    assert absent == "custom::never is not registered"


def test_a_checkpoint_without_values_is_read_like_a_real_one():
    config = short_config("flash", ratios=(0,), experts=8)
    weights = MetaWeights(meta_source(config, PackScheme.W4A8))
    from ascend_v4.checkpoint.names import layer_names

    names = layer_names(config, 0)
    expert = weights.linear(names.moe.experts[0].down)
    assert (expert.num_outputs, expert.num_inputs, expert.codes.is_meta) == (4096, 2048, True)
    assert expert.scale is not None
    assert expert.scale.shape == (4096,)
    assert config.num_mtp_blocks == 1
    assert config.hidden_size == 4096
