"""The parts of one run of the receiver, as its routes, doors and pages use them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from receiver.deliveries.facade import Deliveries
from receiver.http.drain import Drain
from receiver.http.limits import Limits
from receiver.http.live import LiveStream
from receiver.model.tasks import TaskSet
from receiver.observability.runtime import Runtime
from receiver.predictions.facade import Predictions
from receiver.settings import Settings
from receiver.store.facade import Store


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one run."""

    settings: Settings
    store: Store
    predictions: Predictions
    deliveries: Deliveries
    runtime: Runtime
    drain: Drain
    limits: Limits
    live: LiveStream
    later: TaskSet = field(default_factory=TaskSet)
    """The work that plugins leave for after their answers."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when callers that wait for an outcome are answered at once, as we stop."""
