"""`POST /webhooks/echo/{token}`: shows a caller with our secret that callbacks arrive unchanged.

It is for `receiver doctor`, which asks by the public URL. The answer is signed, so that a landing
page, a redirect or another receiver is not taken for this one. Nothing is kept and nothing is told
but the digest of what came.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import msgspec
from starlette.requests import Request

from receiver.http.body import whole_body
from receiver.http.declare import post
from receiver.http.limits import Limits
from receiver.http.proxies import client_of
from receiver.http.request_log import about
from receiver.model.errors import Problem, Unproved
from receiver.predictions.tokens import Tokens


class Echo(msgspec.Struct, frozen=True):
    """What came, and that we are who knows the secret."""

    sha256: str
    """Hex digest of the body."""
    answer: str
    """A signature of that and of the token."""


class EchoRoutes:
    """The route that echoes."""

    def __init__(
        self, tokens: Tokens, most: int, limits: Limits, clock: Callable[[], float]
    ) -> None:
        self._tokens = tokens
        self._most = most
        self._limits = limits
        self._clock = clock

    @post(
        "/webhooks/echo/{token}",
        "the body arrived as this",
        problems=["unproved", "too-slow", "too-large", "rate-limited"],
        is_open=True,
    )
    async def echo(self, request: Request, token: str) -> Echo:
        """Echo the digest of what came, for `receiver doctor`.

        Shows that a URL leads to this receiver, and that bodies arrive as they were sent. A caller
        without the secret key gets 401.
        """
        now = self._clock()
        try:
            self._tokens.answer_echo(token, "", now)
        except Unproved as error:
            about(request.scope, provider="echo", verdict="rejected", reason=error.reason)
            self._limits.unauthorized(client_of(request.scope))
            raise Problem(401, "unproved", "this callback could not be proved") from None
        digest = hashlib.sha256(await whole_body(request, self._most)).hexdigest()
        return Echo(digest, self._tokens.answer_echo(token, digest, now))
