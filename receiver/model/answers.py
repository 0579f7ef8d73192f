"""Response bodies of /v1, beside predictions and events; and the filters of bulk requests."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from receiver.model.retry import FailureKind
from receiver.model.values import EventType, Status, Value

T = TypeVar("T")

Moment = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""RFC 3339 in UTC."""


class Page(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A page of a list, newest first."""

    data: list[T]
    next_cursor: str | None
    """Give it as `cursor` for the next page; None: this was the last."""


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
    """What the handler wanted kept of the attempt."""


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery as operators see it."""

    id: str
    event_id: str
    prediction_id: str
    model: str
    handler: str
    state: DeliveryState
    attempts: int
    """Of this round."""
    round: int
    """How often it was replayed."""
    replay_id: str | None
    """The bulk replay that redelivered it last; None: none did, or a replay of one."""
    reason: str
    created_at: Moment
    due_at: Moment | None
    """When it falls due."""
    ended_at: Moment | None
    history: list[AttemptRecord] = []


class HandlerState(msgspec.Struct, frozen=True, kw_only=True):
    """A handler as operators see it."""

    name: str
    state: Literal["running", "paused", "open", "probing"]
    """`open`: its deliveries wait after a run of failures; `probing`: the next one is a probe."""
    registered: bool
    """False: it is no handler here any more, but has deliveries or is paused."""
    pending: int
    """Pending deliveries, up to 10,000."""
    paused_at: datetime | None
    open_until: datetime | None
    reason: str
    """Of the last failure, where it is `open` or `probing`."""


class ExplainedHandler(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of an event at one handler."""

    handler: str
    runs: bool
    reason: str | None
    """Why it does not run."""
    after: tuple[str, ...]
    """The handlers it waits for."""
    held: Literal["paused", "open"] | None = None
    """Why its deliveries wait now: by hand, or after a run of failures."""
    delivery: Delivery | None
    """What came of it, where the event goes to it."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Which handlers run for an event, and why the others do not."""

    prediction: str
    type: EventType
    assumed: bool
    """The prediction has not ended so: this is what would be."""
    handlers: list[ExplainedHandler]


class Redelivered(msgspec.Struct, frozen=True):
    """What a replay redelivers."""

    pending: int
    """How many deliveries."""
    handlers: tuple[str, ...]


Time: TypeAlias = Annotated[datetime, Meta(tz=True)]
_Text: TypeAlias = Annotated[str, Meta(min_length=1, max_length=300)]
_Glob: TypeAlias = Annotated[str, Meta(max_length=300)]


class Selection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which deliveries are wanted; what is not given does not matter."""

    since: Time | None = None
    until: Time | None = None
    """The time of the event, from the first up to before the second."""
    provider: _Text | None = None
    model: _Text | None = None
    """A shell glob."""
    handler: _Text | None = None
    """Only its deliveries; without a state also those of events it has never had."""
    state: Literal["done", "skipped", "dead"] | None = None
    """Only deliveries that there are, and that ended so."""
    metadata: Annotated[dict[_Text, _Glob], Meta(min_length=1, max_length=20)] | None = None
    """Shell globs, by the name of the value."""


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """One replay, as operators see it."""

    id: str
    state: Literal["counted", "running", "done", "canceled"]
    events: int
    matched: int
    """Deliveries that would have been redelivered when it was counted, and their events."""
    replayed: int
    """Deliveries that it has redelivered so far."""
    wanted: dict[str, Any]
    created_at: str
    ended_at: str | None


Kind: TypeAlias = Literal["duplicate", "late", "unknown", "rejected", "unmatched"]


class DiscardedItem(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was delivered to nobody, as operators see it."""

    kind: Kind
    reason: str
    provider: str | None
    channel: str | None
    """None for rejected callbacks, and for ends by our own verdict."""
    source: str | None
    """Only of rejected callbacks: the address they came from."""
    prediction_id: str | None
    event_id: str | None
    times: int
    first_at: str
    """Of repeats: when those bytes came for the first time."""
    last_at: str


class OfferedButton(msgspec.Struct, frozen=True, kw_only=True):
    """What may be ordered of a result: the same options, as far as that recipe has them."""

    recipe: str
    result: str | None = None
    """The option that gets the first picture of the result."""


class OfferedRecipe(msgspec.Struct, frozen=True, kw_only=True):
    """A recipe as those see it who order."""

    name: str
    about: str
    provider: str
    model: str
    price: float | None
    """Dollars."""
    latest: float | None
    """Seconds after which an order that was not sent fails as `expired`."""
    options: dict[str, Any]
    """A JSON Schema; `x-rest` marks what takes the remaining words of a command."""
    buttons: dict[str, OfferedButton]
    """By their labels."""


class CostRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a group of predictions cost that have ended."""

    of: dict[str, str | None]
    """The group, by the names that were asked for; null where predictions say nothing of it."""
    amount: float
    """Dollars, of those whose cost is known."""
    predictions: int
    unknown: int
    """How many of them have no figure."""


class CostReport(msgspec.Struct, frozen=True, kw_only=True):
    """Costs by group, from one day of UTC up to before another."""

    since: date
    until: date
    currency: Literal["USD"] = "USD"
    data: list[CostRow]
    total: CostRow
    """Of all groups."""


class Drained(msgspec.Struct, frozen=True):
    """What a drain has done: attempts ended, submits and looks at providers begun."""

    deliveries: int
    submits: int
    polls: int
    more: bool
    """Something is due that was not done, or is claimed by a process that may be gone."""
    next_due: float | None = None
    """Seconds until the next thing falls due; none: nothing will by itself."""
    pending: int = 0
    """Deliveries that have not ended, due or not; a handler's count ends at 10,000."""
    cut_short: int = 0
    """Attempts that were given back as the time was over; they do not count."""


class Health(msgspec.Struct, frozen=True):
    """A good answer; any other is a problem."""

    status: Literal["ok"] = "ok"


class Readiness(Health, frozen=True):
    """A good answer, and what is no reason for a bad one."""

    locked: list[str] = []
    """Providers that have locked our account: their submits wait."""


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """What a change says of its prediction."""

    id: str
    provider: str
    model: str
    status: Status
    metadata: dict[str, Any]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A change of status that is not the end, as readers are told of it."""

    type: str
    time: datetime
    prediction: Moved


class Attempted(msgspec.Struct, frozen=True, kw_only=True):
    """What the end of an attempt says of its delivery."""

    id: str
    handler: str
    state: DeliveryState
    """As the attempt left it: `pending` after one that failed and is retried."""
    number: int
    """Of the attempt, as in the delivery's history."""
    result: FailureKind | Literal["done"]
    reason: str
    due_at: datetime | None
    """When it is tried again, where that is still to come."""


class DeliveryChange(msgspec.Struct, frozen=True, kw_only=True):
    """The end of an attempt at a delivery, as readers who want those are told of it."""

    type: str
    """As in `delivery.done`."""
    time: datetime
    delivery: Attempted
    prediction: Moved


class Gap(msgspec.Struct, frozen=True, kw_only=True):
    """Between these places the change log is not there any more, or is another: ask the lists."""

    after: int
    until: int
