"""The result of an event, as a test reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from receiver.model.answers import Delivery, Explanation, Page
from receiver.model.values import Prediction

if TYPE_CHECKING:
    from receiver.testing.kit import Kit


@dataclass(frozen=True)
class Delivered:
    """The result of an event, read again at each access."""

    kit: Kit
    prediction_id: str

    @property
    def prediction(self) -> Prediction:
        return self.kit.get(f"/v1/predictions/{self.prediction_id}", Prediction)

    def __repr__(self) -> str:
        if not self.kit.answers:
            return f"<Delivered {self.prediction_id}>"
        prediction = self.prediction
        deliveries = [repr(delivery) for delivery in self.deliveries.values()]
        about = f"{prediction.provider} {prediction.model} {prediction.status}"
        return f"<Delivered {about}: {', '.join(deliveries) or self._why_none()}>"

    @property
    def deliveries(self) -> dict[str, Delivery]:
        """The event's deliveries, by handler."""
        path = f"/v1/deliveries?prediction={self.prediction_id}&limit=100"
        return {delivery.handler: delivery for delivery in self.kit.get(path, Page[_Delivery]).data}

    @property
    def delivery(self) -> Delivery:
        """The only delivery; ValueError, which gives the reason, unless there is exactly one."""
        __tracebackhide__ = True
        deliveries = [*self.deliveries.values()]
        if len(deliveries) == 1:
            return deliveries[0]
        several = ", ".join(repr(delivery) for delivery in deliveries)
        raise ValueError(f"several deliveries: {several}" if several else self._why_none())

    @property
    def children(self) -> list[Prediction]:
        """The predictions that its handlers submitted, oldest first."""
        found = self.kit.get("/v1/predictions?limit=100", Page[Prediction]).data
        return [child for child in reversed(found) if child.parent_id == self.prediction_id]

    def _why_none(self) -> str:
        """Return a text with the reason of every handler for not running."""
        path = f"/v1/predictions/{self.prediction_id}/explain"
        explained = self.kit.get(path, Explanation)
        whys = [f"{one.handler} ({one.reason or 'it runs'})" for one in explained.handlers]
        return f"no handler has had {explained.type}: {', '.join(whys) or 'there is none'}"


class _Delivery(Delivery, frozen=True, kw_only=True):
    """A delivery with a repr of one line."""

    def __repr__(self) -> str:
        attempts = f"{self.attempts} attempt{'s' if self.attempts != 1 else ''}"
        failures = [attempt.reason for attempt in self.history if attempt.reason]
        last = failures[-1] if failures else ""
        whys = dict.fromkeys(filter(None, (self.reason, last)))
        return f"<Delivery {self.handler} {self.state}, {': '.join([attempts, *whys])}>"
