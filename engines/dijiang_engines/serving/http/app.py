"""The ASGI application: which path is answered by whom, who may ask, and how much may be sent."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.safe_files import parse_json
from dijiang_engines.serving.http import sessions
from dijiang_engines.serving.http.completions import (
    Endpoint,
    Gone,
    chat,
    check_model,
    completions,
    error_response,
)
from dijiang_engines.serving.http.errors import ApiError
from dijiang_engines.serving.http.fields import Fields
from dijiang_engines.serving.http.metrics import Metrics
from dijiang_engines.serving.http.service import Service

Handler = Callable[[Request], Awaitable[Response]]
CLOSED_REQUEST = 499
"""nginx's status for a client that has left; nobody reads it."""


class App:
    """The server's endpoints.

    Args:
        service: who works.

    Attributes:
        asgi: the application.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._metrics = Metrics(service.scheduler)
        self._created = int(time.time())
        # Compared as hashes, so that neither length nor content shows in the time that it takes.
        self._keys = [hashlib.sha256(key.encode()).digest() for key in service.served.keys]
        routes = [
            Route("/health", self._open(self._health)),
            Route("/health/ready", self._open(self._ready)),
            Route("/metrics", self._open(self._metrics_text)),
            Route("/v1/models", self._guarded(self._models)),
            Route("/v1/models/{name:path}", self._guarded(self._model)),
            Route("/v1/completions", self._guarded(self._json(completions)), methods=["POST"]),
            Route("/v1/chat/completions", self._guarded(self._json(chat)), methods=["POST"]),
            Route("/tokenize", self._guarded(self._json(_tokenize)), methods=["POST"]),
            Route("/detokenize", self._guarded(self._json(_detokenize)), methods=["POST"]),
            Route("/v1/sessions", self._guarded(self._sessions)),
            Route("/v1/sessions/{name}", self._guarded(self._session), methods=["GET", "DELETE"]),
            Route("/v1/sessions/{name}/fork", self._guarded(self._fork), methods=["POST"]),
            Route("/v1/sessions/{name}/content", self._guarded(self._content), methods=["GET", "PUT"]),
        ]
        self.asgi = Starlette(routes=routes, exception_handlers={HTTPException: _not_there})

    # -- who may ask -------------------------------------------------------------------------------------

    def _open(self, handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except Gone:
                return Response(status_code=CLOSED_REQUEST)
            except Exception as error:  # noqa: BLE001 - every failure is an answer
                return error_response(error)

        return answer

    def _guarded(self, handler: Handler) -> Handler:
        async def answer(request: Request) -> Response:
            key = _key_of(request)
            if self._keys:
                given = hashlib.sha256(key.encode()).digest()
                # All are compared, whichever fits.
                if not any([hmac.compare_digest(given, each) for each in self._keys]):  # noqa: C419
                    raise ApiError(
                        401, "the API key is missing or wrong", code="invalid_api_key",
                        headers={"WWW-Authenticate": "Bearer"},
                    )  # fmt: skip
            request.state.key = key if self._keys else ""
            return await handler(request)

        return self._open(answer)

    def _json(self, endpoint: Endpoint) -> Handler:
        async def answer(request: Request) -> Response:
            body = await self._object(request)
            return await endpoint(self._service, self._metrics, request, body, request.state.key)

        return answer

    # -- what is sent ------------------------------------------------------------------------------------

    async def _body(self, request: Request) -> bytes:
        served = self._service.served
        try:
            return await asyncio.wait_for(_read(request, served.max_body_bytes), served.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the request has not arrived within {served.body_seconds:g} s",
                headers={"Connection": "close"},
            ) from None  # fmt: skip
        except ClientDisconnect:
            raise Gone from None

    async def _object(self, request: Request) -> dict[str, Any]:
        data = await self._body(request)
        try:
            found: Any = parse_json(data, "the request's body", error=UsageError)
        except UsageError as error:
            raise ApiError(400, str(error), code="invalid_json") from error
        if not isinstance(found, dict):
            raise ApiError(400, "the request's body is not a JSON object", code="invalid_json")
        return found

    # -- small endpoints ---------------------------------------------------------------------------------

    async def _health(self, _request: Request) -> Response:
        worker = self._service.worker
        if worker.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "dead", "reason": str(worker.failure or "not started")}, 503)

    async def _ready(self, request: Request) -> Response:
        if self._service.ready and not self._service.worker.closing:
            return await self._health(request)
        return JSONResponse({"status": "closing" if self._service.worker.closing else "loading"}, 503)

    async def _metrics_text(self, _request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        check_model(self._service, request.path_params["name"])
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        served = self._service.served
        return {
            "id": served.name, "object": "model", "created": self._created, "owned_by": "dijiang-export",
            "max_model_len": served.model.spec.max_positions,
            "state_bytes": served.model.spec.state_bytes,
        }  # fmt: skip

    async def _sessions(self, request: Request) -> Response:
        return await sessions.listing(self._service, request.state.key)

    async def _session(self, request: Request) -> Response:
        name = sessions.session_id(request)
        act = sessions.delete if request.method == "DELETE" else sessions.describe
        return await act(self._service, name, request.state.key)

    async def _fork(self, request: Request) -> Response:
        name, body = sessions.session_id(request), await self._object(request)
        return await sessions.fork(self._service, name, body, request.state.key)

    async def _content(self, request: Request) -> Response:
        name = sessions.session_id(request)
        if request.method == "PUT":
            return await sessions.upload(self._service, name, await self._body(request), request.state.key)
        return await sessions.download(self._service, name, request.state.key)


async def _tokenize(service: Service, _metrics: Metrics, _request: Request, body: Any, _key: str) -> Response:
    """POST /tokenize, vLLM's."""
    fields = Fields(body)
    check_model(service, fields.text("model", 500))
    prompt, special = fields.text("prompt", 1 << 30), fields.flag("add_special_tokens", True)
    fields.end()
    tokenizer = service.served.tokenizer
    if prompt is None or tokenizer is None:
        raise ApiError(
            400, "prompt is missing" if tokenizer else "this model has no tokenizer", param="prompt"
        )
    ids = await asyncio.to_thread(tokenizer.encode, prompt, special)
    return JSONResponse(
        {"tokens": ids, "count": len(ids), "max_model_len": service.served.model.spec.max_positions}
    )


async def _detokenize(
    service: Service, _metrics: Metrics, _request: Request, body: Any, _key: str
) -> Response:
    """POST /detokenize, vLLM's."""
    fields = Fields(body)
    check_model(service, fields.text("model", 500))
    ids = fields.take("tokens")
    fields.end()
    tokenizer, vocabulary = service.served.tokenizer, service.served.model.spec.vocab_size
    if tokenizer is None:
        raise ApiError(400, "this model has no tokenizer")
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise ApiError(400, f"tokens must be a list of ids from 0 to {vocabulary - 1}", param="tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, ids)})


async def _read(request: Request, most: int) -> bytes:
    """A request's body.

    Raises:
        ApiError: it is too large; nothing more of it is read.
    """
    announced = request.headers.get("content-length", "0")
    parts, size = [], int(announced) if announced.isdigit() else 0
    if size <= most:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                break
            parts.append(part)
    if size > most:
        raise ApiError(
            413, f"the request is larger than {most} bytes", code="request_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip
    return b"".join(parts)


def _key_of(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


async def _not_there(request: Request, error: Exception) -> Response:
    """Paths and methods that there are not."""
    assert isinstance(error, HTTPException)
    what = f"there is no {request.method} {request.url.path[:200]}"
    return ApiError(error.status_code, what, headers=dict(error.headers or {})).response()
