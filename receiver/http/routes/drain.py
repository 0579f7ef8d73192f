"""`/v1/drain` and `/wake/{token}`: run what is due, for where a process lives only while asked."""

from __future__ import annotations

import contextlib
from typing import Annotated, Final

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from receiver.http.body import whole_body
from receiver.http.declare import get, post
from receiver.http.drain import Drain
from receiver.model.answers import Drained
from receiver.model.errors import Unproved
from receiver.predictions.tokens import Tokens

_LONGEST: Final = 900
"""Seconds; serverless platforms end a request after so many at the latest."""

_LONGEST_AGAIN: Final = 5


class DrainAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to drain."""

    seconds: Annotated[int, msgspec.Meta(ge=1, le=_LONGEST)] = 25
    """For how long at most."""


class WakeAsked(DrainAsked, frozen=True, forbid_unknown_fields=True):
    """How to drain for one who calls now and then."""

    again: Annotated[int, msgspec.Meta(ge=0, le=_LONGEST_AGAIN)] = 0
    """Look once more, so many seconds after the call: its caller does not call again before."""


class DrainRoutes:
    """The routes that schedulers call."""

    def __init__(self, drain: Drain, tokens: Tokens, most: int) -> None:
        self._drain = drain
        self._tokens = tokens
        self._most = most

    @post("/v1/drain", "what was done", problems=["invalid-request"], is_for_cron=True)
    async def drain(self, query: DrainAsked) -> Drained:
        """Run what is due, and answer when that is done or the time is over.

        For where a process only lives while it answers: have a scheduler call this. Housekeeping is
        done too. Two calls at once do nothing twice.
        """
        return await self._drain(query.seconds)

    @get("/v1/drain", "what was done", problems=["invalid-request"], is_for_cron=True)
    async def drain_by_get(self, query: DrainAsked) -> Drained:
        """Run what is due, as POST does, for schedulers that can only GET.

        They are Vercel Cron and most monitors; two calls at once do nothing twice.
        """
        return await self._drain(query.seconds)

    def _prove(self, request: Request) -> None:
        if not self._tokens.opens_wake(request.path_params["token"]):
            raise Unproved("bad_token")

    @post(
        "/wake/{token}",
        "what was done",
        problems=["invalid-request", "unproved", "too-slow", "rate-limited"],
        is_open=True,
        proof=_prove,
    )
    async def wake(self, request: Request, token: str, query: WakeAsked) -> Drained:  # noqa: ARG002 - proved
        """Run what is due, for callers that can send no key.

        `receiver wake-url` prints the URL. The body, whatever it is, is read and ignored.
        """
        with contextlib.suppress(HTTPException):  # a caller that is gone has called all the same
            await whole_body(request, self._most)
        return await self._drain(query.seconds, query.again)
