"""The timeline of a prediction: its changes, arrivals and attempts, in order of time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from receiver.model.answers import Delivery
from receiver.model.values import Prediction
from receiver.store.search import Arrival

_TONES: Final = {"done": "succeeded", "skip": "canceled"}
"""Tones by the result of an attempt; any other result is a failure."""


class Moment(NamedTuple):
    """One entry of the timeline."""

    time: datetime
    what: str
    tone: str
    """Its colour: the name of a status, or empty."""
    more: str = ""


def timeline(
    prediction: Prediction, arrivals: Sequence[Arrival], deliveries: Sequence[Delivery]
) -> list[Moment]:
    """Return the entries, oldest first."""
    moments = [*_of_prediction(prediction), *_of_arrivals(arrivals), *_of_attempts(deliveries)]
    return sorted(moments, key=lambda each: each.time)


def _of_prediction(prediction: Prediction) -> Iterator[Moment]:
    yield Moment(prediction.created_at, "created", "queued")
    if prediction.submitted_at:
        yield Moment(prediction.submitted_at, f"submitted to {prediction.provider}", "processing")
    if prediction.completed_at:
        by = f"by {prediction.channel}" if prediction.channel else "by our own verdict"
        code = prediction.error.code if prediction.error else ""
        yield Moment(prediction.completed_at, f"{prediction.status} {by}", prediction.status, code)
    if prediction.erased_at:
        yield Moment(prediction.erased_at, "erased", "canceled")


def _of_arrivals(arrivals: Sequence[Arrival]) -> Iterator[Moment]:
    for each in arrivals:
        yield Moment(each.received_at, f"{each.channel}: {each.verdict}", "", each.reason)
        if each.repeated_at:
            text = f"{each.channel}: the same again, {each.repeats} times by now"
            yield Moment(each.repeated_at, text, "")


def _of_attempts(deliveries: Sequence[Delivery]) -> Iterator[Moment]:
    for delivery in deliveries:
        for attempt in delivery.history:
            text = f"{delivery.handler}, attempt {attempt.number}: {attempt.result}"
            tone = _TONES.get(attempt.result, "failed")
            reason = attempt.reason.strip().partition("\n")[0][:200]
            yield Moment(datetime.fromisoformat(attempt.ended_at), text, tone, reason)
