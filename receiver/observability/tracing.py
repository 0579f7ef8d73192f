"""Traces: what happens to a prediction, from its submit to its handlers, as one trace.

    POST /v1/predictions      server; a child of the caller's own span, where it names one
    ├── submit fal            until the answer is stored, or why there is none
    │   └── POST              client
    ├── poll fal              each, with its requests as children
    ├── outcome fal           what came of it; consumer, where it was pushed or streamed
    └── handler announce      each attempt, with what it asks others by `ctx.http` as children,
        ├── POST              client; it passes the trace on
        └── submit fal …      and all of a prediction that it chained, which is in the same trace

The first span's name, a W3C traceparent, is kept with the prediction: whoever goes on with it, this
process or another, now or after a restart, goes on with its trace. A prediction that was submitted
while nothing was traced has none, and none of this happens for it. Providers are told nothing.

OpenTelemetry is imported only where its own settings ask for traces, or the embedding program has
set a tracer provider; else all of this is one comparison each time.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import httpx
import structlog
from starlette.requests import Request

from receiver.model.errors import SettingsError
from receiver.store.deliveries import Claim
from receiver.store.inbox import AcceptResult, IncomingOutcome
from receiver.store.predictions import Job

if TYPE_CHECKING:
    from receiver.observability.spans import Exporting, Spans

log = structlog.get_logger("receiver")

_LAST_WORD: Final = 1.5
"""Seconds that the last spans get to be sent when we stop."""
_REFUSED: Final = 400
_TOLD: Final = frozenset({"accepted", "late", "ask"})
"""Verdicts that are worth a span: a duplicate may come as often as its sender likes."""
_PUSHED: Final = frozenset({"webhook", "sse"})
_PORTS: Final = {"http": 80, "https": 443}


class Span(Protocol):
    """What can be said of something that happens."""

    @property
    def ids(self) -> Mapping[str, str]:
        """Return `trace_id` and `span_id`, for log lines; none where it is not traced."""

    def note(self, **facts: str | float | None) -> None: ...
    def answered(self, status: int, bad_from: int = ...) -> None: ...
    def fail(self, error: BaseException | str) -> None: ...


class _Untraced:
    """Something that happens and is not traced."""

    ids: Mapping[str, str] = {}

    def __enter__(self) -> Span:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def _pass(self, *_: object, **__: object) -> None:
        return

    note = answered = fail = _pass


Opened: TypeAlias = AbstractContextManager[Span]
Attributes: TypeAlias = Mapping[str, str | int | None]
_UNTRACED: Final = _Untraced()


async def _untraced(_: str) -> str | None:
    return None


class Tracing:
    """Makes a span of each thing that happens to a prediction, once it was started and is wanted.

    Nothing here raises, or waits for a collector.
    """

    def __init__(self, read: Callable[[str], Awaitable[str | None]] = _untraced) -> None:
        self._read = read
        self._spans: Spans | None = None
        self._exporting: Exporting | None = None

    @property
    def on(self) -> bool:
        return self._spans is not None

    def start(self, exporters: Sequence[str] | None) -> None:
        """Begin, if these exporters are wanted or the embedding program has a provider.

        None: not even then.
        """
        if exporters is None or not (exporters or "opentelemetry.trace" in sys.modules):
            return
        try:
            self._start(exporters)
        except Exception as error:  # noqa: BLE001 - whatever it is, predictions come first
            log.warning("settings.warning", problem=_problem(error))

    def _start(self, exporters: Sequence[str]) -> None:
        from receiver.observability import spans  # noqa: PLC0415 - paid for when used

        provider = spans.provider_in_use()
        if provider is None and exporters:
            self._exporting = spans.exporting(exporters)
            provider = self._exporting.provider
        if provider is not None:
            self._spans = spans.Spans(provider)

    async def stop(self) -> None:
        """Send what waits, for a moment."""
        exporting, self._exporting, self._spans = self._exporting, None, None
        if exporting is not None:
            await asyncio.to_thread(exporting.stop, _LAST_WORD)

    # --- what happens ---

    def request(self, request: Request, route: str) -> Opened:
        """Answer a caller who has proved who it is."""
        if self._spans is None:
            return _UNTRACED
        inside = self._spans.is_inside()  # of a span that the embedding program made of it
        given = None if inside else self._spans.read(request.headers.get("traceparent"))
        return self._spans.open(
            f"{request.method} {route}",
            given,
            {
                "http.request.method": request.method,
                "http.route": route,
                "url.scheme": request.url.scheme,
            },
            kind="INTERNAL" if inside else "SERVER",
        )

    async def submit(self, job: Job) -> Opened:
        """Send a prediction to its provider."""
        return await self._go_on(f"submit {job.provider}", job, {"receiver.submit": job.submits})

    async def poll(self, job: Job) -> Opened:
        """Ask a provider about a prediction."""
        return await self._go_on(f"poll {job.provider}", job, {"receiver.poll": job.polls + 1})

    async def _go_on(self, name: str, job: Job, more: Attributes) -> Opened:
        if self._spans is None:
            return _UNTRACED
        subject = _subject(job.ticket.id, job.provider, job.ticket.model)
        return await self._open(self._spans, name, job.ticket.id, {**subject, **more})

    async def outcome(self, arrival: IncomingOutcome, taken: AcceptResult) -> Opened:
        """Tell what came of a proved arrival, from when it came."""
        if self._spans is None or taken.verdict not in _TOLD:
            return _UNTRACED
        attributes = {
            **_subject(arrival.prediction_id, arrival.provider),
            "receiver.channel": arrival.channel,
            "receiver.outcome": arrival.outcome.kind,
            "receiver.verdict": taken.verdict,
            "receiver.event_id": taken.event_id,
        }
        return await self._open(
            self._spans,
            f"outcome {arrival.provider}",
            arrival.prediction_id,
            attributes,
            kind="CONSUMER" if arrival.channel in _PUSHED else "INTERNAL",
            start=arrival.at,
        )

    async def attempt(self, claim: Claim) -> Opened:
        """Run a handler once."""
        if self._spans is None:
            return _UNTRACED
        prediction = claim.event.prediction
        attributes = {
            **_subject(prediction.id, prediction.provider, prediction.model),
            "receiver.event_id": claim.event.id,
            "receiver.delivery": claim.id,
            "receiver.handler": claim.handler,
            "receiver.attempt": claim.attempt,
        }
        return await self._open(self._spans, f"handler {claim.handler}", prediction.id, attributes)

    def ask(self, request: httpx.Request) -> Opened:
        """Send a request, if it is part of a trace; of its address only the host may be told."""
        if self._spans is None or not self._spans.is_inside():
            return _UNTRACED
        attributes = {
            "http.request.method": request.method,
            "server.address": request.url.host,
            "server.port": request.url.port or _PORTS.get(request.url.scheme),
        }
        return self._spans.open(request.method, None, attributes, kind="CLIENT")

    def tell(self, headers: MutableMapping[str, str]) -> None:
        """Add the current span's traceparent, if there is one, to what has none."""
        if self._spans is not None and "traceparent" not in headers:
            self._spans.tell(headers)

    def current(self) -> str | None:
        """Name the current span, to be kept with a prediction that is submitted now."""
        told: dict[str, str] = {}
        self.tell(told)
        return told.get("traceparent")

    async def _open(
        self, spans: Spans, name: str, prediction_id: str, attributes: Attributes, **more: Any
    ) -> Opened:
        """Open a span in a prediction's trace, if it has one."""
        try:
            parent = spans.read(await self._read(prediction_id))
        except Exception:  # noqa: BLE001 - an outcome or an attempt must not fail for this
            parent = None
        return _UNTRACED if parent is None else spans.open(name, parent, attributes, **more)


OFF: Final = Tracing()


class Client(httpx.AsyncClient):
    """An HTTP client whose requests are spans of the trace that they belong to."""

    def __init__(self, tracing: Tracing, *, tells: bool, **given: Any) -> None:
        super().__init__(trust_env=False, **given)
        self._tracing = tracing
        self._tells = tells

    async def send(self, request: httpx.Request, **given: Any) -> httpx.Response:
        with self._tracing.ask(request) as span:
            if self._tells:
                self._tracing.tell(request.headers)
            response = await super().send(request, **given)
            span.answered(response.status_code, _REFUSED)
            return response


def _subject(prediction_id: str, provider: str, model: str | None = None) -> Attributes:
    return {
        "receiver.prediction": prediction_id,
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": model,
    }


def _problem(error: Exception) -> str:
    """Return why there are no traces; in our words, as others' may quote an address or a key."""
    match error:
        case ModuleNotFoundError():
            why = f"{error.name} is missing: pip install 'prediction-receiver[otel]'"
        case SettingsError():
            why = error.problems[0]
        case _:
            why = f"{type(error).__name__}: see the settings that begin with OTEL_"
    return f"traces are asked for, and there will be none: {why}"
