"""Traces: one trace of all steps of a prediction, from its submit to its handlers.

    POST /v1/predictions      server; a child of the caller's own span, if it names one
    ├── submit fal            until the answer, or the reason for having none, is stored
    │   └── POST              client
    ├── poll fal              each, with its requests as children
    ├── outcome fal           the outcome; consumer, if it was pushed or streamed
    └── handler announce      each attempt, with its requests by `ctx.http` as children,
        ├── POST              client; it passes the trace on
        └── submit fal …      and all spans of a prediction that it submits, in the same trace

The W3C traceparent of the first span is stored with the prediction: each process that works on it,
also after a restart, continues its trace. A prediction that was submitted without tracing has no
trace, and no spans. The traceparent is not sent to providers.

OpenTelemetry's API is part of every install; by itself its spans do nothing. The SDK, which exports
them, is imported only if its own settings ask for traces; an embedding program may have its own
tracer provider.

A span contains what happened and the type of an error, never the message of an error: that may
quote an input, a key, or an address with a token in it.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import httpx
import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.requests import Request
from structlog.contextvars import bound_contextvars

from receiver.model.errors import Problem, SettingsError
from receiver.store.deliveries import Claim
from receiver.store.inbox import AcceptResult, IncomingOutcome
from receiver.store.predictions import Job

if TYPE_CHECKING:
    from receiver.observability.exporters import Exporting

log = structlog.get_logger("receiver")

_W3C: Final = TraceContextTextMapPropagator()
_FLUSH_SECONDS: Final = 1.5
"""Seconds to flush the last spans at shutdown."""
_MOST_FRAMES: Final = 20
_SERVER_ERROR: Final = 500
_CLIENT_ERROR: Final = 400
_TRACED: Final = frozenset({"accepted", "late", "ask"})
"""Verdicts that have a span; a duplicate has none, as its sender may repeat it without end."""
_PUSHED: Final = frozenset({"webhook", "sse"})
_PORTS: Final = {"http": 80, "https": 443}


class Span:
    """A span, or a no-op if nothing is traced."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        context = span.get_span_context()
        self.ids: Mapping[str, str] = {}
        """For log lines; empty if it is not traced."""
        if context.is_valid:
            self.ids = {
                "trace_id": trace.format_trace_id(context.trace_id),
                "span_id": trace.format_span_id(context.span_id),
            }

    def note(self, **facts: str | float | None) -> None:
        """Add facts, named as they are in the log; those that are None are left out."""
        if self._span.is_recording():
            self._span.set_attributes(
                {f"receiver.{name}": fact for name, fact in facts.items() if fact is not None}
            )

    def answered(self, status: int, bad_from: int = _SERVER_ERROR) -> None:
        """Note the HTTP status that this ended with; from `bad_from` on it is an error."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= bad_from:
            self.fail(str(status))

    def fail(self, error: BaseException | str) -> None:
        """Record a failure: the type and the frames of an error, or a word."""
        if not self._span.is_recording():
            return
        kind = error if isinstance(error, str) else type(error).__qualname__
        self._span.set_attribute("error.type", kind)
        self._span.set_status(trace.StatusCode.ERROR, kind)
        if isinstance(error, BaseException):
            frames = traceback.format_tb(error.__traceback__, -_MOST_FRAMES)
            self._span.add_event(
                "exception", {"exception.type": kind, "exception.stacktrace": "".join(frames)}
            )


Opened: TypeAlias = AbstractContextManager[Span]
Attributes: TypeAlias = Mapping[str, str | int | None]
_UNTRACED: Final = nullcontext(Span(trace.INVALID_SPAN))


class Tracing:
    """Makes the spans of predictions, once it is started with exporters or a tracer provider.

    No method raises an error of its own, or waits for a collector.
    """

    def __init__(self) -> None:
        self._tracer: trace.Tracer = trace.NoOpTracer()
        self._exporting: Exporting | None = None
        self.on = False

    def start(self, exporters: Sequence[str] | None) -> None:
        """Start, if there are exporters or the embedding program has a tracer provider.

        With None it never starts.
        """
        if exporters is None:
            return
        try:
            self._start(exporters)
        except Exception as error:  # noqa: BLE001 - no error may stop predictions
            log.warning("settings.warning", problem=_problem(error))

    def _start(self, exporters: Sequence[str]) -> None:
        provider = trace.get_tracer_provider()
        if isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider):
            if not exporters:
                return
            from receiver.observability.exporters import exporting  # noqa: PLC0415 - an extra

            self._exporting = exporting(exporters)
            provider = self._exporting.provider
        self._tracer = provider.get_tracer("receiver", version("prediction-receiver"))
        self.on = True

    async def stop(self) -> None:
        """Send the last spans, for a moment at most."""
        exporting, self._exporting, self.on = self._exporting, None, False
        if exporting is not None:
            await asyncio.to_thread(exporting.stop, _FLUSH_SECONDS)

    # --- spans ---

    def request(self, request: Request, route: str) -> Opened:
        """Open the server span of an authenticated request."""
        if not self.on:
            return _UNTRACED
        inside = _is_inside()  # a span of the embedding program
        given = None if inside else parent_of(request.headers.get("traceparent"))
        return self._open(
            f"{request.method} {route}",
            given,
            {
                "http.request.method": request.method,
                "http.route": route,
                "url.scheme": request.url.scheme,
            },
            kind=SpanKind.INTERNAL if inside else SpanKind.SERVER,
        )

    def submit(self, job: Job) -> Opened:
        """Open the span of a submit."""
        return self._job_span(job, "submit", {"receiver.submit": job.submits})

    def poll(self, job: Job) -> Opened:
        """Open the span of a poll."""
        return self._job_span(job, "poll", {"receiver.poll": job.polls + 1})

    def _job_span(self, job: Job, what: str, more: Attributes) -> Opened:
        subject = _subject(job.ticket.id, job.provider, job.ticket.model)
        return self._continue(job.trace, f"{what} {job.provider}", {**subject, **more})

    def outcome(self, arrival: IncomingOutcome, taken: AcceptResult) -> Opened:
        """Open the span of an outcome, from its arrival."""
        if not self.on or taken.verdict not in _TRACED:
            return _UNTRACED
        attributes = {
            **_subject(arrival.prediction_id, arrival.provider),
            "receiver.channel": arrival.channel,
            "receiver.outcome": arrival.outcome.kind,
            "receiver.verdict": taken.verdict,
            "receiver.event_id": taken.event_id,
        }
        return self._continue(
            taken.trace,
            f"outcome {arrival.provider}",
            attributes,
            kind=SpanKind.CONSUMER if arrival.channel in _PUSHED else SpanKind.INTERNAL,
            start=arrival.at,
        )

    def attempt(self, claim: Claim) -> Opened:
        """Open the span of an attempt."""
        if not self.on:
            return _UNTRACED
        prediction = claim.event.prediction
        attributes = {
            **_subject(prediction.id, prediction.provider, prediction.model),
            "receiver.event_id": claim.event.id,
            "receiver.delivery": claim.id,
            "receiver.handler": claim.handler,
            "receiver.attempt": claim.attempt,
        }
        return self._continue(claim.trace, f"handler {claim.handler}", attributes)

    def client_request(self, request: httpx.Request) -> Opened:
        """Open a client span inside a trace; of the URL only the host is recorded."""
        if not self.on or not _is_inside():
            return _UNTRACED
        attributes = {
            "http.request.method": request.method,
            "server.address": request.url.host,
            "server.port": request.url.port or _PORTS.get(request.url.scheme),
        }
        return self._open(request.method, None, attributes, kind=SpanKind.CLIENT)

    def inject(self, headers: MutableMapping[str, str]) -> None:
        """Add the current span's traceparent, if there is one, to headers without one."""
        if self.on and "traceparent" not in headers:
            _W3C.inject(headers)

    def current(self) -> str | None:
        """Return the current span's traceparent, to be stored with a prediction."""
        headers: dict[str, str] = {}
        self.inject(headers)
        return headers.get("traceparent")

    def _continue(
        self, traceparent: str | None, name: str, attributes: Attributes, **more: Any
    ) -> Opened:
        """Open a span in a prediction's trace, if it has one."""
        parent = parent_of(traceparent) if self.on else None
        return _UNTRACED if parent is None else self._open(name, parent, attributes, **more)

    @contextmanager
    def _open(
        self,
        name: str,
        within: Context | None,
        attributes: Attributes,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        start: float | None = None,
    ) -> Iterator[Span]:
        """Open a span until the block is left; its ids are on every log line meanwhile.

        Without `within` it is a child of the current span; otherwise it is linked to that.
        """
        here = trace.get_current_span().get_span_context()
        made = self._tracer.start_span(
            name,
            within,
            kind,
            {key: value for key, value in attributes.items() if value is not None},
            [trace.Link(here)] if within is not None and here.is_valid else None,
            start_time=None if start is None else int(start * 1e9),
        )
        span = Span(made)
        with (
            trace.use_span(
                made, end_on_exit=True, record_exception=False, set_status_on_exception=False
            ),
            bound_contextvars(**span.ids),
        ):
            try:
                yield span
            except Problem as problem:
                span.answered(problem.status)
                raise
            except BaseException as error:
                span.fail(error)
                raise


def parent_of(traceparent: str | None) -> Context | None:
    """Return the parent context of a W3C traceparent; None if that is missing or invalid."""
    if traceparent is None:
        return None
    context = _W3C.extract({"traceparent": traceparent}, Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def _is_inside() -> bool:
    """Return whether there is a current span."""
    return trace.get_current_span().get_span_context().is_valid


class Client(httpx.AsyncClient):
    """An HTTP client whose requests are spans of the trace that they belong to."""

    def __init__(self, tracing: Tracing, *, propagates: bool, **given: Any) -> None:
        super().__init__(trust_env=False, **given)
        self._tracing = tracing
        self._propagates = propagates

    async def send(self, request: httpx.Request, **given: Any) -> httpx.Response:
        with self._tracing.client_request(request) as span:
            if self._propagates:
                self._tracing.inject(request.headers)
            response = await super().send(request, **given)
            span.answered(response.status_code, _CLIENT_ERROR)
            return response


def _subject(prediction_id: str, provider: str, model: str | None = None) -> Attributes:
    return {
        "receiver.prediction": prediction_id,
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": model,
    }


def _problem(error: Exception) -> str:
    """Return why there are no traces, without the text of foreign errors: it may quote a key."""
    match error:
        case ModuleNotFoundError():
            why = f"{error.name} is missing: pip install 'prediction-receiver[otel]'"
        case SettingsError():
            why = error.problems[0]
        case _:
            why = f"{type(error).__name__}: see the settings that begin with OTEL_"
    return f"traces are asked for, and there will be none: {why}"
