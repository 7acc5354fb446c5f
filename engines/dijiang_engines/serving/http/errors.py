"""Errors as the official clients expect them: a status and an object with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from dijiang_engines.errors import DijiangError, PositionError, PromptError, SessionError, UsageError
from dijiang_engines.serving.session_store import StoreError
from dijiang_engines.serving.worker import Closing, QueueFull

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
    405: "invalid_request_error", 408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error",
    500: "server_error", 503: "service_unavailable_error",
}  # fmt: skip


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: for people.
        param: the field that is wrong.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = _valid(message), None if param is None else _valid(param)
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def _valid(text: str) -> str:
    """Text that can be sent: what a client sent may hold half a surrogate pair."""
    return text.encode("utf-8", "backslashreplace").decode()


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """What a failure is to a client: what it could have known is its fault, all else the server's."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(
            429, "too many requests are waiting: ask again later", code="queue_full",
            headers={"Retry-After": "1"},
        )  # fmt: skip
    if isinstance(error, Closing):
        return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "1"})
    if isinstance(error, StoreError):
        return ApiError(503, str(error), code="session_store_unavailable", headers={"Retry-After": "1"})
    if isinstance(error, PositionError):
        return ApiError(400, str(error), param=param, code="context_length_exceeded")
    if isinstance(error, (UsageError, PromptError, SessionError)):
        return ApiError(400, str(error), param=param)
    if isinstance(error, DijiangError):
        return ApiError(503, str(error), code="model_failed")
    return ApiError(500, "the server failed to answer; its log says more")
