"""Memory stays that of a few slabs, however large the shards are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ascend_v4.repack.recipes import Target
from tests.repack.packs import repacked
from tests.unit.checkpoints import make_small

STATUS = Path("/proc/self/status")
FEW_SLABS_BYTES = 96 << 20


def unshared_bytes() -> int:
    """Anonymous and shared-memory pages of this process."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def peak_growth_bytes(run) -> int:
    """What `run` needs beyond what the process already has, sampled every 5 ms."""
    done = threading.Event()
    before = peak = unshared_bytes()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, unshared_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the system tells no process its pages by kind")
@pytest.mark.parametrize("target", [Target.W8A8, Target.BF16])
def test_one_shard_of_half_a_gigabyte_takes_a_few_slabs_of_memory(tmp_path, target):
    wide = {"hidden_size": 1024, "moe_intermediate_size": 2048, "n_routed_experts": 40}
    source = make_small(tmp_path / "source", max_shard_bytes=1 << 40, **wide)
    (shard,) = source.glob("*.safetensors")
    assert shard.stat().st_size > 400_000_000
    grown = peak_growth_bytes(lambda: repacked(source, tmp_path / "out", target, max_part_bytes=1 << 40))
    assert grown < FEW_SLABS_BYTES
