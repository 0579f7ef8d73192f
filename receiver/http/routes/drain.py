"""The routes `/v1/drain` and `/wake/{token}`: run due work, for processes that live on request."""

from __future__ import annotations

import contextlib
from typing import Annotated, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from receiver.http.body import whole_body
from receiver.http.declare import get, post
from receiver.http.parts import Parts
from receiver.model.answers import Drained
from receiver.model.errors import Unproved

_LONGEST: Final = 900
"""Seconds after which serverless platforms end a request at the latest."""

_LONGEST_AGAIN: Final = 5


class DrainAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to drain."""

    seconds: Annotated[int, msgspec.Meta(ge=1, le=_LONGEST)] = 25
    """The longest time that it may take, in seconds."""


class WakeAsked(DrainAsked, frozen=True, forbid_unknown_fields=True):
    """How to drain for a caller that limits its calls."""

    again: Annotated[int, msgspec.Meta(ge=0, le=_LONGEST_AGAIN)] = 0
    """Look for work once more, this many seconds after the call; its caller pauses until then."""


class DrainRoutes:
    """The routes that schedulers call."""

    def __init__(self, parts: Parts) -> None:
        self._drain = parts.drain
        self._tokens = parts.predictions.tokens
        self._most = parts.settings.max_body_bytes

    @post("/v1/drain", "what was done", problems=["invalid-request"], is_for_cron=True)
    async def drain(self, query: DrainAsked) -> Drained:
        """Run due work, and answer when it is done or the time is over.

        For platforms where a process only lives while it answers: have a scheduler call this. It
        also does the housekeeping. Two calls at once do nothing twice.
        """
        return await self._drain(query.seconds)

    @get("/v1/drain", "what was done", problems=["invalid-request"], is_for_cron=True)
    async def drain_by_get(self, query: DrainAsked) -> Drained:
        """Run due work, as POST does, for schedulers that can only GET.

        They are Vercel Cron and most monitors. Two calls at once do nothing twice.
        """
        return await self._drain(query.seconds)

    def _prove(self, request: Request) -> None:
        if not self._tokens.is_wake_token(request.path_params["token"]):
            raise Unproved("bad_token")

    @post(
        "/wake/{token}",
        "what was done",
        problems=["invalid-request", "unproved", "too-slow", "rate-limited"],
        is_open=True,
        proof=_prove,
    )
    async def wake(self, request: Request, token: str, query: WakeAsked) -> Drained:  # noqa: ARG002 - proved
        """Run due work, for callers that cannot send a key.

        `receiver wake-url` prints the URL. Any body is read and ignored.
        """
        with contextlib.suppress(HTTPException):  # the call counts, even if the caller is gone
            await whole_body(request, self._most)
        return await self._drain(query.seconds, query.again)
