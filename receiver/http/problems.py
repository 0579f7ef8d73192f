"""Answers: JSON, problem details (RFC 9457), and the answer to every error."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from receiver.http.request_log import request_id
from receiver.model.errors import Problem, StoreUnavailable

log = structlog.get_logger("receiver")


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


_TITLES: Final = {status.value: status.phrase for status in HTTPStatus} | {
    # RFC 9110's names: older Pythons have others.
    413: "Content Too Large",
    414: "URI Too Long",
    422: "Unprocessable Content",
}
PROBLEMS: Final = {
    "invalid-json": (400, "the body is not JSON"),
    "invalid-body": (400, "the body is not of the form that the plugin's route expects"),
    "unauthorized": (401, "no key was sent, or none of RECEIVER_API_KEYS"),
    "unproved": (401, "the sender could not be verified; the reason is in the log"),
    "over-budget": (402, "the order would cost more than a limit leaves; Retry-After says when"),
    "price-unknown": (402, "money is limited, and the recipe has no price"),
    "read-only": (403, "the key is one of RECEIVER_VIEWER_KEYS, which only read"),
    "not-allowed": (403, "no allow list of the recipes names this person and this place"),
    "reply-to-refused": (403, "reply_to is not at one of FORWARD_HOSTS, or not public"),
    "not-found": (404, "there is no such thing"),
    "unknown-recipe": (404, "there is no such recipe; the detail names the nearest one"),
    "no-model-details": (404, "the provider does not describe this model"),
    "method-not-allowed": (405, "the path has other methods; Allow names them"),
    "too-slow": (408, "the body took too long to come in"),
    "idempotency-conflict": (409, "the Idempotency-Key was used for another request"),
    "already-ended": (409, "the prediction has ended in another way"),
    "cannot-cancel": (409, "the provider cannot cancel a prediction that it has accepted"),
    "not-ended": (409, "the prediction has not ended yet"),
    "erased": (409, "the prediction, or the one with this Idempotency-Key, was erased"),
    "delivery-running": (409, "a handler is running for the prediction"),
    "too-late": (409, "the order came too late, or its prediction was deleted since"),
    "replay-canceled": (409, "the replay was canceled"),
    "replay-ended": (409, "the replay has ended"),
    "not-retryable": (409, "the delivery is running or done"),
    "unconfirmed": (
        409,
        "the submit got no answer, so it is not known which id to cancel",
    ),
    "too-large": (413, "the body is larger than RECEIVER_MAX_BODY_BYTES"),
    "unsupported-media-type": (415, "the body is not application/json, or it is compressed"),
    "invalid-request": (422, "a parameter or a field is invalid; the detail names it"),
    "bad-option": (422, "an option is invalid; the detail has a correct example"),
    "unknown-provider": (422, "there is no such provider"),
    "provider-off": (422, "the provider has no API key here"),
    "invalid-model": (422, "the model's name is invalid"),
    "unsupported-input": (422, "the provider, or this receiver, does not support this input"),
    "over-limit": (429, "a limit's number of orders is used up; Retry-After says until when"),
    "rate-limited": (429, "too many failed requests, or more requests than a rate limit allows"),
    "provider-busy": (429, "the provider accepts no more requests now"),
    "internal-error": (500, "an error in the receiver; it is in the log"),
    "route-failed": (500, "the plugin's route failed; the reason is in the log"),
    "provider-unavailable": (502, "the provider did not answer, or its answer was invalid"),
    "unavailable": (
        503,
        "the database does not answer or takes no writes, or the receiver is not started",
    ),
    "route-too-slow": (503, "the plugin's route took too long: repeat the call"),
    "too-many-readers": (503, "the maximum number of streams is open"),
    "keys-unavailable": (503, "the provider's public keys cannot be fetched"),
    "sources-unavailable": (
        503,
        "the addresses that the provider's callbacks come from cannot be fetched",
    ),
}
"""Every `type` of a problem: its status and its meaning. They are stable."""
PREFIX: Final = "urn:receiver:problem:"


class ProblemDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Problem details as in RFC 9457: `type` is for programs, `detail` for people."""

    type: str
    title: str
    status: int
    detail: str
    retry_after: int | msgspec.UnsetType = msgspec.UNSET
    """Seconds, as in the header Retry-After."""
    prediction_id: str | msgspec.UnsetType = msgspec.UNSET
    """The prediction that has, or had, the Idempotency-Key."""


def problem_body(problem: Problem) -> bytes:
    after, prediction = problem.retry_after, problem.prediction_id
    return msgspec.json.encode(
        ProblemDetails(
            type=PREFIX + problem.type,
            title=_TITLES.get(problem.status, "Error"),
            status=problem.status,
            detail=problem.detail,
            retry_after=msgspec.UNSET if after is None else after,
            prediction_id=msgspec.UNSET if prediction is None else prediction,
        )
    )


def problem_answer(problem: Problem, challenge: str = "Bearer") -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of a problem; `challenge` is that of a 401."""
    headers = {"Content-Type": "application/problem+json"}
    if problem.status == 401:  # noqa: PLR2004
        headers["WWW-Authenticate"] = challenge
    if problem.status == 408:  # noqa: PLR2004 - the rest of the body is not waited for
        headers["Connection"] = "close"
    if problem.retry_after is not None:
        headers["Retry-After"] = str(problem.retry_after)
    return problem_body(problem), headers


def problem_response(
    problem: Problem, more: Mapping[str, str] | None = None, *, challenge: str = "Bearer"
) -> Response:
    """Return a problem as a response, with `more` headers."""
    body, headers = problem_answer(problem, challenge)
    return Response(body, problem.status, {**headers, **(more or {})})


async def _on_error(_: Request, error: Exception) -> Response:
    match error:
        case Problem():
            return problem_response(error)
        case StoreUnavailable():
            detail = "the database does not answer, or takes no writes"
            return problem_response(Problem(503, "unavailable", detail, retry_after=5))
        case HTTPException(status_code=status):
            kind = {404: "not-found", 405: "method-not-allowed"}.get(status, "http-error")
            return problem_response(Problem(status, kind, error.detail), error.headers)
    raise error


async def _on_fault(request: Request, error: Exception) -> Response:
    name = request_id(request.scope)
    log.error("request.failed", request=name, exc_info=error)
    problem = Problem(500, "internal-error", "an error in the receiver; it is in the log")
    # Only this answer is made outside of the middleware that adds the id. The error goes on to the
    # server, which closes the connection.
    return problem_response(problem, {"X-Request-Id": name, "Connection": "close"})


ERROR_HANDLERS: Final[dict[Any, Any]] = {
    Problem: _on_error,
    StoreUnavailable: _on_error,
    HTTPException: _on_error,
    Exception: _on_fault,
}
