"""Where the command line writes: results to stdout, everything said about them to stderr.

With `--json` a verb prints exactly one JSON object on stdout, by `emit_json`, and nothing else there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click


def emit_json(result: Mapping[str, Any]) -> None:
    """One JSON object on one line of stdout, in ASCII so that any terminal encoding carries it.

    NaN and infinities have no JSON spelling: a caller turns them into null or text first.
    """
    click.echo(json.dumps(dict(result), allow_nan=False))


def say(text: str) -> None:
    """One line for the person at the terminal, on stderr."""
    click.echo(text, err=True)
