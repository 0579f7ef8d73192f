"""`POST /webhooks/echo/{token}`: shows to whoever has our secret that callbacks arrive unchanged.

It is for `receiver doctor`, which asks by the public URL. The answer is signed, so that a landing
page, a redirect or another receiver is not taken for this one. Nothing is kept and nothing is told
but the digest of what came.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.http.body import whole_body
from receiver.http.declare import Answer, Content, Endpoint
from receiver.http.limits import Limits
from receiver.http.problems import as_json
from receiver.http.proxies import client_of
from receiver.http.request_log import about
from receiver.model.errors import Problem, Unproved


class Answers(Protocol):
    """What the echo needs of the tokens."""

    def answer_echo(self, token: str, digest: str, now: float) -> str: ...


class Echo(msgspec.Struct, frozen=True):
    """What came, and that we are who knows the secret."""

    sha256: str
    """Hex digest of the body."""
    answer: str
    """A signature of that and of the token."""


def echo_route(
    tokens: Answers, most: int, limits: Limits, clock: Callable[[], float] = time.time
) -> Route:
    async def echo(request: Request) -> Response:
        token, now = request.path_params["token"], clock()
        try:
            tokens.answer_echo(token, "", now)
        except Unproved as error:
            about(request.scope, provider="echo", verdict="rejected", reason=error.reason)
            limits.unauthorized(client_of(request.scope))
            raise Problem(401, "unproved", "this callback could not be proved") from None
        digest = hashlib.sha256(await whole_body(request, most)).hexdigest()
        return as_json(Echo(digest, tokens.answer_echo(token, digest, now)))

    return Route("/webhooks/echo/{token}", echo, methods=["POST"])


OPERATIONS: Final = (
    Endpoint(
        "POST",
        "/webhooks/echo/{token}",
        "Echo the digest of what came, for `receiver doctor`",
        (Answer(200, "the body arrived as this", Content(Echo)),),
        ("unproved", "too-slow", "too-large", "rate-limited"),
        names={"token": str},
        body=(Content(Any, media_type="application/octet-stream"),),
        is_open=True,
    ),
)
