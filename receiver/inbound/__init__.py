"""What the world may send us: callbacks, the /v1 API, and questions about health."""

from typing import Final

from receiver.inbound import (
    deliveries,
    docs,
    echo,
    events,
    handlers,
    health,
    hook,
    metrics,
    predictions,
    replays,
    undelivered,
)
from receiver.inbound.answers import ERROR_HANDLERS
from receiver.inbound.deliveries import Deliveries
from receiver.inbound.docs import Docs
from receiver.inbound.echo import echo_route
from receiver.inbound.events import Events
from receiver.inbound.guard import Guard
from receiver.inbound.handlers import Handlers
from receiver.inbound.health import health_routes
from receiver.inbound.hook import Hook
from receiver.inbound.limits import Limits
from receiver.inbound.metrics import MetricsPage
from receiver.inbound.outgoing import WEBHOOKS
from receiver.inbound.predictions import Predictions
from receiver.inbound.proxies import Proxies
from receiver.inbound.replays import ReplayRoutes
from receiver.inbound.requests import Requests
from receiver.inbound.sources import PublishedRanges, Ranges, Sources, listed
from receiver.inbound.undelivered import undelivered_routes

OPERATIONS: Final = {
    "Predictions": predictions.OPERATIONS,
    "Deliveries": deliveries.OPERATIONS,
    "Events": events.OPERATIONS,
    "Handlers": handlers.OPERATIONS,
    "Replays": replays.OPERATIONS,
    "Undelivered": undelivered.OPERATIONS,
    "Callbacks": hook.OPERATIONS + echo.OPERATIONS,
    "Health": health.OPERATIONS + metrics.OPERATIONS,
    "About": docs.OPERATIONS,
}
"""Every route of the app, by the headings of its description; a test sees that none is missing."""

__all__ = [
    "ERROR_HANDLERS",
    "OPERATIONS",
    "WEBHOOKS",
    "Deliveries",
    "Docs",
    "Events",
    "Guard",
    "Handlers",
    "Hook",
    "Limits",
    "MetricsPage",
    "Predictions",
    "Proxies",
    "PublishedRanges",
    "Ranges",
    "ReplayRoutes",
    "Requests",
    "Sources",
    "echo_route",
    "health_routes",
    "listed",
    "undelivered_routes",
]
