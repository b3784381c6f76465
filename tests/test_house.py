"""The rules of the house: imports run one way, sizes, docs, and what the wheel holds.

Every rule reads the files that exist; a new package is given a layer here before it can import anything.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SYMLINKS = {"operators": "../operators", "configs": "../configs"}
SKIPPED_FOLDERS = {"build", "dist", "__pycache__", "node_modules"}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
LONG_FILES: dict[str, str] = {}
"""File -> why it may exceed MAX_FILE_LINES."""
LONG_FUNCTIONS: dict[str, str] = {}
"""`file:function` -> why it may exceed MAX_FUNCTION_LINES."""

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("env", "config_file", "configs"),
    ("config",),
    ("device", "chat"),
    ("operators", "operators.contract", "operators.contracts", "operators.select"),
    ("operators.targets", "operators.status"),
    ("operators.native",),
    ("operators.npu", "operators.cuda", "operators.cpu", "operators.simulator", "operators.testing"),
    ("checkpoint", "cache", "parallel"),
    ("repack", "model", "plan"),
    ("engine",),
    ("serve",),
    ("doctor", "smoke", "bench"),
    ("cli",),
    ("__main__",),
)
"""Lowest first. A module imports only from layers below its own, and from its own package."""
SIBLINGS = {
    ("operators.select", "operators.contract"),
    ("operators.contracts", "operators.contract"),
    ("operators.simulator", "operators.testing"),  # poison
    ("operators.simulator", "operators.npu"),  # schemas, which are data
}
"""Imports inside one layer that the design wants: (importer, imported)."""
BACKENDS = {"operators.npu", "operators.cuda", "operators.cpu", "operators.simulator"}
LIGHT_FOR_CLI = {"", "errors", "env", "config", "chat", "cli"}
"""What a verb may import at the top of its file; the rest is imported inside functions."""

TORCHLESS = (
    "errors", "env", "config", "configs", "chat", "cli.main", "cli.output", "device.soc", "cache.layout",
    "parallel.layout", "engine.scheduler", "plan", "repack.recipes", "repack.plan", "repack.source_forms",
    "repack.layouts",
)  # fmt: skip

CONFINED = {
    "torch_npu": ("ascend_v4/device/npu.py", "operators/npu/", "operators/simulator/"),
    "torch.cuda": ("ascend_v4/device/cuda.py", "operators/cuda/"),
    "os.environ": ("ascend_v4/env.py", "ascend_v4/parallel/launch.py"),
    "os.getenv": ("ascend_v4/env.py", "ascend_v4/parallel/launch.py"),
    "os.putenv": ("ascend_v4/parallel/launch.py",),
    "torch.load": (),
    "pickle": (),
}


def files_below(*folders: str, suffix: str = ".py") -> list[Path]:
    """Real files under some folders, each once: symlinks are not followed."""
    found = []
    for folder in folders:
        for parent, names, files in os.walk(ROOT / folder):
            names[:] = [
                n for n in names if n not in SKIPPED_FOLDERS and not n.startswith(".") and "egg-info" not in n
            ]
            found += [Path(parent, name) for name in files if name.endswith(suffix)]
    return sorted(found)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


SHIPPED = files_below("ascend_v4", "operators", "configs")
CODE = [*SHIPPED, *files_below("tools", "tests"), ROOT / "setup.py"]
DOCS = sorted([*ROOT.glob("*.md"), *files_below("docs", suffix=".md")])


def module_of(path: Path) -> str:
    """Dotted name below `ascend_v4` ("" for the package itself)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inner = parts[1:] if parts[0] == "ascend_v4" else parts
    return ".".join(inner[:-1] if inner[-1] == "__init__" else inner)


def unit_of(module: str) -> str:
    """The part of a module name that LAYERS speaks of."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "operators" else parts[0]


def imported_modules(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Modules of this project that a file imports: (name below ascend_v4, line, at module level)."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    inner = {id(node) for outer in ast.walk(tree_of(path)) if is_function(outer) for node in ast.walk(outer)}
    for node in ast.walk(tree_of(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [".".join(["ascend_v4", *filter(None, base), *filter(None, [node.module])])]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "ascend_v4" or name.startswith("ascend_v4."):
                yield existing_module(name), getattr(node, "lineno", 0), id(node) not in inner


def existing_module(name: str) -> str:
    """The longest prefix of a dotted name that is a module here, without the leading `ascend_v4`."""
    parts = name.split(".")[1:]
    while parts:
        path = ROOT.joinpath("ascend_v4", *parts)
        if path.is_dir() or path.with_suffix(".py").is_file():
            break
        parts.pop()
    return ".".join(parts)


def is_function(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def layer_of(unit: str) -> int:
    for index, units in enumerate(LAYERS):
        if unit in units:
            return index
    pytest.fail(
        f"{unit} has no layer. Give it one in LAYERS of tests/test_house.py (docs/adr/0001-house.md)."
    )


def may_import(importer: str, imported: str) -> bool:
    """Whether one unit may import another; the package itself (its version) is open to all."""
    if imported in ("", importer) or (importer, imported) in SIBLINGS:
        return True
    if importer == "operators" and imported.startswith("operators."):
        return layer_of(imported) == layer_of(importer)
    return layer_of(imported) < layer_of(importer)


def test_imports_run_one_way():
    wrong = [
        f"{relative(path)}:{line}: {module_of(path)} imports {name}"
        for path in SHIPPED
        for name, line, _ in imported_modules(path)
        if module_of(path) and not may_import(unit_of(module_of(path)), unit_of(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_select_reaches_into_a_backend():
    wrong = [
        f"{relative(path)}:{line}: imports {name}"
        for path in SHIPPED
        for name, line, top in imported_modules(path)
        if unit_of(name) in BACKENDS and unit_of(module_of(path)) != unit_of(name)
        if unit_of(module_of(path)) != "operators.select" or top
        if not name.startswith("operators.npu.schemas")  # data
    ]
    assert not wrong, "\n".join(wrong)


def test_serving_never_sees_the_model():
    wrong = [
        f"{relative(path)}:{line}: imports {name}"
        for path in files_below("ascend_v4/serve")
        for name, line, _ in imported_modules(path)
        if unit_of(name).partition(".")[0] in ("model", "operators", "cache")
    ]
    assert not wrong, "\n".join(wrong)


def test_verbs_import_heavy_modules_inside_functions():
    wrong = [
        f"{relative(path)}:{line}: imports {name} at the top"
        for path in files_below("ascend_v4/cli")
        for name, line, top in imported_modules(path)
        if top and unit_of(name) not in LIGHT_FOR_CLI
    ]
    assert not wrong, "\n".join(wrong)


def test_torchless_modules_import_where_torch_is_absent():
    there = [name for name in TORCHLESS if existing_module(f"ascend_v4.{name}") == name]
    imports = "\n".join(f"import ascend_v4.{name}" for name in there)
    program = f"import sys\nsys.modules['torch'] = None\n{imports}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def used_names(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names a file imports or reaches by attribute, such as torch.cuda or os.environ."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno


@pytest.mark.parametrize("name", CONFINED)
def test_confined_name_stays_where_it_belongs(name):
    wrong = [
        f"{relative(path)}:{line}: {used}"
        for path in SHIPPED
        if not relative(path).startswith(CONFINED[name] or ("nowhere",))
        for used, line in used_names(path)
        if used == name or used.startswith(f"{name}.")
    ]
    assert not wrong, "\n".join(wrong)


def test_every_environment_variable_of_the_table_is_used():
    text = "\n".join(path.read_text(encoding="utf-8") for path in SHIPPED if path.name != "env.py")
    table = [node for node in tree_of(ROOT / "ascend_v4" / "env.py").body if isinstance(node, ast.Assign)]
    declared = [node.targets[0].id for node in table if isinstance(node.value, ast.Call)]  # type: ignore[attr-defined]
    assert declared
    unused = [name for name in declared if not re.search(rf"\b{name}\b", text)]
    assert not unused, unused


def test_files_are_short():
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    wrong = {
        name: count for name, count in lengths.items() if count > MAX_FILE_LINES and name not in LONG_FILES
    }
    assert not wrong, wrong
    assert all(lengths.get(name, 0) > MAX_FILE_LINES for name in LONG_FILES), (
        "an exception is no longer needed"
    )


def test_functions_are_short():
    lengths = {
        f"{relative(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in CODE
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    }
    wrong = {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES and name not in LONG_FUNCTIONS}
    assert not wrong, wrong
    assert all(lengths.get(name, 0) > MAX_FUNCTION_LINES for name in LONG_FUNCTIONS), (
        "an exception is not needed"
    )


def test_every_module_says_what_it_owns():
    wrong = [relative(path) for path in CODE if not ast.get_docstring(tree_of(path))]
    assert not wrong, wrong


@pytest.mark.parametrize("name", SYMLINKS)
def test_symlink_is_relative_and_committed(name):
    link = ROOT / "ascend_v4" / name
    assert os.readlink(link) == SYMLINKS[name]
    assert link.resolve() == ROOT / name
    if not (ROOT / ".git").exists():
        return  # an unpacked archive has no index to ask
    entry = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-s", f"ascend_v4/{name}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert entry.stdout.startswith("120000 "), (
        f"ascend_v4/{name} is not committed as a symlink: {entry.stdout!r}"
    )


def copy_of_sources(folder: Path) -> Path:
    """What a build needs, without the symlinks and without what an earlier build left."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("ascend_v4", "operators", "configs"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    for name in SYMLINKS:
        (folder / "ascend_v4" / name).unlink()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """Names inside a wheel built from a checkout that lost its symlinks, on a machine without a compiler."""
    source = copy_of_sources(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    no_compiler = {"PATH": "/usr/bin:/bin", "CC": "false", "CXX": "false", "HOME": str(out)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=source,
        env=no_compiler,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_every_module_under_its_import_name(wheel_names):
    expected = {
        path.relative_to(ROOT).as_posix()
        if path.is_relative_to(ROOT / "ascend_v4")
        else f"ascend_v4/{relative(path)}"
        for path in SHIPPED
    }
    assert expected - wheel_names == set()


def test_wheel_holds_the_data_files(wheel_names):
    data = [*files_below("configs", suffix=".yaml"), *files_below("ascend_v4/chat", suffix=".json")]
    expected = {f"ascend_v4/{relative(path).removeprefix('ascend_v4/')}" for path in data}
    assert "ascend_v4/configs/model/flash.yaml" in expected
    assert expected - wheel_names == set()
    assert "ascend_v4/py.typed" in wheel_names


def test_wheel_has_no_other_top_level_package(wheel_names):
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ascend_v4"}


def test_wheel_holds_no_tests_tools_or_leftovers(wheel_names):
    wrong = [name for name in wheel_names if re.search(r"(^|/)(tests?|tools|build)/|\.pyc$|egg-info", name)]
    assert not wrong, wrong


def heading_anchors(markdown: str) -> set[str]:
    """Anchors as GitHub makes them from headings."""
    titles = re.findall(r"^#+ +(.+?) *$", markdown, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_doc_links_lead_somewhere():
    wrong = []
    for path in DOCS:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+:", target):
                continue
            file_name, _, anchor = target.partition("#")
            file = (path.parent / file_name).resolve() if file_name else path
            if not file.exists():
                wrong.append(f"{relative(path)}: {target}")
            elif anchor and anchor not in heading_anchors(file.read_text(encoding="utf-8")):
                wrong.append(f"{relative(path)}: {target} (no such heading)")
    assert not wrong, "\n".join(wrong)


def test_files_named_in_docs_exist():
    named = re.compile(r"`((?:ascend_v4|operators|configs|tests|tools|docs|\.ci)/[\w./-]*)(?::\d+)?`")
    wrong = [
        f"{relative(path)}: {name}"
        for path in DOCS
        for name in named.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert not wrong, "\n".join(wrong)


def test_readme_sets_up_with_two_commands():
    blocks = re.findall(
        r"```\w*\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL
    )
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert sorted(line for line in commands if line.startswith("make ")) == ["make demo", "make test"]
    assert not [
        line for line in commands if re.match(r"(\S*python\S* -m )?pip3? install|\S*python\S* -m venv", line)
    ]


def test_ci_runs_the_readme_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert script.rstrip().endswith("make test")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_license_is_mit():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License\n\nCopyright (c) 2026 ascend-v4 contributors\n")
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in text


def test_no_path_of_a_developers_machine_is_written_down():
    machine = re.compile(
        r"(?<![\w.~-])/(?:" + "|".join(["work", "root", "home", "tmp", "farm"]) + r")/|shared/" + "hooks"
    )
    texts = [*CODE, *DOCS, *files_below("configs", suffix=".yaml"), *files_below("operators", suffix=".cpp")]
    texts += [
        ROOT / name
        for name in ("Makefile", "pyproject.toml", ".ci/run", ".gitignore", ".pre-commit-config.yaml")
    ]
    wrong = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if machine.search(line)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["flash", "pro", "tiny", "flash-width", "pro-width"])
def test_shipped_model_config_is_one_this_code_runs(name):
    from ascend_v4.config import ModelConfig, parse_model_config

    path = ROOT / "configs" / "model" / f"{name}.yaml"
    config = ModelConfig.from_file(path)
    assert config == parse_model_config(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert config.unknown_fields == ()


@pytest.mark.parametrize("name", ["tiny", "flash-width", "pro-width"])
def test_small_config_has_every_kind_of_part(name):
    from ascend_v4.config import LayerKind, ModelConfig

    config = ModelConfig.from_file(ROOT / "configs" / "model" / f"{name}.yaml")
    assert set(config.layer_kinds) == set(LayerKind)
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    assert config.num_mtp_blocks == 1


def test_setup_installs_the_oracle_that_the_metadata_names():
    wanted = re.search(
        r'^ORACLE = "(.+)"$', (ROOT / "tools" / "setup_env.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert wanted is not None
    assert f'"{wanted[1]}; python_version' in (ROOT / "setup.py").read_text(encoding="utf-8")
