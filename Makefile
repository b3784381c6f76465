# `make` lists the targets. Set-up is idempotent: every target runs it, and it does only what is missing.
#
#   PYTHON         interpreter that makes .venv, 3.10 or newer
#   TORCH_VERSION  torch to install first
#   TORCH_ARGS     options for that one pip install, such as an index with a CPU-only or vendor build
#   BENCH_ARGS     options for the benchmark, such as --checkpoint DIR
#   REPACK_BENCH_ARGS  options for the benchmark of repack, such as --workspace DIR
#   PYTEST_ARGS    options for pytest, such as -k name
#   MUTATE_ARGS    options for mutate, such as --jobs 8, or names of mutations

PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
TORCH_ARGS ?=
BENCH_ARGS ?=
REPACK_BENCH_ARGS ?=
PYTEST_ARGS ?=
MUTATE_ARGS ?=

VENV_PYTHON := .venv/bin/python
SETUP = $(PYTHON) tools/setup_env.py --torch-version "$(TORCH_VERSION)" --torch-args="$(TORCH_ARGS)"

.DEFAULT_GOAL := help
.PHONY: help python setup setup-dev demo test test-changed lint format typecheck bench wheel contract mutate docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

python:
	@$(PYTHON) -c "" >/dev/null 2>&1 || { \
	  echo "error: '$(PYTHON)' does not run on this machine. Install Python 3.10 or newer, or name one: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }

setup: python ## make .venv with everything demo and test need
	@$(SETUP)

setup-dev: python
	@$(SETUP) --dev

demo: setup ## make a small checkpoint, serve it, ask it one question
	@$(VENV_PYTHON) tools/demo.py

test: setup ## run every test but those marked slow or contract
	$(VENV_PYTHON) -m pytest -m "not slow and not contract" $(PYTEST_ARGS)

test-changed: setup ## run the tests of files changed since the last commit
	@$(VENV_PYTHON) tools/changed_tests.py $(PYTEST_ARGS)

lint: setup-dev ## ruff, format check, codespell
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m codespell_lib README.md CONTRIBUTING.md CHANGELOG.md docs ascend_v4 operators tests tools

format: setup-dev ## rewrite the code in the project's format
	$(VENV_PYTHON) -m ruff format .
	$(VENV_PYTHON) -m ruff check --fix .

typecheck: setup-dev ## mypy, strict
	$(VENV_PYTHON) -m mypy

bench: setup ## compare speeds with transformers and with plain writes, write docs/benchmarks/
	$(VENV_PYTHON) -m ascend_v4.bench --output "docs/benchmarks/$$(date +%F)-cpu-transformers.md" $(BENCH_ARGS)
	$(VENV_PYTHON) -m ascend_v4.bench.repack --output "docs/benchmarks/$$(date +%F)-cpu-repack.md" $(REPACK_BENCH_ARGS)

wheel: setup ## build dist/*.whl
	rm -rf build dist
	$(VENV_PYTHON) -m pip wheel --no-deps --wheel-dir dist .

mutate: setup ## flip layout assumptions of the Ascend adapters one by one, see that a test fails each time
	$(VENV_PYTHON) -m tools.mutate $(MUTATE_ARGS)

contract: setup ## hold the Ascend adapters against the real torch_npu wheel, fetched once
	$(VENV_PYTHON) -m tools.npu_contract.environment
	$(VENV_PYTHON) -m pytest -m contract --require contract tests/npu $(PYTEST_ARGS)

docs: setup ## write docs/operators.md
	$(VENV_PYTHON) -m tools.operators_doc

clean: ## remove what builds and tools left, and .venv
	rm -rf .venv .npu-contract build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find operators ascend_v4 tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f operators/native/*.so
