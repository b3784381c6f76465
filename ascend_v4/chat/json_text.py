"""JSON as the protocol writes it, bounded so that no input exhausts the stack or the clock.

NaN and Infinity are read and written, as the official encoder does through Python's json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

MAX_JSON_DEPTH = 128
"""Levels below the outermost value. Python's own limit depends on the version and on the caller's stack."""

MAX_INTEGER_DIGITS = 4_000
"""Python refuses to convert more than 4,300 digits, and older versions take quadratic time over them."""

# What the largest integer of that many digits needs.
_MAX_INTEGER_BITS = 13_288


def write_json(value: object) -> str:
    """Text of a JSON-shaped value: ", " and ": " between, key order kept, nothing escaped beyond ASCII.

    Raises ValueError naming what is not JSON, is nested too deeply or cannot be encoded as UTF-8.
    """
    _require_json(value)
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise ValueError("is nested too deeply for the stack that is left") from None


def write_json_text(text: str) -> str:
    """JSON string of a text, whatever it holds: what a model said is passed on, lone surrogates too."""
    return json.dumps(text, ensure_ascii=False)


def read_json(text: str) -> object:
    """Value of a JSON text. Raises ValueError where `write_json` could not write the value back."""
    try:
        value = json.loads(text, parse_int=_bounded_integer)
    except RecursionError:
        raise ValueError(f"is nested deeper than {MAX_JSON_DEPTH}") from None
    _require_json(value)
    return value


def check_json(text: str) -> None:
    """Accept a JSON text that is to be passed on as it is; numbers may have any number of digits.

    Raises ValueError saying what is wrong.
    """
    try:
        value = json.loads(text, parse_int=str, parse_float=str)
    except RecursionError:
        raise ValueError(f"is nested deeper than {MAX_JSON_DEPTH}") from None
    for _, depth in _containers_and_leaves(value):
        _require_depth(depth)


def require_unicode(text: str) -> None:
    """Raise ValueError for a lone surrogate: no tokenizer takes one, since UTF-8 has no such character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(f"holds the lone surrogate U+{code:04X} at character {error.start}") from None


def _require_json(value: object) -> None:
    for item, depth in _containers_and_leaves(value):
        _require_depth(depth)
        if isinstance(item, str):
            require_unicode(item)
        elif isinstance(item, int) and not isinstance(item, bool):
            if item.bit_length() > _MAX_INTEGER_BITS:
                raise ValueError(f"holds an integer of more than {MAX_INTEGER_DIGITS} digits")
        elif isinstance(item, dict):
            _require_text_keys(item)
        elif item is not None and not isinstance(item, (bool, float, list, tuple)):
            raise ValueError(f"holds a {type(item).__name__}, which JSON has not")


def _require_text_keys(mapping: dict[Any, Any]) -> None:
    for key in mapping:
        if not isinstance(key, str):
            raise ValueError(f"has a key that is a {type(key).__name__}; JSON keys are strings")


def _containers_and_leaves(value: object) -> Iterator[tuple[object, int]]:
    """Every item with its depth, keys included, without recursion."""
    pending: list[tuple[object, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        yield item, depth
        if isinstance(item, dict):
            pending.extend((child, depth + 1) for child in item.values())
            pending.extend((key, depth) for key in item)
        elif isinstance(item, (list, tuple)):
            pending.extend((child, depth + 1) for child in item)


def _require_depth(depth: int) -> None:
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_JSON_DEPTH}")


def _bounded_integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise ValueError(f"holds an integer of more than {MAX_INTEGER_DIGITS} digits")
    return int(digits)
