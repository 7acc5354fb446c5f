"""Kept conversations: what there is, copies, files to take elsewhere, and forgetting."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dijiang_engines.generation.session import session_from_bytes
from dijiang_engines.serving.http.bodies import check_session_name
from dijiang_engines.serving.http.errors import ApiError
from dijiang_engines.serving.http.fields import Fields
from dijiang_engines.serving.http.requests import read_session, stored_name
from dijiang_engines.serving.http.service import Service


async def listing(service: Service, key: str) -> Response:
    """GET /v1/sessions."""
    prefix = stored_name(key, "")
    names = await asyncio.to_thread(service.sessions.names, prefix)
    return JSONResponse({"object": "list", "data": [_object(name.removeprefix(prefix)) for name in names]})


async def describe(service: Service, name: str, key: str) -> Response:
    """GET /v1/sessions/{id}: how many tokens it has, and its text."""
    session = await read_session(service, name, key)
    tokenizer, ids = service.served.tokenizer, session.token_ids[0]
    text = None if tokenizer is None else await asyncio.to_thread(tokenizer.decode, ids)
    return JSONResponse(_object(name) | {"tokens": len(ids), "text": text})


async def fork(service: Service, name: str, body: dict[str, Any], key: str) -> Response:
    """POST /v1/sessions/{id}/fork: a copy under another name."""
    fields = Fields(body)
    target = fields.text("id", 100)
    fields.end()
    check_session_name(target or "", "id")
    assert target is not None
    data = await _bytes(service, name, key)
    await asyncio.to_thread(service.sessions.put, stored_name(key, target), data)
    return JSONResponse(_object(target) | {"bytes": len(data)}, 201)


async def download(service: Service, name: str, key: str) -> Response:
    """GET /v1/sessions/{id}/content: the session file."""
    data = await _bytes(service, name, key)
    return Response(data, media_type="application/octet-stream")


async def upload(service: Service, name: str, data: bytes, key: str) -> Response:
    """PUT /v1/sessions/{id}/content: a session file from elsewhere."""
    session = await asyncio.to_thread(session_from_bytes, data, "what was sent", service.served.model)
    if session.batch != 1:
        raise ApiError(400, f"a session here is of one text; this one has {session.batch}")
    await asyncio.to_thread(service.sessions.put, stored_name(key, name), data)
    return JSONResponse(_object(name) | {"bytes": len(data)}, 201)


async def delete(service: Service, name: str, key: str) -> Response:
    """DELETE /v1/sessions/{id}."""
    if not await asyncio.to_thread(service.sessions.delete, stored_name(key, name)):
        raise ApiError(404, f"there is no session {name}, or not any more")
    return JSONResponse(_object(name) | {"deleted": True})


async def _bytes(service: Service, name: str, key: str) -> bytes:
    data = await asyncio.to_thread(service.sessions.get, stored_name(key, name))
    if data is None:
        raise ApiError(404, f"there is no session {name}, or not any more")
    return data


def _object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "session"}


def session_id(request: Request) -> str:
    """The name in a request's path.

    Raises:
        ApiError: it cannot be one.
    """
    name = str(request.path_params["name"])
    check_session_name(name, "id")
    return name
