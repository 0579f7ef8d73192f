"""`POST /webhooks/echo/{token}`: shows to whoever has our secret that callbacks arrive unchanged.

It is for `receiver doctor`, which asks by the public URL. The answer is signed, so that a landing
page, a redirect or another receiver is not taken for this one. Nothing is kept and nothing is told
but the digest of what came.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.errors import Problem, Unproved
from receiver.inbound.answers import as_json
from receiver.inbound.operation import Answer, Content, Operation
from receiver.inbound.reading import Disconnected, TooLarge, read_body

log = structlog.get_logger("receiver")

_SLOWEST: Final = 20.0
"""Seconds an echo's body may take."""


class Answers(Protocol):
    """What the echo needs of the tokens."""

    def answer_echo(self, token: str, digest: str, now: float) -> str: ...


class Echo(msgspec.Struct, frozen=True):
    """What came, and that we are who knows the secret."""

    sha256: str
    """Hex digest of the body."""
    answer: str
    """A signature of that and of the token."""


def echo_route(tokens: Answers, most: int, clock: Callable[[], float] = time.time) -> Route:
    async def echo(request: Request) -> Response:
        token, now = request.path_params["token"], clock()
        try:
            tokens.answer_echo(token, "", now)
        except Unproved as error:
            client = request.client.host if request.client else "unknown"
            log.warning(
                "callback.rejected", provider="echo", reason=error.reason, client=client, bytes=0
            )
            raise Problem(401, "unproved", "this callback could not be proved") from None
        digest = hashlib.sha256(await _body(request, most)).hexdigest()
        return as_json(Echo(digest, tokens.answer_echo(token, digest, now)))

    return Route("/webhooks/echo/{token}", echo, methods=["POST"])


async def _body(request: Request, most: int) -> bytes:
    try:
        async with asyncio.timeout(_SLOWEST):
            return await read_body(request.receive, most)
    except Disconnected:
        raise HTTPException(499) from None
    except TimeoutError:
        raise Problem(408, "too-slow", f"the body took longer than {_SLOWEST:g} s") from None
    except TooLarge:
        raise Problem(413, "too-large", f"more than {most} bytes") from None


OPERATIONS: Final = (
    Operation(
        "POST",
        "/webhooks/echo/{token}",
        "Echo the digest of what came, for `receiver doctor`",
        (Answer(200, "the body arrived as this", Content(Echo)),),
        ("unproved", "too-slow", "too-large"),
        names={"token": str},
        body=(Content(Any, media_type="application/octet-stream"),),
        is_open=True,
    ),
)
