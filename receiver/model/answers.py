"""Response bodies of /v1, except predictions and events, and the filter of bulk replays."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from receiver.model.recipes import OfferedButton
from receiver.model.retry import FailureKind
from receiver.model.values import EventType, Status, Value

T = TypeVar("T")

Moment = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""RFC 3339 in UTC."""


class Page(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A page of a list, newest first."""

    data: list[T]
    next_cursor: str | None
    """The `cursor` of the next page; None on the last page."""


DeliveryState: TypeAlias = Literal["pending", "running", "done", "skipped", "dead"]


class AttemptRecord(Value, frozen=True, kw_only=True):
    """One run of a handler for a delivery."""

    number: int
    """Counts every attempt at this delivery, replays included."""
    started_at: Moment
    ended_at: Moment
    result: FailureKind | Literal["done"]
    reason: str
    note: str
    """The handler's note about the attempt."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery as operators see it."""

    id: str
    event_id: str
    prediction_id: str
    model: str
    handler: str
    state: DeliveryState
    attempts: int
    """Attempts in this round."""
    round: int
    """How many times it was replayed."""
    replay_id: str | None
    """The bulk replay that redelivered it last; None if none did, or a single replay came later."""
    reason: str
    created_at: Moment
    due_at: Moment | None
    """When the next attempt is due."""
    ended_at: Moment | None
    history: list[AttemptRecord] = []


class HandlerState(msgspec.Struct, frozen=True, kw_only=True):
    """A handler as operators see it."""

    name: str
    state: Literal["running", "paused", "open", "probing"]
    """`open`: its deliveries wait after repeated failures; `probing`: the next one is a probe."""
    registered: bool
    """False if no such handler exists here any more, but it has pending deliveries or is held."""
    pending: int
    """Pending deliveries, up to 10,000."""
    paused_at: datetime | None
    open_until: datetime | None
    reason: str
    """The reason of the last failure, if it is `open` or `probing`."""


class ExplainedHandler(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one handler runs for an event, and its delivery."""

    handler: str
    runs: bool
    reason: str | None
    """Why it does not run."""
    after: tuple[str, ...]
    """The handlers it waits for."""
    held: Literal["paused", "open"] | None = None
    """Why its deliveries wait now: paused by hand, or open after repeated failures."""
    delivery: Delivery | None
    """The delivery of the event to it; None if there is none."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Which handlers run for an event, and why the others do not."""

    prediction: str
    type: EventType
    assumed: bool
    """True if `type` is an assumption: the prediction has not ended, or the request gave it."""
    handlers: list[ExplainedHandler]


class Redelivered(msgspec.Struct, frozen=True):
    """The result of replaying one event."""

    pending: int
    """Number of deliveries that are now pending."""
    handlers: tuple[str, ...]


Time: TypeAlias = Annotated[datetime, Meta(tz=True)]
_Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=300)]
_Glob: TypeAlias = Annotated[str, Meta(max_length=300)]


class Selection(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A filter of deliveries; a field that is not given matches all."""

    since: Time | None = None
    until: Time | None = None
    """The time of the event: at or after `since`, and before `until`."""
    provider: _Text | None = None
    model: _Text | None = None
    """A shell glob."""
    handler: _Text | None = None
    """Only this handler's deliveries; without `state`, also new ones for missed events."""
    state: Literal["done", "skipped", "dead"] | None = None
    """Only existing deliveries that ended in this state."""
    metadata: Annotated[dict[_Text, _Glob], Meta(min_length=1, max_length=20)] | None = None
    """Shell globs by the name of the metadata value."""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """One replay, as operators see it."""

    id: str
    state: Literal["counted", "running", "done", "canceled"]
    events: int
    matched: int
    """Deliveries to redeliver when it was counted; `events` counts their events."""
    replayed: int
    """Deliveries redelivered so far."""
    wanted: dict[str, Any]
    created_at: str
    ended_at: str | None


Kind: TypeAlias = Literal["duplicate", "late", "unknown", "rejected", "unmatched"]


class DiscardedItem(msgspec.Struct, frozen=True, kw_only=True):
    """An outcome, event or callback that reached no handler, as operators see it."""

    kind: Kind
    reason: str
    provider: str | None
    channel: str | None
    """None for rejected callbacks, and for ends that the receiver itself decided."""
    source: str | None
    """The address of the sender; only for rejected callbacks."""
    prediction_id: str | None
    event_id: str | None
    times: int
    first_at: str
    """For repeats: when the same bytes arrived for the first time."""
    last_at: str


class OfferedRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """A recipe, as shown to people and programs that may order."""

    name: str
    about: str
    provider: str
    model: str
    price: float | None
    """Dollars."""
    latest: float | None
    """Seconds after which an order that is not yet submitted fails as `expired`."""
    options: dict[str, Any]
    """A JSON Schema; `x-rest` marks the option that takes the remaining words of a command."""
    buttons: Mapping[str, OfferedButton]
    """Buttons by label."""


class CostRow(msgspec.Struct, frozen=True, kw_only=True):
    """The cost of a group of ended predictions."""

    of: dict[str, str | None]
    """The values of the group by the requested names; null if its predictions have no value."""
    amount: float
    """Dollars, for the predictions whose cost is known."""
    predictions: int
    unknown: int
    """How many of them have no known cost."""


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """Costs by group, from the UTC day `since` up to, but not including, `until`."""

    since: date
    until: date
    currency: Literal["USD"] = "USD"
    data: list[CostRow]
    total: CostRow
    """The sum of all groups."""


class Drained(msgspec.Struct, frozen=True):
    """The result of a drain: attempts ended, submits and polls begun."""

    deliveries: int
    submits: int
    polls: int
    more: bool
    """True if work is still due, or claimed by a process that may be gone."""
    next_due: float | None = None
    """Seconds until more work is due; None: no work becomes due by itself."""
    pending: int = 0
    """Deliveries that have not ended, due or not; at most 10,000 are counted per handler."""
    cut_short: int = 0
    """Attempts that were given back because time ran out; they do not count."""


class Health(msgspec.Struct, frozen=True):
    """The answer of a healthy server; any other answer is a problem."""

    status: Literal["ok"] = "ok"


class Readiness(Health, frozen=True):
    """The answer of a ready server, with the provider locks that do not make it unready."""

    locked: list[str] = []
    """Providers that have locked our account: their submits wait."""


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a prediction that is in a change."""

    id: str
    provider: str
    model: str
    status: Status
    metadata: dict[str, Any]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A change of status other than the end, as sent to readers of the stream."""

    type: str
    time: datetime
    prediction: Moved


class Attempted(msgspec.Struct, frozen=True, kw_only=True):
    """An ended attempt, and its delivery."""

    id: str
    handler: str
    state: DeliveryState
    """The state after the attempt: `pending` if it failed and is retried."""
    number: int
    """The number of the attempt, as in the delivery's history."""
    result: FailureKind | Literal["done"]
    reason: str
    due_at: datetime | None
    """When the next attempt is due, if there is one."""


class DeliveryChange(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an attempt at a delivery, as sent to readers who request such ends."""

    type: str
    """For example `delivery.done`."""
    time: datetime
    delivery: Attempted
    prediction: Moved


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Positions between which the change log was deleted or replaced: read the lists instead."""

    after: int
    until: int
