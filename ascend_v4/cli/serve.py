"""`ascend-v4 serve`: flags to a ServeConfig."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from ascend_v4.cli.options import ModelOptions, model_options


@click.command("serve")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0 takes a free one."
)
@click.option(
    "--served-model-name",
    "served_model_names",
    multiple=True,
    help="Name clients use; may be given several times. Default: the checkpoint's folder name.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder or tokenizer.json, if elsewhere.")
@click.option(
    "--max-model-len",
    type=click.IntRange(2, 1 << 30),
    help="Longest prompt and answer together, in tokens. Default: the model's, at most 32768.",
)
@click.option(
    "--max-num-seqs",
    type=click.IntRange(1, 4096),
    default=16,
    show_default=True,
    help="Requests that run at once.",
)
@click.option(
    "--max-num-batched-tokens",
    type=click.IntRange(1, 1 << 20),
    default=2048,
    show_default=True,
    help="Tokens of one step over all requests.",
)
@click.option(
    "--cache-tokens",
    type=click.IntRange(2, 1 << 32),
    help="Positions all running requests together may hold. Default: four times the context.",
)
@model_options
@click.option(
    "--graphs/--no-graphs",
    default=None,
    help="Record decoding steps as device graphs, one per batch size, before serving. Default: on npu and "
    "cuda where every operator allows it. On sim the recording is replayed on the CPU.",
)
@click.option(
    "--allow-slow",
    is_flag=True,
    help="npu: serve even where an operator is one of those that ascend-v4 ops calls too slow.",
)
@click.option(
    "--seed", type=click.IntRange(0, (1 << 63) - 1), help="Repeat the answers to calls without a seed."
)
@click.option("--api-key", help="Ask clients for this key. Default: ASCEND_V4_API_KEY, else none.")
def command(
    *,
    checkpoint: Path,
    host: str,
    port: int,
    served_model_names: tuple[str, ...],
    tokenizer: Path | None,
    max_model_len: int | None,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    cache_tokens: int | None,
    model: ModelOptions,
    graphs: bool | None,
    allow_slow: bool,
    seed: int | None,
    api_key: str | None,
) -> None:
    """Serve CHECKPOINT over the OpenAI API.

    Listens at once; /health answers 200 when the model is loaded. Ctrl-C ends it.
    """
    from ascend_v4.serve.interrupt import Interrupt

    # A signal that comes before the server runs ends the command as quietly as one that comes later.
    with contextlib.suppress(KeyboardInterrupt), Interrupt() as interrupt:
        from ascend_v4 import env
        from ascend_v4.engine.scheduler import SchedulerLimits
        from ascend_v4.serve.server import ServeConfig, run_server

        limits = SchedulerLimits(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        config = ServeConfig(
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            host=host,
            port=port,
            served_model_names=served_model_names,
            max_model_tokens=max_model_len,
            cache_tokens=cache_tokens,
            limits=limits,
            target=model.on.request(),
            numerics=model.numerics,
            quantize=model.quantize,
            cache_dir=model.cache_dir,
            graphs=graphs,
            allow_slow=allow_slow,
            seed=seed,
            api_key=api_key or env.API_KEY.read(),
        )
        run_server(config, interrupt)
