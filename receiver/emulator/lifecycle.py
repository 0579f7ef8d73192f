"""The life cycle of predictions: queued, running and ended, at planned times."""

from collections import Counter
from collections.abc import Callable

from receiver.emulator.callback_sender import Timers
from receiver.emulator.ledger import Prediction, State
from receiver.emulator.options import Provider


class Lifecycle:
    """The states of predictions, and the call of the provider's `on_finish` at the end.

    queued -> running -> succeeded | failed; queued | running -> cancelled.
    """

    def __init__(self, timers: Timers) -> None:
        self._timers = timers
        self.queued: Counter[Provider] = Counter()
        self.in_flight: Counter[tuple[Provider, str]] = Counter()
        """Unfinished predictions by provider and account."""
        self.on_finish: dict[Provider, Callable[[Prediction], None]] = {}

    def start(self, prediction: Prediction) -> None:
        self.queued[prediction.provider] += 1
        self.in_flight[prediction.provider, prediction.account] += 1
        if prediction.plan.queued:
            self._timers.after(prediction.plan.queued, lambda: self._begin(prediction))
        else:
            self._begin(prediction)

    def finish(self, prediction: Prediction) -> None:
        if self.end(prediction):
            self.on_finish[prediction.provider](prediction)

    def end(self, prediction: Prediction, state: State | None = None) -> bool:
        """End a prediction, as planned or in `state`, without `on_finish`.

        Return False if it has ended before.
        """
        if prediction.finished:
            return False
        prediction.completed_at = self._timers.now()
        self._move(prediction, state or ("failed" if prediction.plan.failure else "succeeded"))
        self.in_flight[prediction.provider, prediction.account] -= 1
        return True

    def cancel(self, prediction: Prediction) -> bool:
        return self.end(prediction, "cancelled")

    def _begin(self, prediction: Prediction) -> None:
        if prediction.state != "queued":
            return
        prediction.started_at = self._timers.now()
        self._move(prediction, "running")
        if prediction.plan.running is not None:
            self._timers.after(prediction.plan.running, lambda: self.finish(prediction))

    def _move(self, prediction: Prediction, state: State) -> None:
        if prediction.state == "queued":
            self.queued[prediction.provider] -= 1
        prediction.move(state)
