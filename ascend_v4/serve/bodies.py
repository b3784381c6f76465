"""Request bodies: bytes that anybody may have sent, read into JSON within bounds."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from starlette.requests import Request

from ascend_v4.chat.protocol import shown
from ascend_v4.errors import RequestError
from ascend_v4.serve.errors import HttpError

MAX_BODY_BYTES = 32 << 20
"""About eight million characters of text, or four million token ids: more than any context holds."""
MAX_DEPTH = 64
"""Levels of nesting. Tool schemas are the deepest thing people send, with about ten."""


async def read_body(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body. Raises HttpError: 413 as soon as it is known to be too large, 415 if not sent as JSON."""
    content_type = request.headers.get("content-type", "application/json")
    if content_type.split(";", maxsplit=1)[0].strip().lower() != "application/json":
        raise HttpError(415, f"the content type is {shown(content_type)}; it must be application/json.")
    too_large = HttpError(413, f"the request body is larger than {max_bytes} bytes. Send less.")
    announced = request.headers.get("content-length", "")
    if announced.isascii() and announced.isdecimal() and (len(announced) > 18 or int(announced) > max_bytes):
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises RequestError for anything else: broken UTF-8 or JSON, NaN, lone surrogates, deep nesting.
    """
    try:
        parsed = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise RequestError(f"the request body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except RecursionError:
        raise RequestError(f"the request body is nested deeper than {MAX_DEPTH} levels.") from None
    except ValueError as error:
        raise RequestError(f"the request body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(parsed, dict):
        raise RequestError(f"the request body is a JSON {type(parsed).__name__}; it must be an object.")
    _check_tree(parsed, has_surrogates=b"\\ud" in body.lower())
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _check_tree(root: object, *, has_surrogates: bool) -> None:
    """Bound the depth, so that nobody behind recurses too far; refuse text that is not Unicode."""
    level: list[object] = [root]
    for _ in range(MAX_DEPTH):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
                if has_surrogates:
                    below.extend(value)
            elif isinstance(value, list):
                below.extend(value)
            elif has_surrogates and isinstance(value, str):
                _require_unicode(value)
        if not below:
            return
        level = below
    raise RequestError(f"the request body is nested deeper than {MAX_DEPTH} levels.")


def _require_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a text of the request holds half of a surrogate pair at character {error.start}: {shown(text)}."
        ) from None
