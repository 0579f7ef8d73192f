"""Endings and faults of the emulator that cause a given event."""

from __future__ import annotations

from typing import Final

import msgspec

from receiver.emulator import Rule, settings_for
from receiver.emulator.endings import Ending, Failure
from receiver.model.values import ErrorCode, Event, Output, Prediction
from receiver.providers import DECLARED

SETTINGS: Final = {
    **{declared.key: f"{name}-key-of-a-test" for name, declared in DECLARED.items()},
    **settings_for("https://providers.test"),
}
_FAILURES: Final[dict[ErrorCode, Failure]] = {
    "content_policy": "moderated",
    "timeout": "timeout",
}


def ending_of(event: Event) -> Ending:
    """Return the ending that causes an event of success or failure."""
    prediction = event.prediction
    if prediction.output is not None:
        return Ending(output=_made(prediction.output))
    error = prediction.error
    if error is None:
        return Ending("model")
    return Ending(_FAILURES.get(error.code, "model"), error.message)


def refusals_of(prediction: Prediction) -> list[Rule]:
    """Return the rules that refuse or drop the submit, if the prediction fails that way."""
    error = prediction.error
    if error is None:
        return []
    if error.code == "rejected":
        return [Rule(fault="refuse_submit", times=1, status=400, reason=error.message)]
    return [Rule(fault="drop_submit", times=1)] if error.code == "unconfirmed" else []


def _made(outputs: list[Output]) -> tuple[dict[str, object], ...] | str:
    """Return files as objects; a single text output as the text."""
    if len(outputs) == 1 and outputs[0].url is None:
        return outputs[0].text or ""
    return tuple(msgspec.to_builtins(output) for output in outputs)
