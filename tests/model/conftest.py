"""One small checkpoint for all model tests, and an exact runner over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ascend_v4.engine.runner import ModelRunner
from tests.model.builders import make_model, make_runner


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from threads, and lose much to them on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `model_fields`: SWA, CSA, HCA, CSA and an MTP block."""
    return make_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture
def runner(checkpoint: Path) -> ModelRunner:
    """Float32 caches of its own for every test."""
    return make_runner(checkpoint)
