"""The route `POST /webhooks/echo/{token}`: shows that callbacks arrive here unchanged.

It is for `receiver doctor`, which calls the public URL with a token made by our secret key. The
answer is signed, so that a landing page, a redirect or another receiver is not taken for this one.
Nothing is stored, and only the digest of the body is returned.
"""

from __future__ import annotations

import hashlib

import msgspec
from starlette.requests import Request

from receiver.http.body import whole_body
from receiver.http.declare import post
from receiver.http.parts import Parts
from receiver.http.request_log import about


class Echo(msgspec.Struct, frozen=True):
    """The digest of a body, and the proof that this server has the secret key."""

    sha256: str
    """Hex digest of the body."""
    answer: str
    """A signature of the digest and the token."""


class EchoRoutes:
    """The route that echoes."""

    def __init__(self, parts: Parts) -> None:
        self._tokens = parts.predictions.tokens
        self._most = parts.settings.max_body_bytes
        self._clock = parts.runtime.clock

    def _prove(self, request: Request) -> None:
        about(request.scope, provider="echo")
        self._tokens.answer_echo(request.path_params["token"], "", self._clock())

    @post(
        "/webhooks/echo/{token}",
        "the body arrived as this",
        problems=["unproved", "too-slow", "too-large", "rate-limited"],
        is_open=True,
        proof=_prove,
    )
    async def echo(self, request: Request, token: str) -> Echo:
        """Return the digest of the body, for `receiver doctor`.

        It shows that a URL leads to this receiver, and that bodies arrive as they were sent. A
        caller without the secret key gets 401.
        """
        now = self._clock()
        digest = hashlib.sha256(await whole_body(request, self._most)).hexdigest()
        return Echo(digest, self._tokens.answer_echo(token, digest, now))
