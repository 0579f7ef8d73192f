"""Spans, made by OpenTelemetry's API; its SDK exports them. Imported only where traces are wanted.

A span says what happened and which kind of error it was, never in whose words: an error's message
may quote an input, a key, or an address with a token in it.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from structlog.contextvars import bound_contextvars

from receiver.model.errors import Problem, SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_W3C: Final = TraceContextTextMapPropagator()
_MOST_FRAMES: Final = 20
_OUR_FAULT: Final = 500


class Live:
    """A span under way."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        ids = span.get_span_context()
        self.ids = {
            "trace_id": trace.format_trace_id(ids.trace_id),
            "span_id": trace.format_span_id(ids.span_id),
        }
        """For log lines."""

    def note(self, **facts: str | float | None) -> None:
        """Add facts, named as they are in the log; those that are None are left out."""
        self._span.set_attributes(
            {f"receiver.{name}": fact for name, fact in facts.items() if fact is not None}
        )

    def answered(self, status: int, bad_from: int = _OUR_FAULT) -> None:
        """Note the HTTP status that this ended with; from `bad_from` on it is an error."""
        self._span.set_attribute("http.response.status_code", status)
        if status >= bad_from:
            self.fail(str(status))

    def fail(self, error: BaseException | str) -> None:
        """Say that this failed: by the type of an error and where it came from, or by a word."""
        kind = error if isinstance(error, str) else type(error).__qualname__
        self._span.set_attribute("error.type", kind)
        self._span.set_status(trace.StatusCode.ERROR, kind)
        if isinstance(error, BaseException):
            frames = traceback.format_tb(error.__traceback__, -_MOST_FRAMES)
            self._span.add_event(
                "exception", {"exception.type": kind, "exception.stacktrace": "".join(frames)}
            )


class Spans:
    """Makes spans for one tracer provider."""

    def __init__(self, provider: trace.TracerProvider) -> None:
        self._tracer = provider.get_tracer("receiver", version("prediction-receiver"))

    def is_inside(self) -> bool:
        """Return whether what runs now belongs to a trace."""
        return _is_valid(trace.get_current_span())

    def read(self, traceparent: str | None) -> Context | None:
        """Make a parent of a W3C traceparent; None if it is none, or not a sound one."""
        context = _W3C.extract({"traceparent": traceparent or ""}, Context())
        return context if _is_valid(trace.get_current_span(context)) else None

    def tell(self, headers: MutableMapping[str, str]) -> None:
        """Add the current span's traceparent, if there is a current span."""
        _W3C.inject(headers)

    @contextmanager
    def open(
        self,
        name: str,
        within: Context | None,
        attributes: Mapping[str, str | int | None],
        *,
        kind: str = "INTERNAL",
        start: float | None = None,
    ) -> Iterator[Live]:
        """Be in a new span until the block is left; its ids are on every log line meanwhile.

        Without `within` it is a child of the current span; else that is linked to.
        """
        here = trace.get_current_span().get_span_context()
        span = self._tracer.start_span(
            name,
            within,
            trace.SpanKind[kind],
            {key: value for key, value in attributes.items() if value is not None},
            [trace.Link(here)] if within is not None and here.is_valid else None,
            start_time=None if start is None else int(start * 1e9),
        )
        live = Live(span)
        with (
            trace.use_span(
                span, end_on_exit=True, record_exception=False, set_status_on_exception=False
            ),
            bound_contextvars(**live.ids),
        ):
            try:
                yield live
            except Problem as problem:
                live.answered(problem.status)
                raise
            except BaseException as error:
                live.fail(error)
                raise


def _is_valid(span: trace.Span) -> bool:
    return span.get_span_context().is_valid


def provider_in_use() -> trace.TracerProvider | None:
    """Return the tracer provider that the embedding program has set, if it has."""
    provider = trace.get_tracer_provider()
    idle = isinstance(provider, trace.ProxyTracerProvider | trace.NoOpTracerProvider)
    return None if idle else provider


def exporting(names: Sequence[str]) -> Exporting:
    """Export to all of these, as the environment says how.

    Raises ModuleNotFoundError without the SDK, and SettingsError for a name that nothing
    here has.
    """
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - others bring a provider
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    exporters = [_exporter(name)() for name in names]
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "receiver"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        # In batches, by a thread of its own; what its queue has no room for is dropped.
        provider.add_span_processor(BatchSpanProcessor(exporter))
    # A try that failed is a warning there, and a batch that is lost an error: one line will do.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    return Exporting(provider, exporters)


def _exporter(name: str) -> Any:
    found = entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        known = "prediction-receiver[otel] brings otlp, over http/protobuf, and console"
        raise SettingsError([f"no exporter named {name} is installed: {known}"])
    return next(iter(found)).load()


class Exporting:
    """A provider of ours, and where its spans go."""

    def __init__(self, provider: TracerProvider, exporters: Sequence[SpanExporter]) -> None:
        self.provider = provider
        self._exporters = exporters

    def stop(self, seconds: float) -> None:
        """Send what waits, in that time at most; then give up."""
        # By itself it would wait for a dead collector for half a minute.
        last = threading.Thread(target=self.provider.shutdown, daemon=True)
        last.start()
        last.join(seconds)
        if last.is_alive():
            for exporter in self._exporters:
                with suppress(Exception):
                    exporter.shutdown()
