"""`POST /webhooks/{provider}/{token}`: the callbacks, which take the hot path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from receiver.errors import KeysUnavailable, StoreUnavailable, Unproved
from receiver.inbound.answers import problem_body
from receiver.inbound.operation import Answer, Content, Operation, ProviderName
from receiver.inbound.reading import Disconnected, TooLarge, read_body
from receiver.providers.base import Callback
from receiver.store.values import Taken

log = structlog.get_logger("receiver")


class Door(Protocol):
    """What the callback route needs of the inbox."""

    def opens(self, provider_name: str, token: str) -> str | None: ...
    async def callback(
        self, provider_name: str, prediction_id: str, callback: Callback
    ) -> Taken: ...


def _raw(
    status: int, body: bytes, *more: tuple[bytes, bytes]
) -> tuple[dict[str, Any], dict[str, Any]]:
    headers = [
        (b"content-type", b"application/json" if status < 400 else b"application/problem+json"),  # noqa: PLR2004
        (b"content-length", str(len(body)).encode()),
        *more,
    ]
    return (
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


def _raw_problem(
    status: int, kind: str, detail: str, *more: tuple[bytes, bytes]
) -> tuple[dict[str, Any], dict[str, Any]]:
    return _raw(status, problem_body(status, kind, detail), *more)


class Receipt(msgspec.Struct, frozen=True):
    """What became of a callback; one that comes too late is a duplicate too."""

    status: Literal["accepted", "duplicate"]


_WORDS: Final[dict[str, Literal["accepted", "duplicate"]]] = {
    "accepted": "accepted",
    "duplicate": "duplicate",
    "late": "duplicate",
}
_TAKEN: Final = {word: _raw(200, msgspec.json.encode(Receipt(word))) for word in _WORDS.values()}
_CLOSE: Final = (b"connection", b"close")
_CHALLENGE: Final = (b"www-authenticate", b"Callback")
"""A 401 must have one; no provider has a scheme to name."""
_SLOWEST: Final = 60.0
"""Seconds a callback's body may take; a provider's own patience is shorter."""
_RETRY_SOON: Final = (b"retry-after", b"5")


class Hook:
    """`POST /webhooks/{provider}/{token}` as a bare ASGI app: nothing stands before the proof.

    Answers 200 only after the commit; 401 for whatever is not proved, with no word of why; 413 and
    503 as their names say. It never redirects, as providers take a 3xx for a refusal.
    """

    def __init__(
        self,
        door: Door,
        providers: Collection[str],
        most: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._door = door
        self._providers = frozenset(providers)
        self._most = most
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        params = scope["path_params"]
        provider = params["provider"]
        made = self._door.opens(provider, params["token"]) if provider in self._providers else None
        try:
            async with asyncio.timeout(_SLOWEST):
                body = await read_body(receive, self._most, keep=made is not None)
        except Disconnected:
            return
        except TimeoutError:
            start, content = _raw_problem(
                408, "too-slow", f"the body took longer than {_SLOWEST:g} s", _CLOSE
            )
        except TooLarge:
            start, content = _raw_problem(413, "too-large", f"more than {self._most} bytes", _CLOSE)
        else:
            start, content = await self._answer(scope, provider, made, body)
        await send(start)
        await send(content)

    async def _answer(
        self, scope: Scope, provider: str, prediction_id: str | None, body: bytes
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if provider not in self._providers:
            return _raw_problem(404, "not-found", "no such provider")
        callback = Callback(scope["headers"], body, self._clock())
        if prediction_id is None:
            return _unproved(scope, provider, "bad_token", len(body))
        try:
            taken = await self._door.callback(provider, prediction_id, callback)
        except Unproved as error:
            return _unproved(scope, provider, error.reason, len(body))
        except StoreUnavailable:
            return _raw_problem(503, "unavailable", "try again later", _RETRY_SOON)
        except KeysUnavailable:
            return _raw_problem(503, "keys-unavailable", "try again later", _RETRY_SOON)
        return _TAKEN[_WORDS.get(taken.verdict, "accepted")]


def _unproved(
    scope: Scope, provider: str, reason: str, size: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Refuse; the reason is for the log alone."""
    client = (scope.get("client") or ("unknown",))[0]
    log.warning("callback.rejected", provider=provider, reason=reason, client=client, bytes=size)
    return _raw_problem(401, "unproved", "this callback could not be proved", _CHALLENGE)


class Proofs(msgspec.Struct, frozen=True, rename="kebab"):
    """What providers prove a callback with, beside the token."""

    x_webhook_secret: str | None = None
    """Eachlabs: the secret that its submit was given."""
    x_fal_webhook_request_id: str | None = None
    """fal.ai: its id of the request."""
    x_fal_webhook_user_id: str | None = None
    """fal.ai: its id of the user."""
    x_fal_webhook_timestamp: str | None = None
    """fal.ai: unix seconds."""
    x_fal_webhook_signature: str | None = None
    """fal.ai: Ed25519 over the three above and the body's digest, in hex."""


Token = Annotated[
    str,
    msgspec.Meta(description="Made by us for one prediction; it comes with the callback URL."),
]
OPERATIONS: Final = (
    Operation(
        "POST",
        "/webhooks/{provider}/{token}",
        "Take a provider's callback",
        (Answer(200, "it is committed, or was before", Content(Receipt, Receipt("accepted"))),),
        ("not-found", "unproved", "too-slow", "too-large", "unavailable", "keys-unavailable"),
        "Not for callers: the URL is given to the provider with each submit. Nothing of the body "
        "is parsed before it is proved, by the token in the path and, on top, by the provider's "
        "signature or secret.",
        names={"provider": ProviderName, "token": Token},
        headers=Proofs,
        body=(Content(Any, {"request_id": "…", "status": "OK", "payload": {"images": []}}),),
        is_open=True,
    ),
)
