"""Where predictions are worked on: queued, running, finished, each at its time."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping

from receiver.emulator.courier import Timers
from receiver.emulator.ledger import Prediction, State
from receiver.emulator.options import Provider


class Studio:
    """Moves predictions along and tells the provider about the end.

    queued -> running -> succeeded | failed, and cancelled from either of the first two.
    """

    def __init__(self, timers: Timers, concurrency: Mapping[Provider, int | None]) -> None:
        self._timers = timers
        self._concurrency = concurrency
        self._waiting: dict[Provider, deque[Prediction]] = defaultdict(deque)
        self._states: Counter[tuple[Provider, State]] = Counter()
        self._open: Counter[tuple[Provider, str]] = Counter()
        self.on_finish: dict[Provider, Callable[[Prediction], None]] = {}

    def queued(self, provider: Provider) -> int:
        return self._states[provider, "queued"]

    def in_flight(self, provider: Provider, account: str) -> int:
        return self._open[provider, account]

    def waiting(self, provider: Provider) -> deque[Prediction]:
        """Return those kept back by the limit on concurrency, the next one first."""
        return self._waiting[provider]

    def full(self, provider: Provider) -> bool:
        limit = self._concurrency.get(provider)
        return limit is not None and self._states[provider, "running"] >= limit

    def start(self, prediction: Prediction) -> None:
        self._states[prediction.provider, "queued"] += 1
        self._open[prediction.provider, prediction.account] += 1
        if prediction.plan.queued:
            self._timers.after(prediction.plan.queued, lambda: self._begin(prediction))
        else:
            self._begin(prediction)

    def finish(self, prediction: Prediction) -> None:
        if self.end(prediction):
            self.on_finish[prediction.provider](prediction)

    def end(self, prediction: Prediction) -> bool:
        """End the work as planned; nobody is told. Return whether there was any left."""
        if prediction.finished:
            return False
        self._end(prediction, "failed" if prediction.plan.failure else "succeeded")
        return True

    def cancel(self, prediction: Prediction) -> bool:
        """Stop the work; nobody is told. Return whether there was any left."""
        if prediction.finished:
            return False
        self._end(prediction, "cancelled")
        return True

    def _begin(self, prediction: Prediction) -> None:
        if prediction.state != "queued":
            return
        if self.full(prediction.provider):
            self._waiting[prediction.provider].append(prediction)
            return
        prediction.started_at = self._timers.now()
        self._move(prediction, "running")
        if prediction.plan.running is not None:
            self._timers.after(prediction.plan.running, lambda: self.finish(prediction))

    def _end(self, prediction: Prediction, state: State) -> None:
        prediction.completed_at = self._timers.now()
        self._move(prediction, state)
        self._open[prediction.provider, prediction.account] -= 1
        waiting = self._waiting[prediction.provider]
        while waiting and not self.full(prediction.provider):
            self._begin(waiting.popleft())

    def _move(self, prediction: Prediction, state: State) -> None:
        self._states[prediction.provider, prediction.state] -= 1
        self._states[prediction.provider, state] += 1
        prediction.move(state)
