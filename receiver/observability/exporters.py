"""Exporters of traces, by OpenTelemetry's SDK. Imported only if its settings ask for traces."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from receiver.model.errors import SettingsError
from receiver.model.tasks import start_thread


def exporting(names: Sequence[str]) -> Exporting:
    """Return a provider that exports to all of these, configured by the environment.

    Raises SettingsError for a name without an installed exporter.
    """
    exporters = [_exporter(name)() for name in names]
    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "receiver"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        # In batches, by its own thread; spans that its queue has no room for are dropped.
        provider.add_span_processor(BatchSpanProcessor(exporter))
    # A failed try is logged there as a warning, a lost batch as an error: one line is enough.
    logging.getLogger("opentelemetry.exporter").setLevel(logging.ERROR)
    return Exporting(provider, exporters)


def _exporter(name: str) -> Any:
    found = entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        known = "prediction-receiver[otel] brings otlp, over http/protobuf, and console"
        raise SettingsError([f"no exporter named {name} is installed: {known}"])
    return next(iter(found)).load()


class Exporting:
    """Our tracer provider and its exporters."""

    def __init__(self, provider: TracerProvider, exporters: Sequence[SpanExporter]) -> None:
        self.provider = provider
        self._exporters = exporters

    def stop(self, seconds: float) -> None:
        """Send the last spans, for `seconds` at most; then give up."""
        # Without the thread it would wait half a minute for a dead collector.
        last = start_thread("receiver-traces", self.provider.shutdown)
        last.join(seconds)
        if last.is_alive():
            for exporter in self._exporters:
                with suppress(Exception):
                    exporter.shutdown()
