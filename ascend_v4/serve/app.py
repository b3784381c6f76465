"""The routes, and how every failure becomes an answer in OpenAI's shape."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ascend_v4 import __version__
from ascend_v4.engine.requests import GenerationRequest
from ascend_v4.errors import AscendV4Error, RequestError
from ascend_v4.serve.answers import Answers, EventStream, collect
from ascend_v4.serve.bodies import parse_body, read_body
from ascend_v4.serve.calls import ChatCall, CompletionCall, read_chat_call, read_completion_call
from ascend_v4.serve.chat import ChatReply, chat_request
from ascend_v4.serve.completions import CompletionReply, completion_requests
from ascend_v4.serve.errors import HttpError, error_response, status_of
from ascend_v4.serve.service import Service

IGNORED_HEADER = "X-Ascend-V4-Ignored"
MAX_IGNORED_NAMES = 16
CLIENT_GONE_STATUS = 499


def create_app(service: Service) -> FastAPI:
    """The application over a service, which may become ready later."""
    app = FastAPI(title="ascend-v4", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    _add_failures(app)
    if service.settings.api_key is not None:
        app.add_middleware(_KeyCheck, api_key=service.settings.api_key)

    @app.get("/health")
    async def health() -> Response:
        if service.is_ready:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "not ready"}, status_code=503)

    @app.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/v1/models")
    async def models() -> Response:
        cards = [_model_card(service, name) for name in service.settings.model_names]
        return JSONResponse({"object": "list", "data": cards})

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> Response:
        return JSONResponse(_model_card(service, service.model_name(model_id)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer_completion(service, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer_chat(service, request)

    return app


def _model_card(service: Service, name: str) -> dict[str, Any]:
    card = {"id": name, "object": "model", "created": service.created_s, "owned_by": "ascend-v4"}
    if service.is_ready:
        card["max_model_len"] = service.engine().max_sequence_tokens
    return card


async def _answer_completion(service: Service, request: Request) -> Response:
    body = await read_body(request)
    engine = service.engine()

    def prepare() -> tuple[CompletionCall, str, list[GenerationRequest]]:
        call = read_completion_call(parse_body(body))
        name = service.model_name(call.common.model)
        return call, name, completion_requests(service, call)

    call, name, requests = await run_in_threadpool(prepare)
    reply = CompletionReply(service, call, model_name=name)
    headers = _warnings(service, call.ignored)
    answers = Answers(engine, requests)
    if call.common.is_streamed:
        return EventStream(reply.stream(answers), headers=headers, on_close=answers.cancel)
    return await _whole(reply, answers, request, headers)


async def _answer_chat(service: Service, request: Request) -> Response:
    body = await read_body(request)
    engine = service.engine()

    def prepare() -> tuple[ChatCall, str, GenerationRequest]:
        call = read_chat_call(parse_body(body))
        name = service.model_name(call.common.model)
        return call, name, chat_request(service, call, max_sequence_tokens=engine.max_sequence_tokens)

    call, name, generation = await run_in_threadpool(prepare)
    reply = ChatReply(service, call, model_name=name)
    headers = _warnings(service, call.ignored)
    answers = Answers(engine, [generation])
    if call.common.is_streamed:
        return EventStream(reply.stream(answers), headers=headers, on_close=answers.cancel)
    return await _whole(reply, answers, request, headers)


async def _whole(
    reply: CompletionReply | ChatReply, answers: Answers, request: Request, headers: dict[str, str]
) -> Response:
    events = await collect(answers, request)
    if events is None:
        return Response(status_code=CLIENT_GONE_STATUS)
    return JSONResponse(reply.whole(events), headers=headers)


def _warnings(service: Service, ignored: Sequence[str]) -> dict[str, str]:
    """The header that names what had no effect; names that do not fit into a header are only logged."""
    if not ignored:
        return {}
    service.warn_ignored(ignored)
    plain = [name for name in ignored if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name)]
    return {IGNORED_HEADER: ", ".join(plain[:MAX_IGNORED_NAMES])} if plain else {}


def _add_failures(app: FastAPI) -> None:
    @app.exception_handler(AscendV4Error)
    async def ours(request: Request, error: AscendV4Error) -> Response:
        return error_response(status_of(error), error)

    @app.exception_handler(HTTPException)
    async def of_routing(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        response = error_response(error.status_code, RequestError(message))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE_STATUS)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        # The traceback goes to the log: starlette raises the exception again after this answer.
        return error_response(500, RequestError("internal error; the server's log has the details."))


class _KeyCheck:
    """Lets only requests with the key reach the API; /health and /version stay open."""

    def __init__(self, app: ASGIApp, *, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = HttpError(
                    401, "wrong or missing API key; send Authorization: Bearer KEY.", code="invalid_api_key"
                )
                await error_response(401, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
