"""The frozen values that cross the store's seam, both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from receiver.model.retry import Decision, FailureKind
from receiver.model.states import Verdict
from receiver.model.values import (
    Channel,
    Event,
    EventType,
    Mode,
    Outcome,
    Status,
    Stored,
    Ticket,
    Value,
)

T = TypeVar("T")
Moment = Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})]
"""RFC 3339 in UTC."""


class NewPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """A row to be made, in state `queued`."""

    id: str
    provider: str
    model: str
    mode: Mode
    input: dict[str, Any]
    metadata: dict[str, Any]
    parent_id: str | None = None
    idempotency_key: str | None = None
    fingerprint: str | None = None
    """A digest of the request's meaning, to tell a repeat from another request with its key."""
    created_at: float
    trace: str | None = None
    """The W3C traceparent of the span that submits it, where there is one."""


class CreateResult(msgspec.Struct, frozen=True):
    """What `create` did: `fingerprint` is that of the row which now holds the key."""

    prediction_id: str
    is_new: bool
    fingerprint: str | None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A living prediction as outbound works on it."""

    ticket: Ticket
    provider: str
    status: Status
    submits: int
    """How often a submit was begun, this one included."""
    polls: int
    created_at: float
    deadline_at: float | None
    """None while it only waits for room at the provider."""


class SubmitBudget(msgspec.Struct, frozen=True, kw_only=True):
    """How many queued predictions of one provider may be submitted now."""

    provider: str
    now: float
    most: int
    max_in_flight: int | None
    per_minute: int | None
    hold_until: float
    """When somebody must look again if this process dies over the submit."""
    hold_sync_until: float
    """The same for a blocking call, which may take minutes."""
    timeout: float
    """Seconds from the first submit to the deadline."""


class SubmitBatch(msgspec.Struct, frozen=True):
    """Submits that may be sent now, and the seconds until the provider's minute has more room."""

    jobs: list[Job]
    wait: float


class RequestPermit(msgspec.Struct, frozen=True, kw_only=True):
    """A wish to send one request to a provider that counts them by the minute."""

    provider: str
    now: float
    per_minute: int


class LeaseRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A wish to be the one process that does something for all, or to remain it."""

    name: str
    owner: str
    now: float
    until: float


class CurrentState(msgspec.Struct, frozen=True, array_like=True):
    """What a ruling needs to know of a prediction; read inside the transaction."""

    id: str
    provider: str
    model: str
    status: Status
    provider_id: str | None
    metadata: str
    """JSON text: decoded only if some handler matches on it."""
    erased: bool = False
    """Nothing that anybody says of it is kept any more."""
    submitted_at: float | None = None


class Recipients(msgspec.Struct, frozen=True):
    """To whom an event is owed."""

    handlers: tuple[str, ...] = ()
    after: Mapping[str, tuple[str, ...]] = {}
    """Of these handlers, those that wait, and for which others of them."""


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """What an arrival does, decided by a pure function inside the transaction."""

    verdict: Verdict
    status: Status
    reason: str
    event_type: EventType | None = None
    """Set if, and only if, the verdict is `accepted`."""
    owed: Recipients = Recipients()


class IncomingOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """One outcome on its way in, from any channel, with its evidence."""

    prediction_id: str
    provider: str
    channel: Channel | None
    outcome: Outcome
    at: float
    judge: Callable[[CurrentState, IncomingOutcome], Transition]
    headers: str = "[]"
    """JSON of the callback's headers, without secrets."""
    body: bytes = b""
    proved_id: str | None = None
    """The provider's id that the proof covers, where it covers one."""
    only_from: frozenset[Status] | None = None
    """Apply only if the prediction still stands there (our own verdicts)."""


class AcceptResult(msgspec.Struct, frozen=True):
    """What became of an arrival, after the commit."""

    verdict: Verdict
    status: Status | None
    reason: str
    event_id: str | None = None
    handlers: tuple[str, ...] = ()
    model: str | None = None
    provider_id: str | None = None
    """Of the prediction, if there is one."""
    seconds: float | None = None
    """From the submit to this outcome, if it was accepted and there was a submit."""


ProgressCause = Literal["accepted", "postponed", "ambiguous", "looked"]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A step of a living prediction that is no outcome: accepted, postponed, looked at."""

    id: str
    cause: ProgressCause
    due_at: float
    provider_id: str | None = None
    links: dict[str, str] = {}


class ClaimRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A lane's wish for work."""

    handler: str
    owner: str
    most: int
    now: float
    lease_until: float


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One claimed delivery, with all that its handler needs."""

    id: str
    handler: str
    attempt: int
    """1-based, of this round."""
    round: int
    """How often the delivery was replayed."""
    number: int
    """Counts every claim of this delivery, ever; settles of older claims change nothing."""
    event: Event


class Claims(msgspec.Struct, frozen=True):
    """Claimed work, and when the next of this handler falls due (None: nothing waits)."""

    claims: list[Claim]
    next_due: float | None


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """The end of one attempt."""

    id: str
    owner: str
    number: int
    decision: Decision
    result: str
    """The word for the attempt itself: `done`, or a Failure's kind."""
    note: str = ""
    """What the handler wanted kept of the attempt."""
    started_at: float
    ended_at: float


class LostAttempt(msgspec.Struct, frozen=True):
    """An attempt whose process is gone: its claim was taken back, its delivery is owed again."""

    delivery: str
    handler: str
    prediction_id: str
    provider: str
    provider_id: str | None
    channel: str | None
    attempt: int
    reason: str
    seconds: float
    """From its claim to its being taken back."""


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
    handler: str
    state: Literal["pending", "running", "done", "skipped", "dead"]
    attempts: int
    """Of this round."""
    round: int
    """How often it was replayed."""
    replay_id: str | None
    """The replay in bulk that owed it last; None: none did, or a replay of one."""
    reason: str
    created_at: Moment
    due_at: Moment | None
    """When it falls due."""
    ended_at: Moment | None
    history: list[AttemptRecord] = []


class Page(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A page of a list, newest first."""

    data: list[T]
    next_cursor: str | None
    """Give it as `cursor` for the next page; None: this was the last."""


class Annotation(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler adds to a prediction that has ended."""

    prediction_id: str
    stored: Mapping[int, Stored] = {}
    """Where outputs are kept, by their place."""
    metadata: Mapping[str, Any] = {}


class ReplayResult(msgspec.Struct, frozen=True):
    """How many deliveries of an event are owed again; None: there is no event yet."""

    owed: int | None
    handlers: tuple[str, ...] = ()
    erased: bool = False
    """There is nothing left of the event to hand to a handler."""


class PredictionFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which predictions to list."""

    status: str | None = None
    provider: str | None = None
    limit: int = 50
    cursor: str | None = None
