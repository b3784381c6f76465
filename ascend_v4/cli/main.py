"""The `ascend-v4` command: finds the verb, turns errors into one line and an exit status.

Exit status: 0 done; 2 wrong usage, or anything of the AscendV4Error tree; 130 interrupted; 141 the reader of
our output went away. Any other exception is our bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from ascend_v4 import __version__
from ascend_v4.cli.output import say
from ascend_v4.errors import AscendV4Error

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

VERBS = {
    "make-checkpoint": "Write a random checkpoint in the release layout.",
    "inspect": "Describe a checkpoint or a config.json and list what differs.",
    "devices": "What this machine can run on, and what keeps the rest from being used.",
    "ops": "Which implementation of each operator a device would run, and why not another.",
    "smoke": "Check a device, from its operators to a conversation, with a report.",
    "repack": "Turn a checkpoint into what a chip runs, or check such an output.",
    "score": "Logits or logprobs of given tokens, written to a file.",
    "generate": "Answer one prompt or conversation, streamed.",
    "serve": "Serve a checkpoint over the OpenAI API.",
}
"""Each verb with its line in --help.

The module is the name with underscores. It is imported only when asked for: help and version need no torch.
"""


class VerbGroup(click.Group):
    """Group whose verbs are imported on use and whose errors end as one line on stderr."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order of a first session."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, imported now; None for an unknown name."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"ascend_v4.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb named by the first argument; an unknown one gets the closest name as a suggestion."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            ctx.fail(unknown_verb(args[0]))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs and their lines, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> object:
        """Run the verb; see the module docstring for what each failure becomes."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except AscendV4Error as error:
            say(f"error: {error}")
            ctx.exit(EXIT_ERROR)
        except (ImportError, RuntimeError) as error:
            # torch imports torch_npu while it is imported itself, and a verb may import torch anywhere
            sentence = _broken_backend(error)
            if sentence is None:
                raise
            say(f"error: {sentence}")
            ctx.exit(EXIT_ERROR)
        except KeyboardInterrupt:
            say("interrupted")
            ctx.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            _leave_quietly()
        return result


def unknown_verb(name: str) -> str:
    """The usage error for a verb that does not exist."""
    close = difflib.get_close_matches(name, VERBS, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Use one of: {', '.join(VERBS)}."
    return f"No such command {name!r}. {hint}"


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each command has its own --help. Results go to stdout, everything else to stderr.",
)
@click.version_option(__version__, prog_name="ascend-v4", message="%(prog)s %(version)s")
def cli() -> None:
    """DeepSeek-V4 from the release's own files, on Ascend or a CPU: inspect, repack, check, score, serve."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; always leaves by SystemExit."""
    cli.main(args=None if args is None else list(args), prog_name="ascend-v4")
    raise AssertionError("click's standalone mode returns by SystemExit")


def _broken_backend(error: BaseException) -> str | None:
    """What to do about a torch_npu that does not import; None for every other failure."""
    from ascend_v4.device.software import explain_import_error

    problem = explain_import_error(error)
    return None if problem is None else problem.sentence()


def _leave_quietly() -> NoReturn:
    # The interpreter flushes stdout once more on its way out; give it somewhere to write.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(EXIT_BROKEN_PIPE)
