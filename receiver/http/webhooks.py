"""The callback endpoint, `POST /webhooks/{provider}/{token}`: the hot path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from receiver.http.after import AfterCallback
from receiver.http.body import Disconnected, TooLarge, TooSlow, read_body
from receiver.http.parts import Parts
from receiver.http.problems import as_json, problem_response
from receiver.http.proxies import client_of
from receiver.http.request_log import about, request_id
from receiver.http.sources import Sources
from receiver.model.errors import (
    KeysUnavailable,
    Limited,
    Problem,
    SourcesUnavailable,
    StoreUnavailable,
    Unproved,
)
from receiver.providers import DECLARED
from receiver.providers.adapter import Callback
from receiver.store.inbox import AcceptResult


class Receipt(msgspec.Struct, frozen=True):
    """The result of a callback; one that comes too late is a duplicate too."""

    status: Literal["accepted", "duplicate"]


_WORDS: Final[dict[str, Literal["accepted", "duplicate"]]] = {
    "accepted": "accepted",
    "duplicate": "duplicate",
    "late": "duplicate",
}
_TAKEN: Final = {word: as_json(Receipt(word)) for word in _WORDS.values()}
_CHALLENGE: Final = "Callback"
"""What a 401 must name; no provider uses a standard scheme."""
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
_UNPROVED: Final = problem_response(
    Problem(401, "unproved", "this callback could not be proved"), challenge=_CHALLENGE
)
_UNKNOWN_PROVIDER: Final = problem_response(Problem(404, "not-found", "no such provider"))
WEBHOOK_PATH: Final = "/webhooks/{provider}/{token}"


class WebhookRoute:
    """`POST /webhooks/{provider}/{token}` as a plain ASGI app: nothing precedes the proof.

    Answers 200 only after the commit; 401 without a reason for an unproved callback; 404 for an
    unknown provider; 408, 413, 429 and 503 in their usual meanings. It never redirects, as
    providers take a 3xx for a refusal.
    """

    def __init__(
        self,
        parts: Parts,
        sources: Sources,
        on_rejected: Callable[[str, str, str], None],
        after: AfterCallback,
    ) -> None:
        self._inbox = parts.predictions.inbox
        self._most = parts.settings.max_body_bytes
        self._limits = parts.limits
        self._telemetry = parts.runtime.telemetry
        self._clock = parts.runtime.clock
        self._sources = sources
        self._on_rejected = on_rejected
        self._after = after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        params = scope["path_params"]
        provider = params["provider"] if params["provider"] in DECLARED else _UNKNOWN
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
            answer = problem_response(error)
        if answer is not None:
            await answer(scope, receive, send)
        if taken is not None:
            await self._after.after_answer(taken)

    async def _take(
        self, scope: Scope, receive: Receive, provider: str, made: str | None
    ) -> tuple[Response | None, AcceptResult | None]:
        """Prove and record a callback; return the answer, and the result if it is recorded.

        A refused callback is charged to its sender.
        """
        answer: Response | None = None  # a sender that went away is not answered
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
            answer = problem_response(Problem(408, "too-slow", "the body came too slowly"))
        except TooLarge:
            reason = "too_large"
            problem = Problem(413, "too-large", f"more than {self._most} bytes")
            answer = problem_response(problem, {"Connection": "close"})
        except Disconnected:
            reason = "disconnected"
        except tuple(LATER) as error:
            kind = LATER[type(error)]
            self._count(scope, provider, kind.replace("-", "_"))
            later = Problem(503, kind, "try again later", retry_after=_SOON)
            return problem_response(later), None
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
