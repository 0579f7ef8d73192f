"""What the world may send us: callbacks, the /v1 API, and questions about health."""

from receiver.inbound.answers import ERROR_HANDLERS
from receiver.inbound.deliveries import Deliveries, Drained
from receiver.inbound.guard import Guard
from receiver.inbound.health import health_routes
from receiver.inbound.hook import Hook
from receiver.inbound.metrics import Page
from receiver.inbound.predictions import Predictions
from receiver.inbound.requests import Requests

__all__ = [
    "ERROR_HANDLERS",
    "Deliveries",
    "Drained",
    "Guard",
    "Hook",
    "Page",
    "Predictions",
    "Requests",
    "health_routes",
]
