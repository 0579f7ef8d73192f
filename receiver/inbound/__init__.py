"""What the world may send us: callbacks, the /v1 API, and two questions about health."""

from typing import Final

from receiver.inbound import deliveries, docs, echo, events, handlers, health, hook, predictions
from receiver.inbound.answers import ERROR_HANDLERS
from receiver.inbound.deliveries import Deliveries, Drained
from receiver.inbound.docs import Docs
from receiver.inbound.echo import echo_route
from receiver.inbound.events import Events
from receiver.inbound.guard import Guard
from receiver.inbound.handlers import Handlers
from receiver.inbound.health import health_routes
from receiver.inbound.hook import Hook
from receiver.inbound.outgoing import WEBHOOKS
from receiver.inbound.predictions import Predictions

OPERATIONS: Final = {
    "Predictions": predictions.OPERATIONS,
    "Deliveries": deliveries.OPERATIONS,
    "Events": events.OPERATIONS,
    "Handlers": handlers.OPERATIONS,
    "Callbacks": hook.OPERATIONS + echo.OPERATIONS,
    "Health": health.OPERATIONS,
    "About": docs.OPERATIONS,
}
"""Every route of the app, by the headings of its description; a test sees that none is missing."""

__all__ = [
    "ERROR_HANDLERS",
    "OPERATIONS",
    "WEBHOOKS",
    "Deliveries",
    "Docs",
    "Drained",
    "Events",
    "Guard",
    "Handlers",
    "Hook",
    "Predictions",
    "echo_route",
    "health_routes",
]
