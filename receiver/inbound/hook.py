"""`POST /webhooks/{provider}/{token}`: the callbacks, which take the hot path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

import msgspec
import structlog
from starlette.types import Receive, Scope, Send

from receiver.errors import KeysUnavailable, StoreUnavailable, Unproved
from receiver.inbound.answers import problem_body
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


_WORDS: Final = {"accepted": "accepted", "duplicate": "duplicate", "late": "duplicate"}
_TAKEN: Final = {
    word: _raw(200, msgspec.json.encode({"status": word})) for word in ("accepted", "duplicate")
}
_CLOSE: Final = (b"connection", b"close")
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
        on_rejected: Callable[[str, str, str], None] = lambda _provider, _reason, _source: None,
    ) -> None:
        self._on_rejected = on_rejected
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
            return self._unproved(scope, provider, "bad_token", len(body))
        try:
            taken = await self._door.callback(provider, prediction_id, callback)
        except Unproved as error:
            return self._unproved(scope, provider, error.reason, len(body))
        except StoreUnavailable:
            return _raw_problem(503, "unavailable", "try again later", _RETRY_SOON)
        except KeysUnavailable:
            return _raw_problem(503, "keys-unavailable", "try again later", _RETRY_SOON)
        return _TAKEN[_WORDS.get(taken.verdict, "accepted")]

    def _unproved(
        self, scope: Scope, provider: str, reason: str, size: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Refuse; the reason is for us alone."""
        client = (scope.get("client") or ("unknown",))[0]
        log.warning(
            "callback.rejected", provider=provider, reason=reason, client=client, bytes=size
        )
        self._on_rejected(provider, reason, client)
        return _raw_problem(401, "unproved", "this callback could not be proved")
