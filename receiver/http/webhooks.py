"""The callback endpoint, `POST /webhooks/{provider}/{token}`: the hot path."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final, Literal

import msgspec
from starlette.types import Receive, Scope, Send

from receiver.http.after import AfterCallback
from receiver.http.body import Disconnected, TooLarge, TooSlow, read_body
from receiver.http.limits import Limits
from receiver.http.problems import problem_body
from receiver.http.proxies import client_of
from receiver.http.request_log import about, request_id
from receiver.http.sources import Sources
from receiver.model.errors import (
    KeysUnavailable,
    Limited,
    SourcesUnavailable,
    StoreUnavailable,
    Unproved,
)
from receiver.observability.events import Telemetry
from receiver.predictions.inbox import Inbox
from receiver.providers.adapter import Callback
from receiver.store.inbox import AcceptResult

Sent = tuple[dict[str, Any], dict[str, Any]]
"""An answer's two ASGI messages."""


def _raw(status: int, body: bytes, *more: tuple[bytes, bytes]) -> Sent:
    headers = [
        (b"content-type", b"application/json" if status < 400 else b"application/problem+json"),  # noqa: PLR2004
        (b"content-length", str(len(body)).encode()),
        *more,
    ]
    return (
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body},
    )


def _raw_problem(status: int, kind: str, detail: str, *more: tuple[bytes, bytes]) -> Sent:
    return _raw(status, problem_body(status, kind, detail), *more)


def _raw_wait(status: int, kind: str, detail: str, seconds: int) -> Sent:
    """Return a problem that asks the sender to try again after some seconds."""
    body = problem_body(status, kind, detail, seconds)
    return _raw(status, body, (b"retry-after", b"%d" % seconds))


class Receipt(msgspec.Struct, frozen=True):
    """The result of a callback; one that comes too late is a duplicate too."""

    status: Literal["accepted", "duplicate"]


_WORDS: Final[dict[str, Literal["accepted", "duplicate"]]] = {
    "accepted": "accepted",
    "duplicate": "duplicate",
    "late": "duplicate",
}
_TAKEN: Final = {word: _raw(200, msgspec.json.encode(Receipt(word))) for word in _WORDS.values()}
_CLOSE: Final = (b"connection", b"close")
_CHALLENGE: Final = (b"www-authenticate", b"Callback")
"""The header that a 401 must have; no provider uses a standard scheme."""
_SOON: Final = 5
"""Seconds after which a callback that could not be checked should be sent again."""
LATER: Final[dict[type[Exception], str]] = {
    StoreUnavailable: "unavailable",
    KeysUnavailable: "keys-unavailable",
    SourcesUnavailable: "sources-unavailable",
}
"""The errors that are not the sender's fault, and the types of their problems."""
_UNKNOWN: Final = "unknown"
"""The name of any unknown provider, in counts and logs."""
_UNPROVED: Final = _raw_problem(401, "unproved", "this callback could not be proved", _CHALLENGE)
_UNKNOWN_PROVIDER: Final = _raw_problem(404, "not-found", "no such provider")


WEBHOOK_PATH: Final = "/webhooks/{provider}/{token}"


class WebhookRoute:
    """`POST /webhooks/{provider}/{token}` as a plain ASGI app: nothing precedes the proof.

    Answers 200 only after the commit; 401 without a reason for an unproved callback; 404 for an
    unknown provider; 408, 413, 429 and 503 in their usual meanings. It never redirects, as
    providers take a 3xx for a refusal.
    """

    def __init__(
        self,
        inbox: Inbox,
        providers: Collection[str],
        most: int,
        limits: Limits,
        sources: Sources,
        telemetry: Telemetry,
        clock: Callable[[], float],
        on_rejected: Callable[[str, str, str], None],
        after: AfterCallback,
    ) -> None:
        self._inbox = inbox
        self._providers = frozenset(providers)
        self._most = most
        self._limits = limits
        self._sources = sources
        self._telemetry = telemetry
        self._clock = clock
        self._on_rejected = on_rejected
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        params = scope["path_params"]
        provider = params["provider"] if params["provider"] in self._providers else _UNKNOWN
        made = None
        if provider != _UNKNOWN:
            made = self._inbox.prediction_id_of(provider, params["token"])
        about(scope, provider=provider, prediction=made)
        taken = None
        try:
            self._limits.callback(client_of(scope), provider, made)
            answer, taken = await self._take(scope, receive, provider, made)
        except Limited as error:
            self._reject(scope, provider, "limited")
            answer = _raw_wait(429, "rate-limited", str(error), error.seconds)
        if answer is not None:
            start, content = answer
            await send(start)
            await send(content)
        if taken is not None:
            await self._after.after_answer(taken)

    async def _take(
        self, scope: Scope, receive: Receive, provider: str, made: str | None
    ) -> tuple[Sent | None, AcceptResult | None]:
        """Prove and record a callback; return the answer, and the result if it is recorded.

        A refused callback is charged to its sender.
        """
        answer: Sent | None = None  # a sender that went away is not answered
        try:
            if made is not None:
                await self._sources.check(provider, client_of(scope))
            body = await read_body(scope, receive, self._most, keep=made is not None)
            taken = await self._prove(scope, provider, made, body)
        except Unproved as error:
            reason = error.reason
            answer = _UNPROVED if provider != _UNKNOWN else _UNKNOWN_PROVIDER
        except TooSlow:
            reason = "too_slow"
            answer = _raw_problem(408, "too-slow", "the body came too slowly", _CLOSE)
        except TooLarge:
            reason = "too_large"
            answer = _raw_problem(413, "too-large", f"more than {self._most} bytes", _CLOSE)
        except Disconnected:
            reason = "disconnected"
        except tuple(LATER) as error:
            kind = LATER[type(error)]
            self._count(scope, provider, kind.replace("-", "_"))
            return _raw_wait(503, kind, "try again later", _SOON), None
        else:
            self._limits.callback_proved(provider)
            about(
                scope,
                channel="webhook",
                provider_id=taken.provider_id,
                event_id=taken.event_id,
                verdict=taken.verdict,
            )
            await self._after.before_answer(taken)
            return _TAKEN[_WORDS.get(taken.verdict, "accepted")], taken
        self._limits.callback_failed(client_of(scope), made)
        self._reject(scope, provider, reason)
        return answer, None

    async def _prove(
        self, scope: Scope, provider: str, made: str | None, body: bytes
    ) -> AcceptResult:
        if made is None:
            raise Unproved("bad_token" if provider != _UNKNOWN else "unknown_provider")
        callback = Callback(
            scope["headers"], body, self._clock(), client_of(scope), request_id(scope)
        )
        return await self._inbox.callback(provider, made, callback)

    def _reject(self, scope: Scope, provider: str, reason: str) -> None:
        """Count a callback refused by the sender's fault; the reason is not sent."""
        self._count(scope, provider, reason)
        self._on_rejected(provider, reason, client_of(scope))

    def _count(self, scope: Scope, provider: str, reason: str) -> None:
        about(scope, verdict="rejected", reason=reason)
        self._telemetry.refused(provider, reason)
