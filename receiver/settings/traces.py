"""OpenTelemetry's own settings that decide where traces are exported."""

from __future__ import annotations

from typing import Final

from receiver.settings.parsers import collector_url, texts
from receiver.settings.reader import Reader

NAMES: Final = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_TRACES_EXPORTER",
    "OTEL_SDK_DISABLED",
)
_OTLP: Final = {
    "": "otlp_proto_http",
    "http/protobuf": "otlp_proto_http",
    "grpc": "otlp_proto_grpc",
}


def read_exporters(reader: Reader) -> tuple[str, ...] | None:
    """Return the exporters by OpenTelemetry's standard, by default over HTTP; None if disabled."""
    if reader.get("OTEL_SDK_DISABLED", str.lower, "") == "true":
        return None
    protocol = reader.get("OTEL_EXPORTER_OTLP_PROTOCOL", str, "")
    protocol = reader.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", str, protocol)
    variables = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    # For gRPC a host and a port are enough.
    endpoints = [
        reader.get(name, str if protocol == "grpc" else collector_url, "") for name in variables
    ]
    names = reader.get("OTEL_TRACES_EXPORTER", texts, ("otlp",) if any(endpoints) else ())
    otlp = _OTLP.get(protocol, protocol)
    return tuple(otlp if name == "otlp" else name for name in names if name != "none")
