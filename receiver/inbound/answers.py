"""Answers: JSON, problem details (RFC 9457), and what becomes of every error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from receiver.errors import Problem, StoreUnavailable
from receiver.inbound.requests import request_id

log = structlog.get_logger("receiver")


def as_json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


_TITLES: Final = {
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
}


def problem_body(status: int, kind: str, detail: str, **extra: object) -> bytes:
    return msgspec.json.encode(
        {
            "type": f"urn:receiver:problem:{kind}",
            "title": _TITLES.get(status, "Error"),
            "status": status,
            "detail": detail,
            **extra,
        }
    )


def _problem(
    status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **extra: object
) -> Response:
    return Response(
        problem_body(status, kind, detail, **extra),
        status,
        headers=headers,
        media_type="application/problem+json",
    )


async def _on_problem(_: Request, error: Exception) -> Response:
    if not isinstance(error, Problem):
        raise error
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}  # noqa: PLR2004
    if "retry_after" in error.extra:
        headers["Retry-After"] = str(error.extra["retry_after"])
    return _problem(error.status, error.type, error.detail, headers, **error.extra)


async def _on_unavailable(_: Request, error: Exception) -> Response:  # noqa: ARG001 - Starlette's shape
    return _problem(503, "unavailable", "the database does not take writes", {"Retry-After": "5"})


async def _on_http(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    kind = {404: "not-found", 405: "method-not-allowed"}.get(error.status_code, "http-error")
    return _problem(error.status_code, kind, error.detail, error.headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    name = request_id(request.scope)
    log.error("request.failed", request=name, exc_info=error)
    # The one answer that is given above all that names answers.
    headers = {"X-Request-Id": name}
    return _problem(500, "internal-error", "a fault of ours; it is in the log", headers)


ERROR_HANDLERS: Final[dict[Any, Any]] = {
    Problem: _on_problem,
    StoreUnavailable: _on_unavailable,
    HTTPException: _on_http,
    Exception: _on_fault,
}
