"""Submit predictions, record every outcome exactly once, run your handlers on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from receiver.deliveries.registry import Dead, Retry, Skip, on
from receiver.model.values import Event, Output, Prediction, Stored

if TYPE_CHECKING:
    from receiver.app import create_app
    from receiver.deliveries.attempt import Context
    from receiver.deliveries.fetch import Fetched
    from receiver.deliveries.handler_settings import read_settings
    from receiver.deliveries.responses import expect
    from receiver.deliveries.template import Template, cut
    from receiver.settings import Secret

__version__ = "0.1.0"

__all__ = [
    "Context",
    "Dead",
    "Event",
    "Fetched",
    "Output",
    "Prediction",
    "Retry",
    "Secret",
    "Skip",
    "Stored",
    "Template",
    "create_app",
    "cut",
    "expect",
    "on",
    "read_settings",
]

_LATE = {
    "Context": "receiver.deliveries.attempt",
    "Fetched": "receiver.deliveries.fetch",
    "Secret": "receiver.settings",
    "Template": "receiver.deliveries.template",
    "create_app": "receiver.app",
    "cut": "receiver.deliveries.template",
    "expect": "receiver.deliveries.responses",
    "read_settings": "receiver.deliveries.handler_settings",
}


def __getattr__(name: str) -> Any:
    """Import the heavy names when they are first used: a client command needs none of them."""
    if name not in _LATE:
        raise AttributeError(f"module 'receiver' has no attribute {name!r}")
    import importlib  # noqa: PLC0415 - see above

    return getattr(importlib.import_module(_LATE[name]), name)
