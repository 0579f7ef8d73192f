"""The facades that the pages use: those of one run, as in the routes of the API."""

from __future__ import annotations

from typing import NamedTuple

from receiver.deliveries.facade import Deliveries
from receiver.http.facade import Http
from receiver.observability.runtime import Runtime
from receiver.predictions.facade import Predictions
from receiver.settings import Settings
from receiver.store.facade import Store


class Facades(NamedTuple):
    """The facades of one run."""

    settings: Settings
    store: Store
    predictions: Predictions
    deliveries: Deliveries
    runtime: Runtime
    http: Http
