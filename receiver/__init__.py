"""Submit predictions, record every outcome exactly once, run your handlers on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from receiver.app import create_app
    from receiver.asgi import mount
    from receiver.client import AsyncReceiver, ClientError, Receiver
    from receiver.deliveries.context import Context
    from receiver.deliveries.fetch import Fetched
    from receiver.deliveries.handler_settings import read_settings
    from receiver.deliveries.handlers import Dead, Retry, Skip, on
    from receiver.deliveries.responses import expect
    from receiver.deliveries.template import Template, cut
    from receiver.deliveries.ways_in import Call, Reply, route, source
    from receiver.http.door import Door
    from receiver.model.errors import Problem, Unproved
    from receiver.model.values import Event, Output, Prediction, Stored
    from receiver.settings import Secret
    from receiver.settings.toml import Table

__version__ = "0.1.0"

__all__ = [
    "AsyncReceiver",
    "Call",
    "ClientError",
    "Context",
    "Dead",
    "Door",
    "Event",
    "Fetched",
    "Output",
    "Prediction",
    "Problem",
    "Receiver",
    "Reply",
    "Retry",
    "Secret",
    "Skip",
    "Stored",
    "Table",
    "Template",
    "Unproved",
    "create_app",
    "cut",
    "expect",
    "mount",
    "on",
    "read_settings",
    "route",
    "source",
]

_FROM = {
    "receiver.app": ("create_app",),
    "receiver.asgi": ("mount",),
    "receiver.client": ("AsyncReceiver", "ClientError", "Receiver"),
    "receiver.deliveries.context": ("Context",),
    "receiver.deliveries.fetch": ("Fetched",),
    "receiver.deliveries.handler_settings": ("read_settings",),
    "receiver.deliveries.handlers": ("Dead", "Retry", "Skip", "on"),
    "receiver.deliveries.responses": ("expect",),
    "receiver.deliveries.template": ("Template", "cut"),
    "receiver.deliveries.ways_in": ("Call", "Reply", "route", "source"),
    "receiver.http.door": ("Door",),
    "receiver.model.errors": ("Problem", "Unproved"),
    "receiver.model.values": ("Event", "Output", "Prediction", "Stored"),
    "receiver.settings": ("Secret",),
    "receiver.settings.toml": ("Table",),
}
_LATE = {name: module for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: a client needs few of them."""
    if name not in _LATE:
        raise AttributeError(f"module 'receiver' has no attribute {name!r}")
    import importlib  # noqa: PLC0415 - see above

    found = globals()[name] = getattr(importlib.import_module(_LATE[name]), name)
    return found
