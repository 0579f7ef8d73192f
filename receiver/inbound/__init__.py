"""What the world may send us: callbacks, the /v1 API, and two questions about health."""

from receiver.inbound.answers import ERROR_HANDLERS
from receiver.inbound.deliveries import Deliveries, Drained
from receiver.inbound.echo import echo_route
from receiver.inbound.events import Events
from receiver.inbound.guard import Guard
from receiver.inbound.handlers import Handlers
from receiver.inbound.health import health_routes
from receiver.inbound.hook import Hook
from receiver.inbound.predictions import Predictions

__all__ = [
    "ERROR_HANDLERS",
    "Deliveries",
    "Drained",
    "Events",
    "Guard",
    "Handlers",
    "Hook",
    "Predictions",
    "echo_route",
    "health_routes",
]
