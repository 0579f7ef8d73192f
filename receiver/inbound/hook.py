"""`POST /webhooks/{provider}/{token}`: the callbacks, which take the hot path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any, Final, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from receiver.errors import KeysUnavailable, StoreUnavailable, Unproved
from receiver.inbound.answers import problem_body
from receiver.inbound.reading import Disconnected, TooLarge, read_body
from receiver.inbound.requests import about
from receiver.providers.base import Callback
from receiver.store.values import Taken
from receiver.telemetry import Telemetry


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
_UNKNOWN: Final = "unknown"
"""Whatever provider a stranger makes up."""


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
        telemetry: Telemetry,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._door = door
        self._providers = frozenset(providers)
        self._most = most
        self._telemetry = telemetry
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        params = scope["path_params"]
        provider = params["provider"] if params["provider"] in self._providers else _UNKNOWN
        made = self._door.opens(provider, params["token"]) if provider != _UNKNOWN else None
        about(scope, provider=provider, prediction=made)
        try:
            async with asyncio.timeout(_SLOWEST):
                body = await read_body(receive, self._most, keep=made is not None)
        except Disconnected:
            self._refuse(scope, provider, "disconnected")
            return
        except TimeoutError:
            self._refuse(scope, provider, "too_slow")
            start, content = _raw_problem(
                408, "too-slow", f"the body took longer than {_SLOWEST:g} s", _CLOSE
            )
        except TooLarge:
            self._refuse(scope, provider, "too_large")
            start, content = _raw_problem(413, "too-large", f"more than {self._most} bytes", _CLOSE)
        else:
            start, content = await self._answer(scope, provider, made, body)
        await send(start)
        await send(content)

    async def _answer(
        self, scope: Scope, provider: str, prediction_id: str | None, body: bytes
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        if provider == _UNKNOWN:
            self._refuse(scope, provider, "unknown_provider")
            return _raw_problem(404, "not-found", "no such provider")
        if prediction_id is None:
            return self._unproved(scope, provider, "bad_token")
        callback = Callback(scope["headers"], body, self._clock())
        try:
            taken = await self._door.callback(provider, prediction_id, callback)
        except Unproved as error:
            return self._unproved(scope, provider, error.reason)
        except StoreUnavailable:
            self._refuse(scope, provider, "unavailable")
            return _raw_problem(503, "unavailable", "try again later", _RETRY_SOON)
        except KeysUnavailable:
            self._refuse(scope, provider, "keys_unavailable")
            return _raw_problem(503, "keys-unavailable", "try again later", _RETRY_SOON)
        about(scope, verdict=taken.verdict, event_id=taken.event_id)
        return _TAKEN[_WORDS.get(taken.verdict, "accepted")]

    def _unproved(
        self, scope: Scope, provider: str, reason: str
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Refuse; the reason is for the log and the counts alone."""
        self._refuse(scope, provider, reason)
        return _raw_problem(401, "unproved", "this callback could not be proved")

    def _refuse(self, scope: Scope, provider: str, reason: str) -> None:
        about(scope, verdict="rejected", reason=reason)
        self._telemetry.refused(provider, reason)
