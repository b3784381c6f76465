"""Writes the logits that `ascend-v4 smoke` compares a device with: ascend_v4/smoke/golden.safetensors.

    python -m tools.smoke_golden

They are those of the CPU engine for models drawn from the shipped configs, which agrees with the official
reference on tests/golden. To be run when numerics change on purpose; takes minutes and 2 GB of disk.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from ascend_v4.device.target import CPU
from ascend_v4.smoke.models import (
    EXACT,
    GOLDEN_FILE,
    GOLDEN_ROWS,
    MX,
    NATIVE,
    RELEASED,
    SMALL,
    W4A8,
    W8A8,
    Way,
    draw_checkpoint,
    open_runner,
    score,
    shipped_fields,
)

FILE = Path(__file__).resolve().parents[1] / "ascend_v4" / "smoke" / GOLDEN_FILE
WAYS: dict[str, tuple[Way, ...]] = {SMALL: (EXACT, NATIVE, W8A8, W4A8, MX), RELEASED: (W8A8, W4A8, MX)}


def golden() -> dict[str, torch.Tensor]:
    """`<config>.<way>` -> rows of logits; float32 where they are compared to the last digit, else float16."""
    found = {}
    with TemporaryDirectory(prefix="smoke-golden-") as name:
        folder = Path(name)
        for config, ways in WAYS.items():
            path = draw_checkpoint(folder, config, shipped_fields(config))
            for way in ways:
                logits = score(open_runner(path, CPU, way, packs=folder / "packs"))[list(GOLDEN_ROWS)]
                found[f"{config}.{way.golden}"] = logits.to(torch.float32 if way is EXACT else torch.float16)
    return {key: tensor.contiguous() for key, tensor in found.items()}


if __name__ == "__main__":
    save_file(golden(), FILE)
