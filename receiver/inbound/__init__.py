"""What the world may send us: callbacks, the /v1 API, and two questions about health."""

from receiver.inbound.answers import ERROR_HANDLERS
from receiver.inbound.deliveries import Deliveries, Drained
from receiver.inbound.guard import Guard
from receiver.inbound.health import health_routes
from receiver.inbound.hook import Hook
from receiver.inbound.limits import Limits
from receiver.inbound.predictions import Predictions
from receiver.inbound.proxies import Proxies
from receiver.inbound.sources import PublishedRanges, Ranges, Sources, listed

__all__ = [
    "ERROR_HANDLERS",
    "Deliveries",
    "Drained",
    "Guard",
    "Hook",
    "Limits",
    "Predictions",
    "Proxies",
    "PublishedRanges",
    "Ranges",
    "Sources",
    "health_routes",
    "listed",
]
