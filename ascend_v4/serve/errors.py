"""Failures in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from ascend_v4.engine.requests import EngineStoppedError, QueueFullError
from ascend_v4.errors import AscendV4Error, RequestError

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
_RETRY_AFTER_S = "1"


class HttpError(RequestError):
    """A request that is answered with a status of its own."""

    def __init__(
        self, status: int, message: str, *, field: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, field=field)
        self.status = status
        self.code = code


def status_of(error: AscendV4Error) -> int:
    """The HTTP status of an error that a request met before anything ran for it."""
    if isinstance(error, HttpError):
        return error.status
    if isinstance(error, QueueFullError):
        return 429
    return 503 if isinstance(error, EngineStoppedError) else 400


def failure_status(error: AscendV4Error) -> int:
    """The HTTP status of an error that ended a request the engine had taken: never the client's fault."""
    return 503 if isinstance(error, EngineStoppedError) else 500


def error_body(status: int, error: AscendV4Error) -> dict[str, Any]:
    """The body of a failed request."""
    return {
        "error": {
            "message": str(error),
            "type": _TYPES.get(status, "invalid_request_error"),
            "param": error.field if isinstance(error, RequestError) else None,
            "code": error.code if isinstance(error, HttpError) else None,
        }
    }


def error_response(status: int, error: AscendV4Error) -> JSONResponse:
    """The answer to a failed request."""
    headers = {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(status, error), status_code=status, headers=headers)
