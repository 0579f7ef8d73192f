"""Prometheus metrics: counters and timers.

With PROMETHEUS_MULTIPROC_DIR (prometheus-client's own variable, the same folder for all) every
process counts into files there, and the scraped one answers with the sum; otherwise each answers
for itself. Values in the database are not counted here: they are read when the page is scraped.

Every label has few values, whatever clients send.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from receiver.model.errors import SettingsError

Instrument = TypeVar("Instrument")

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
_SHARED: Final = "PROMETHEUS_MULTIPROC_DIR"
_MAX_CHILDREN: Final = 1000
"""The most children of one instrument; further ones are counted as `other`."""
_WAITS: Final = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
"""Seconds from a submit to its outcome."""
_RUNS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Seconds that an attempt of a handler takes."""
_SIZES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class _Children(dict[tuple[str, ...], Instrument], Generic[Instrument]):
    """The children of an instrument, cached by their labels."""

    def __init__(self, make: Callable[..., Instrument]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, labels: tuple[str, ...]) -> Instrument:
        if len(self) >= _MAX_CHILDREN:
            return self._make(*("other" for _ in labels))
        child = self[labels] = self._make(*labels)
        return child


class Metrics:
    """The instruments of one receiver; only one in a process if processes share a folder.

    A page has no `_created` series, which would make it twice as long. prometheus-client can switch
    them off only for the whole process.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._shared = _shared_folder()
        self._registry = CollectorRegistry()
        if self._shared is None:
            ProcessCollector(registry=self._registry)
        self.outcomes = self._counter(
            "receiver_outcomes_total",
            "Outcomes taken, by what became of them: accepted, duplicate, late, and so on.",
            "provider",
            "channel",
            "verdict",
        )
        self.waits = self._timer(
            "receiver_outcome_wait_seconds",
            "From a prediction's submit to its outcome.",
            _WAITS,
            "channel",
        )
        self.refusals = self._counter(
            "receiver_callbacks_rejected_total",
            "Callbacks that were not taken, by reason.",
            "provider",
            "reason",
        )
        self.submits = self._counter(
            "receiver_submits_total",
            "Submits that were sent, by what came of them.",
            "provider",
            "result",
        )
        self.polls = self._counter(
            "receiver_polls_total",
            "Questions to providers about predictions, by what came of them.",
            "provider",
            "result",
        )
        self.attempts = self._counter(
            "receiver_handler_attempts_total",
            "Attempts of handlers, by how they ended.",
            "handler",
            "result",
        )
        self.runs = self._timer(
            "receiver_handler_attempt_seconds", "What attempts of handlers took.", _RUNS, "handler"
        )
        self.ends = self._counter(
            "receiver_deliveries_ended_total",
            "Deliveries that came to their end: done, skipped or dead.",
            "handler",
            "state",
        )
        self.requests = self._counter(
            "receiver_requests_total", "Requests to us, by route and status.", "route", "status"
        )
        self.batches = Histogram(
            "receiver_writer_batch_size",
            "Writes that one transaction committed.",
            buckets=_SIZES,
            registry=self._registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> _Children[Counter]:
        return _Children(Counter(name, text, labels, registry=self._registry).labels)

    def _timer(
        self, name: str, text: str, buckets: Sequence[float], label: str
    ) -> _Children[Histogram]:
        made = Histogram(name, text, (label,), buckets=buckets, registry=self._registry)
        return _Children(made.labels)

    def expose(self, gauges: Iterable[GaugeMetricFamily]) -> bytes:
        """Return the page: all counts, of all processes that share a folder, and the gauges."""
        counted: Collector = self._shared or self._registry
        return generate_latest(_Page([*counted.collect(), *gauges]))


class _Page(Collector):
    """The families of one page."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Sequence[Metric]:
        return self._families


class _Shared(MultiProcessCollector):
    """The files of all processes, except empty ones, which cannot be read.

    A new file is empty for a moment, and for ever if its process dies in that moment.
    """

    def collect(self) -> Iterator[Metric]:
        files = [str(file) for file in Path(self._path).glob("*.db") if file.stat().st_size]
        yield from self.merge(files)  # type: ignore[no-untyped-call]


def gauge(
    name: str, text: str, labels: Sequence[str], values: Mapping[Any, float]
) -> GaugeMetricFamily:
    """Return a gauge with these values, by the tuples of their labels."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for given, value in values.items():
        family.add_metric(given, value)
    return family


def _shared_folder() -> Collector | None:
    """Return the collector of the shared folder, if it is set; create a missing folder."""
    folder = os.environ.get(_SHARED)
    if not folder:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError([f"{_SHARED}: cannot make the folder: {error}"]) from error
    made: Collector = _Shared(None, folder)  # type: ignore[no-untyped-call]
    return made
