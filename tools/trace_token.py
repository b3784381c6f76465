"""Print the operator calls of one layer and of the head for one decoded token: shapes, dtypes, who runs them.

    .venv/bin/python tools/trace_token.py CHECKPOINT [--layer N] [--position P] [--numerics native|exact]

The numbers of docs/trace-one-token.md come from here. Token ids are drawn with a fixed seed: they change no
shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ascend_v4.checkpoint.reader import CheckpointReader
from ascend_v4.engine.protocol import Chunk
from ascend_v4.engine.runner import ModelRunner
from ascend_v4.model.build import UNPACK_BYTES, Builder, UnpackBudget
from ascend_v4.model.deepseek_v4 import DeepSeekV4
from ascend_v4.model.load import LoadedModel
from ascend_v4.model.numerics import numerics_by_name
from ascend_v4.model.weights import WeightSource
from ascend_v4.operators.contract import CATALOG
from ascend_v4.operators.contracts.quantize import StoredWeight
from ascend_v4.operators.select import Choice, OperatorTable, select

HYPER_CALLS_PER_LAYER = 2


class Tracer:
    """Prints the calls of one layer, told apart by counting hyper-connections, and those of the head."""

    def __init__(self, layer_index: int) -> None:
        self._layer_index = layer_index
        self._num_entered = 0
        self._is_in_head = False
        self.is_on = False

    def wrap(self, table: OperatorTable) -> OperatorTable:
        """The same table with every chosen callable announcing itself."""
        wrapped = {name: self._wrapped(choice) for name, choice in table.choices.items()}
        return OperatorTable(wrapped, table.target)

    def _wrapped(self, choice: Choice) -> Choice:
        names = list(inspect.signature(CATALOG[choice.operator].reference).parameters)

        def call(*args: object, **kwargs: object) -> object:
            if self.is_on and choice.operator == "hyper_connection_pre":
                self._num_entered += 1
            self._is_in_head |= self.is_on and choice.operator == "hyper_connection_head"
            result = choice.call(*args, **kwargs)
            if self.is_on and self._is_inside():
                report(choice, dict(zip(names, args, strict=False)) | kwargs, result)
            return result

        wrapped: Callable[..., Any] = call
        return dataclasses.replace(choice, call=wrapped)

    def _is_inside(self) -> bool:
        return self._is_in_head or (self._num_entered - 1) // HYPER_CALLS_PER_LAYER == self._layer_index


def report(choice: Choice, arguments: Mapping[str, object], result: object) -> None:
    """One line for the call, one per tensor that goes in, one for what comes out."""
    print(f"{choice.operator} [{choice.backend}/{choice.provider}]")
    for name, value in arguments.items():
        for label, tensor in tensors_of(name, value):
            print(f"    {label:28} {shown(tensor)}")
    outputs = result if isinstance(result, tuple) else (result,)
    print("    -> " + ", ".join(shown(output) for output in outputs))


def tensors_of(name: str, value: object) -> list[tuple[str, Tensor]]:
    """The tensors of an argument; stored weights by their codes."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, StoredWeight):
        return [(f"{name} ({value.format.name})", value.codes)]
    return []


def shown(value: object) -> str:
    """Shape and dtype of a tensor, the value too of a single integer; anything else by its type."""
    if isinstance(value, Tensor):
        is_slot = value.numel() == 1 and not value.dtype.is_floating_point
        number = f" = {value.item()}" if is_slot else ""
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{number}"
    return "None" if value is None else type(value).__name__


def traced_runner(checkpoint: Path, tracer: Tracer, *, numerics: str, num_tokens: int) -> ModelRunner:
    """A runner over the checkpoint whose operators pass through the tracer."""
    chosen = numerics_by_name(numerics)
    reader = CheckpointReader.open(checkpoint)
    reader.verify()
    operators = tracer.wrap(select("cpu"))
    builder = Builder(
        config=reader.config,
        weights=WeightSource(reader),
        operators=operators,
        numerics=chosen,
        unpack=UnpackBudget(math.inf if chosen.copies_weights else UNPACK_BYTES),
    )
    loaded = LoadedModel(
        config=reader.config,
        numerics=chosen,
        operators=operators,
        model=DeepSeekV4(builder),
        mtp=None,
        target=operators.target,
        device=torch.device("cpu"),
        reader=reader,
    )
    return ModelRunner(loaded, max_sequence_tokens=num_tokens, cache_tokens=num_tokens, max_sequences=1)


def main() -> None:
    """Prefill the tokens before the position, then decode one with the tracer on."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--layer", type=int, default=4, help="layer to print; 4 is CSA in flash and tiny")
    parser.add_argument("--position", type=int, default=143, help="position of the decoded token")
    parser.add_argument("--numerics", choices=["native", "exact"], default="native")
    options = parser.parse_args()
    tracer = Tracer(options.layer)
    with torch.inference_mode():
        runner = traced_runner(
            options.checkpoint, tracer, numerics=options.numerics, num_tokens=options.position + 1
        )
    sequence = runner.open_sequence(options.position + 1)
    ids = torch.randint(
        runner.vocab_size, (options.position + 1,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    if options.position:
        runner.forward([Chunk(sequence, ids[:-1])])
    for group, table in sorted(sequence.pages.tables.items(), key=lambda item: item[0].name):
        held = {number: page_id for number, page_id in enumerate(table) if page_id}
        print(f"pages {group.name:10} page number -> page id: {held}")
    tracer.is_on = True
    logits = runner.forward([Chunk(sequence, ids[-1:])])
    print(f"logits {shown(logits)}")


if __name__ == "__main__":
    main()
