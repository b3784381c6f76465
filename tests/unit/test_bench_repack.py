"""The benchmark of repack measures what it says: its peers write the payload, its tables hold every case."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ascend_v4.bench.repack_cases import CASES
from ascend_v4.bench.repack_peers import BETTER_OF, PEERS, back_pages, syncs_left_out
from ascend_v4.bench.repack_report import render
from ascend_v4.bench.transcode import Buffers, conversions
from ascend_v4.operators.select import select


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("num_bytes", [2, 4099, (2 << 20) + 7])
def test_a_peer_writes_the_payload(peer, num_bytes, tmp_path):
    payload = np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8)

    peer.write(tmp_path, payload)

    starts = {"whole": 0, "mapped": 0, "from-0": 0}
    files = sorted(tmp_path.iterdir(), key=lambda path: starts.get(path.name, 1))
    assert b"".join(path.read_bytes() for path in files) == payload.tobytes()


def test_backing_pages_leaves_no_file(tmp_path):
    back_pages(tmp_path / "scratch", (1 << 20) + 1)

    assert list(tmp_path.iterdir()) == []


def test_syncs_are_left_out_only_inside(tmp_path):
    own = os.fsync
    with syncs_left_out():
        os.fsync(-1)

    assert os.fsync is own


def test_every_case_names_a_kernel_that_is_timed():
    assert {case.kernel for case in CASES} <= conversions(select("cpu")).keys()


def test_kernel_buffers_hold_what_the_conversions_take():
    buffers = Buffers.drawn(256, 0)

    for step, _ in conversions(select("cpu")).values():
        step(buffers, slice(128, 256))

    assert buffers.int8[128:].any()


def test_the_page_has_a_row_per_case_in_every_table():
    rates = {"repack": 1.0, **{peer.name: 2.0 for peer in PEERS}}
    clock: dict[str, object] = {
        "seconds": {name: [1.0, 2.0] for name in rates},
        "gb_per_s": rates,
        "weights_per_s": 1e9,
        "of_better_peer": 0.75,
        "of_strictest_peer": 0.5,
        "thread_seconds": {"transcode": 1.0, "hash": 1.0, "write": 1.0, "rest": 1.0},
        "page_faults": 12345,
    }
    rows = [
        {
            "case": case.name,
            "kernel": case.kernel,
            "weights": 10**9,
            "bytes": 10**9,
            "share_of_bytes": 0.96,
            "memory_before_bytes": 1 << 28,
            "memory_peak_bytes": 1 << 29,
            "kernel_thread_seconds": 0.5,
            "cached": clock,
            **({"synced": clock} if case.synced else {}),
        }
        for case in CASES
    ]
    kernels: dict[str, object] = {"memcpy_gb_per_s": 10.0}
    kernels |= {case.kernel: {"weights_per_s": 2e9, "gb_per_s": 2.0} for case in CASES}

    page = render(
        {
            "date": "2026-01-01",
            "machine": "m",
            "file_system": "ext4",
            "repeats": 5,
            "cases": rows,
            "kernels": kernels,
        }
    )

    lines = page.splitlines()
    for case in CASES:
        assert sum(line.startswith(f"| {case.name} |") for line in lines) == 3 + case.synced
    assert all(peer.name in page for peer in BETTER_OF)
    assert page.count("**75%**") == len(CASES) + sum(case.synced for case in CASES)
