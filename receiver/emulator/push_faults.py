"""Fault injection for callbacks and stream events: lose, repeat, delay or reorder them."""

from collections.abc import Callable

from receiver.emulator.callback_sender import Timers
from receiver.emulator.faults import Faults
from receiver.emulator.ledger import Attempt, Prediction
from receiver.emulator.options import Provider

_DELAY = 3.0
_HELD_AT_MOST = 2.0

Deliver = Callable[[], None]


class PushFaults:
    """Delivery of callbacks and events, with the faults in force."""

    def __init__(self, faults: Faults, timers: Timers) -> None:
        self._faults = faults
        self._timers = timers
        self._held: dict[Provider, Deliver] = {}

    def push(self, prediction: Prediction, deliver: Deliver) -> None:
        provider, prompt = prediction.provider, prediction.prompt
        if self._lost(prediction):
            prediction.record_attempt(Attempt(self._timers.now(), error="lost"))
        elif rule := self._faults.take("delay_callback", provider, prompt):
            seconds = _DELAY if rule.seconds is None else rule.seconds
            self._timers.after(seconds, lambda: self._send(prediction, deliver))
        elif rule := self._faults.take("reorder_callbacks", provider, prompt):
            self._hold(prediction, deliver, rule.seconds)
        else:
            self._send(prediction, deliver)

    def _lost(self, prediction: Prediction) -> bool:
        provider, prompt = prediction.provider, prediction.prompt
        if self._faults.take("lose_callback", provider, prompt):
            return True
        return provider == "oxen" and bool(self._faults.take("lose_event", provider, prompt))

    def _send(self, prediction: Prediction, deliver: Deliver) -> None:
        rule = self._faults.take("repeat_callback", prediction.provider, prediction.prompt)
        for _ in range(rule.copies if rule else 1):
            deliver()
        self._release(prediction.provider)

    def _hold(self, prediction: Prediction, deliver: Deliver, seconds: float | None) -> None:
        """Hold a callback until the next one is sent, for `seconds` at most."""
        provider = prediction.provider
        self._release(provider)
        self._held[provider] = deliver
        longest = _HELD_AT_MOST if seconds is None else seconds
        self._timers.after(longest, lambda: self._release(provider, deliver))

    def _release(self, provider: Provider, only: Deliver | None = None) -> None:
        if only is None or self._held.get(provider) is only:
            deliver = self._held.pop(provider, None)
            if deliver:
                deliver()
