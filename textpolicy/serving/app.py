"""`create_app`: the ASGI application of the server, in front of a `ServedEngine`."""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from textpolicy.serving.adapter_endpoints import AdapterEndpoints
from textpolicy.serving.adapters import ServedAdapters
from textpolicy.serving.encoding import PromptEncoder
from textpolicy.serving.endpoints import SamplingEndpoints
from textpolicy.serving.engine_job import ClientGoneError
from textpolicy.serving.engine_queue import ServedEngine
from textpolicy.serving.exchange import OnExchange, OnRefusal, PrepareRequest
from textpolicy.serving.metrics import RequestCounts, prometheus_text
from textpolicy.serving.refusal import RefusalError, server_failure, unknown_model
from textpolicy.serving.security import Asgi, Guard, OwnerOf, Receive, Scope, Send

_log = logging.getLogger("textpolicy.serving")


@dataclass(frozen=True, slots=True)
class App:
    """An ASGI application and the engine that it asks."""

    asgi: Asgi
    served: ServedEngine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.asgi(scope, receive, send)


def create_app(
    served: ServedEngine,
    *,
    owner_of: OwnerOf | Mapping[str, Any] | None = None,
    hosts: Collection[str] | None = None,
    on_exchange: OnExchange | None = None,
    prepare: PrepareRequest | None = None,
    on_refusal: OnRefusal | None = None,
    encoder: PromptEncoder | None = None,
    adapters: ServedAdapters | None = None,
) -> App:
    """Return the application that answers for a `ServedEngine`.

    `owner_of` says whose a bearer key is: a function that returns None for a key that may not ask,
    or a mapping; without it nobody needs a key. `hosts` are the names by which clients may ask;
    None allows every name. `on_exchange` is called with every finished answer,
    `prepare` with every request, which it may change or refuse, and `on_refusal` with refused ones.
    With `adapters`, clients may load adapters and unload them.
    """
    encoder = encoder or PromptEncoder(served.model, served.tokenizer)
    sampling = SamplingEndpoints(served, encoder, on_exchange, prepare, on_refusal)
    counts = RequestCounts()
    started = int(time.time())

    async def models(request: Request) -> Response:
        known = served.models.values()
        entries = [
            {"id": one.name, "object": "model", "created": started, "owned_by": "textpolicy"}
            | {"root": one.name, "parent": one.parent, "max_model_len": encoder.max_model_len}
            | {"version": one.version, "permission": []}
            for one in known
        ]
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": entries})
        for entry in entries:
            if entry["id"] == name:
                return JSONResponse(entry)
        raise unknown_model(name, list(served.models))

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(prometheus_text(served, counts))

    routes = [
        Route("/v1/chat/completions", sampling.chat, methods=["POST"]),
        Route("/v1/completions", sampling.completions, methods=["POST"]),
        Route("/inference/v1/generate", sampling.generate, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", models),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    if adapters is not None:
        loading = AdapterEndpoints(served, adapters)
        routes += [
            Route("/v1/load_lora_adapter", loading.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", loading.unload, methods=["POST"]),
        ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            RefusalError: _refuse,
            ClientGoneError: _forget,
            ClientDisconnect: _forget,
            HTTPException: _refuse_path,
            Exception: _fail,
        },
    )
    known_paths = {route.path for route in routes}
    find = owner_of.get if isinstance(owner_of, Mapping) else owner_of
    guard = Guard(app, hosts=hosts, owner_of=find)
    return App(_counting(guard, counts, known_paths), served)


def _counting(app: Asgi, counts: RequestCounts, paths: Collection[str]) -> Asgi:
    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in paths else "other"
                counts.add(path, message["status"])
            await send(message)

        await app(scope, receive, note)

    return counted


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RefusalError)
    return JSONResponse(error.body(), error.status, headers=dict(error.headers))


async def _refuse_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:100]
    refusal = RefusalError(
        f"{request.method} {path} is not served here: {error.detail}. GET /v1/models, POST "
        "/v1/chat/completions and POST /v1/completions are",
        status=error.status_code,
        kind="not_found_error" if error.status_code == 404 else "invalid_request_error",
        code="unknown_url",
        headers=dict(error.headers or {}),
    )
    return await _refuse(request, refusal)


async def _forget(request: Request, error: Exception) -> Response:
    # Nobody reads this answer: the client has gone.
    return Response(status_code=499)


async def _fail(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return await _refuse(request, server_failure("the server failed at this request"))
