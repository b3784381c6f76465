"""Loading maps the checkpoint: only the float32 copies that the numerics ask for take memory of their own."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch

from ascend_v4.checkpoint.index import Role
from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.model.build import UNPACK_BYTES
from ascend_v4.model.caches import _zeros
from ascend_v4.operators.contracts.compressor import CompressorWeights
from ascend_v4.operators.contracts.moe import ExpertWeights
from ascend_v4.operators.contracts.quantize import StoredWeight
from tests.model.builders import make_model, make_runner

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

ROOT = Path(__file__).resolve().parents[2]
ALLOWED_BYTES = 1 << 30
"""The requirement: beyond the mapped bytes and the float32 copies of `exact`."""
OWN_BYTES = 192 << 20
"""What loading may take for itself here: imports, one weight's temporaries, what malloc keeps of them."""

LOAD = """
import json, sys
import torch
from ascend_v4.model import load

def status(field):
    with open("/proc/self/status") as stream:
        return next(1024 * int(line.split()[1]) for line in stream if line.startswith(field))

torch.set_num_threads(1)
anonymous, peak = status("RssAnon"), status("VmHWM")
load.UNPACK_BYTES = int(sys.argv[3])
loaded = load.load_model(sys.argv[1], numerics=sys.argv[2], mtp=True)
print(json.dumps({"anonymous": status("RssAnon") - anonymous, "peak": status("VmHWM") - peak}))
"""


def make_experts(directory: Path, num_experts: int) -> Path:
    """4.2 MB per expert and its peers in all layers, FP4: float32 copies are nearly eight times as large."""
    return make_model(directory, hidden_size=512, moe_intermediate_size=1024, n_routed_experts=num_experts)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 220 MB."""
    return make_experts(tmp_path_factory.mktemp("memory") / "large", 48)


def stored_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


def copy_bytes(checkpoint: Path) -> int:
    """Every matrix that a linear layer multiplies with, in float32."""
    matrices = {Role.HEAD, Role.LINEAR, Role.EXPERT, Role.ROUTER, Role.POOL_VALUE, Role.POOL_GATE}
    specs = CheckpointReader.open(checkpoint).specs.values()
    return sum(4 * spec.num_parameters for spec in specs if spec.role in matrices)


def load_elsewhere(checkpoint: Path, numerics: str, *, unpack_bytes: int = UNPACK_BYTES) -> dict[str, int]:
    """Bytes that loading adds to a fresh process: its own memory after it, and the peak on the way."""
    command = [sys.executable, "-c", LOAD, str(checkpoint), numerics, str(unpack_bytes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_native_loading_stays_within_the_mapped_bytes_and_a_gibibyte(large):
    stored = stored_bytes(large)
    grown = load_elsewhere(large, "native")
    # float32 copies of every matrix would not fit
    assert copy_bytes(large) > stored + ALLOWED_BYTES
    assert grown["peak"] <= stored + ALLOWED_BYTES


@pytest.mark.parametrize("unpack_bytes", [0, UNPACK_BYTES])
def test_native_loading_copies_no_more_than_its_budget(large, unpack_bytes):
    grown = load_elsewhere(large, "native", unpack_bytes=unpack_bytes)
    # without a budget, a copy of the file's bytes would not fit
    assert stored_bytes(large) > OWN_BYTES
    assert grown["anonymous"] <= unpack_bytes + OWN_BYTES


def test_exact_loading_holds_one_copy_of_every_matrix(tmp_path):
    checkpoint = make_experts(tmp_path / "model", 16)
    stored, copies = stored_bytes(checkpoint), copy_bytes(checkpoint)
    grown = load_elsewhere(checkpoint, "exact")
    # a second copy would not fit
    assert copies > stored + OWN_BYTES
    assert grown["peak"] <= stored + copies + OWN_BYTES
    assert grown["anonymous"] <= copies + OWN_BYTES


def test_weights_beyond_the_budget_are_views_of_the_mapping(checkpoint, monkeypatch):
    monkeypatch.setattr("ascend_v4.model.load.UNPACK_BYTES", 0)
    runner = make_runner(checkpoint, numerics="native", mtp=True)
    reader = runner.loaded.reader
    assert isinstance(reader, CheckpointReader)
    spans = [address_span(mapped) for mapped in reader._maps.values()]
    weights = list(stored_weights(runner.loaded.model)) + list(stored_weights(runner.loaded.mtp))
    assert len(weights) > 50
    strangers = [weight for weight in weights if not lies_in(weight.codes, spans)]
    assert strangers == []


def test_exact_weights_are_copied_whatever_the_budget(checkpoint, monkeypatch):
    monkeypatch.setattr("ascend_v4.model.load.UNPACK_BYTES", 0)
    runner = make_runner(checkpoint)
    reader = runner.loaded.reader
    assert isinstance(reader, CheckpointReader)
    spans = [address_span(mapped) for mapped in reader._maps.values()]
    weights = list(stored_weights(runner.loaded.model))
    assert len(weights) > 50
    assert {weight.codes.dtype for weight in weights} == {torch.float32}
    assert not any(lies_in(weight.codes, spans) for weight in weights)


def address_span(mapped) -> tuple[int, int]:
    start = torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()
    return start, start + len(mapped)


def lies_in(tensor: torch.Tensor, spans: list[tuple[int, int]]) -> bool:
    return any(start <= tensor.data_ptr() < stop for start, stop in spans)


def stored_weights(root: object) -> Iterator[StoredWeight]:
    """Every weight reachable from a model: attributes, containers and the closures of its layers."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType, torch.Tensor, str, bytes, Enum)):
            continue
        seen.add(id(item))
        if isinstance(item, StoredWeight):
            yield item
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif isinstance(item, FunctionType):
            waiting += [cell.cell_contents for cell in item.__closure__ or ()]
        elif isinstance(item, ExpertWeights | CompressorWeights):
            waiting += [getattr(item, field.name) for field in dataclasses.fields(item)]
        elif type(item).__module__.startswith("ascend_v4.model."):
            waiting += vars(item).values() if hasattr(item, "__dict__") else []


def test_untouched_cache_pages_cost_no_memory():
    before = resident_bytes()
    tensor = _zeros((4096, 128, 512), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert tensor.shape == (4096, 128, 512)
    assert not bool(tensor[7].any())
    assert resident_bytes() - before < tensor.numel() * tensor.element_size() / 8


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * resource.getpagesize()
