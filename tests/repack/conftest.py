"""Sources shared by the tests of this folder; no test may write to them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.checkpoints import make_small


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The small model's checkpoint in several shards."""
    return make_small(tmp_path_factory.mktemp("source") / "checkpoint")


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch):
    """No test can lose power, so none waits for the disk; one checks that syncs are asked for."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
