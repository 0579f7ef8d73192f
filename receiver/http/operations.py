"""Every route of the app, by the headings of its description."""

from __future__ import annotations

from typing import Final

from receiver.http import webhooks as hook
from receiver.http.routes import (
    deliveries,
    docs,
    echo,
    events,
    handlers,
    health,
    metrics,
    predictions,
    replays,
)
from receiver.http.routes import discarded as undelivered

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
