"""Frozen values and the two pure decisions: where a prediction goes, what becomes of an attempt.

Times are `datetime` in UTC wherever a user sees them and unix seconds (float) inside.

    queued ──begin──▶ submitting ──accepted──▶ processing ──▶ succeeded | failed | canceled
      ▲                 │    │
      └───postponed─────┘    └──ambiguous──▶ unconfirmed ──accepted──▶ processing
                                                   └───────────────▶ succeeded | failed | canceled

Every living state may also go straight to a terminal one, and `queued` to `processing`: a callback
can outrun the answer to our own submit, or show that a refusal was none. Terminal states absorb.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from hashlib import blake2s
from typing import Any, Final, Literal

import msgspec

Channel = Literal["webhook", "sse", "poll", "sync"]
Mode = Literal["queue", "sync"]


class Status(StrEnum):
    """Where a prediction stands."""

    QUEUED = "queued"
    SUBMITTING = "submitting"
    PROCESSING = "processing"
    UNCONFIRMED = "unconfirmed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


class Cause(StrEnum):
    """Why a prediction moves."""

    BEGIN = "begin"  # there is room at the provider: the submit is about to be sent
    POSTPONED = "postponed"  # the provider took nothing (429, 5xx, refused connection)
    AMBIGUOUS = "ambiguous"  # bytes were sent and no answer came: money may be spent
    ACCEPTED = "accepted"  # the provider named its own id
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


TERMINAL: Final = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELED})
IN_FLIGHT: Final = frozenset({Status.SUBMITTING, Status.PROCESSING, Status.UNCONFIRMED})

_ENDS: Final = {
    Cause.SUCCEEDED: Status.SUCCEEDED,
    Cause.FAILED: Status.FAILED,
    Cause.CANCELED: Status.CANCELED,
}

ARROWS: Final[dict[Status, dict[Cause, Status]]] = {
    # Put back after a refusal that was none: whoever names the provider's id knows better.
    Status.QUEUED: {Cause.BEGIN: Status.SUBMITTING, Cause.ACCEPTED: Status.PROCESSING, **_ENDS},
    Status.SUBMITTING: {
        Cause.POSTPONED: Status.QUEUED,
        Cause.AMBIGUOUS: Status.UNCONFIRMED,
        Cause.ACCEPTED: Status.PROCESSING,
        **_ENDS,
    },
    Status.UNCONFIRMED: {Cause.ACCEPTED: Status.PROCESSING, **_ENDS},
    Status.PROCESSING: dict(_ENDS),
    Status.SUCCEEDED: {},
    Status.FAILED: {},
    Status.CANCELED: {},
}


def step(status: Status, cause: Cause) -> Status | None:
    """Follow one arrow; None where there is none, which every caller treats as nothing to do."""
    return ARROWS[status].get(cause)


def sources(cause: Cause) -> frozenset[Status]:
    """Name the states that `cause` may leave, for the WHERE of an UPDATE."""
    return frozenset(status for status, arrows in ARROWS.items() if cause in arrows)


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A frozen value whose fields read as attributes or, as in its JSON, by name."""

    def __getitem__(self, name: str) -> Any:
        if name in self.__struct_fields__:
            return getattr(self, name)
        raise KeyError(name)


class Stored(Value, frozen=True, omit_defaults=True, kw_only=True):
    """Where a result is kept for good, and what it was when it was put there."""

    url: str
    sha256: str
    """Hex digest of the content."""
    size: int
    """Bytes."""
    content_type: str
    flagged: str | None = None
    """Why the result may be none: `all_black` is a content filter's usual answer."""


class Output(Value, frozen=True, omit_defaults=True, kw_only=True):
    """One result: usually a file at a URL (possibly a data URI), sometimes only text."""

    url: str | None = None
    content_type: str | None = None
    file_name: str | None = None
    file_size: int | None = None
    """Bytes, as the provider says."""
    width: int | None = None
    height: int | None = None
    """Pixels, as the provider says."""
    duration: float | None = None
    """Seconds, as the provider says."""
    text: str | None = None
    """Set only where the provider answered words instead of a file."""
    stored: Stored | None = None
    """Set by a handler that keeps results, as `save` does."""

    @property
    def address(self) -> str:
        """Where people and programs elsewhere get it: as it is kept, or else as it was made.

        Empty for what is only here, or came inside a data URI.
        """
        kept = self.stored.url if self.stored else ""
        both = (kept, self.url or "")
        return next((url for url in both if url.startswith(("http://", "https://"))), "")


ErrorCode = Literal[
    "rejected", "provider_error", "content_policy", "timeout", "expired", "unconfirmed", "canceled"
]


class Error(Value, frozen=True, kw_only=True):
    """Why a prediction did not succeed; `message` is in the provider's own words if it has any."""

    code: ErrorCode
    message: str


class Prediction(Value, frozen=True, kw_only=True):
    """One submitted generation, as users see it in handlers and over HTTP."""

    id: str
    provider: str
    model: str
    status: Status
    mode: Mode
    input: dict[str, Any]
    metadata: dict[str, Any]
    provider_id: str | None = None
    """None until the provider has answered the submit, and for blocking calls that name none."""
    output: list[Output] | None = None
    error: Error | None = None
    channel: Channel | None = None
    """None before the end, and where the end is our own verdict (a deadline, a cancel in time)."""
    parent_id: str | None = None
    """The prediction whose handler submitted this one."""
    depth: int = 0
    """How many predictions led to this one: 0 where no handler submitted it."""
    created_at: datetime
    submitted_at: datetime | None = None
    completed_at: datetime | None = None
    erased_at: datetime | None = None
    """When its content was erased: what is left are its names, its status and its times."""

    @property
    def flagged(self) -> str:
        """Why a result of it may be none, as `save` found or its metadata say; empty: nothing."""
        stored = [output.stored for output in self.output or [] if output.stored]
        reasons = [*(kept.flagged for kept in stored), self.metadata.get("flagged")]
        return next((str(reason) for reason in reasons if reason), "")


class Ticket(Value, frozen=True, kw_only=True):
    """What an adapter needs to know of a prediction."""

    id: str
    model: str
    mode: Mode
    input: dict[str, Any]
    provider_id: str | None = None
    links: dict[str, str] = {}
    """URLs the provider named for this prediction, already checked."""
    submitted_at: float | None = None
    cancel_requested: bool = False


EventType = Literal["prediction.succeeded", "prediction.failed", "prediction.canceled"]


class Event(Value, frozen=True, kw_only=True):
    """The one terminal fact of a prediction."""

    id: str
    type: EventType
    time: datetime
    channel: Channel | None
    prediction: Prediction
    raw: Any = None
    """The provider's own payload, decoded, or its text where that is no JSON.

    None where the end is our own verdict, and for payloads of more than 4 MiB.
    """


class Announcement(Value, frozen=True, kw_only=True):
    """An event as the API tells it: without the provider's own payload."""

    id: str
    type: EventType
    time: datetime
    channel: Channel | None
    prediction: Prediction


OutcomeKind = Literal["processing", "succeeded", "failed", "canceled", "ask", "missing"]


class Outcome(Value, frozen=True, kw_only=True):
    """What an adapter reads out of a callback, a stream event or the answer to a poll."""

    kind: OutcomeKind
    """`ask`: the truth is at the provider, fetch it now. `missing`: it does not know the id."""
    provider_id: str | None = None
    """The provider's id as the payload names it; None where it names none."""
    also_known_as: str | None = None
    """A second id the provider may use for the same prediction (fal's gateway id)."""
    output: list[Output] = []
    error: Error | None = None

    @property
    def cause(self) -> Cause | None:
        """Name the arrow this outcome follows; None where it ends nothing."""
        return _CAUSES.get(self.kind)


_CAUSES: Final = {
    "succeeded": Cause.SUCCEEDED,
    "failed": Cause.FAILED,
    "canceled": Cause.CANCELED,
}

Verdict = Literal["accepted", "duplicate", "late", "noted", "ask", "mismatch", "unknown"]


def advance(
    status: Status, provider_id: str | None, outcome: Outcome
) -> tuple[Verdict, Status, str]:
    """Decide what one outcome does to a prediction: the verdict, the new status and the reason.

    Total: every status and outcome has an answer, and only `accepted` ends a prediction.
    """
    names = {outcome.provider_id, outcome.also_known_as} - {None}
    if provider_id is not None and names and provider_id not in names:
        return "mismatch", status, "another prediction's id"
    if status in TERMINAL:
        if outcome.cause is None or step(Status.PROCESSING, outcome.cause) is status:
            return "duplicate", status, f"already {status}"
        return "late", status, f"already {status}, then told {outcome.kind}"
    if outcome.cause is None:
        # Whoever names the provider's id proves that the submit was taken.
        taken = names and outcome.kind != "missing" and step(status, Cause.ACCEPTED)
        return ("ask" if outcome.kind == "ask" else "noted"), taken or status, outcome.kind
    return "accepted", ARROWS[status][outcome.cause], outcome.kind


class Policy(Value, frozen=True, kw_only=True):
    """How often and how fast a handler is tried again."""

    attempts: int = 10
    base: float = 2.0
    """Seconds before the second attempt, at most."""
    cap: float = 3600.0
    """Seconds between two attempts, at most."""


FailureKind = Literal["error", "timeout", "lost", "retry", "skip", "dead"]


class Failure(Value, frozen=True, kw_only=True):
    """How an attempt ended when it did not succeed."""

    kind: FailureKind
    """`lost`: the process that ran it is gone, so nobody knows what it did."""
    reason: str = ""
    after: float | None = None
    """Seconds the handler asked to wait; None leaves it to the policy."""


class Decision(Value, frozen=True, kw_only=True):
    """What becomes of a delivery after an attempt."""

    state: Literal["pending", "done", "skipped", "dead"]
    delay: float = 0.0
    """Seconds until the next attempt; only for `pending`."""
    reason: str = ""


LOSSES: Final = 3
"""A delivery is dead once this many attempts, and all its policy allows, were lost or spent."""
LONGEST_DELAY: Final = 7 * 86400.0
DONE: Final = Decision(state="done")


def backoff(attempt: int, base: float, cap: float, chance: float) -> float:
    """Exponential backoff with full jitter: seconds to wait after the 1-based `attempt`.

    `chance` is uniform in [0, 1). The result is never above `cap`, whatever the attempt.
    """
    return chance * min(cap, base * 2.0 ** min(attempt - 1, 64))


def decide(attempt: int, failure: Failure, policy: Policy, chance: float) -> Decision:
    """Decide what follows a failed attempt; total over every kind of failure."""
    match failure.kind:
        case "skip":
            return Decision(state="skipped", reason=failure.reason)
        case "dead":
            return Decision(state="dead", reason=failure.reason)
        case "lost":
            if attempt >= max(policy.attempts, LOSSES):
                return Decision(state="dead", reason=failure.reason)
            return Decision(state="pending", reason=failure.reason)
    if attempt >= policy.attempts:
        return Decision(state="dead", reason=failure.reason)
    if failure.after is None:
        delay = backoff(attempt, policy.base, policy.cap, chance)
    else:
        # In this order nan, which compares false with everything, ends as 0.
        delay = min(LONGEST_DELAY, max(0.0, failure.after))
    return Decision(state="pending", delay=delay, reason=failure.reason)


def new_id(prefix: str, now: float) -> str:
    """Make an unguessable id that sorts by time: 56 bits of microseconds, 72 bits of chance.

    Predictions wait in the order of their ids, so two must not be made in one unit of their time.
    """
    return oldest_id(prefix, now) + secrets.token_hex(9)


def oldest_id(prefix: str, now: float) -> str:
    """Give what sorts before every id that is made from then on, and after all made before."""
    return f"{prefix}_{max(int(now * 1_000_000), 0):014x}"


def event_id(prediction_id: str) -> str:
    """Name the event of a prediction: there is only ever one."""
    return f"evt_{prediction_id[5:]}"


@lru_cache(maxsize=1024)
def handler_digest(handler: str) -> str:
    """Shorten a handler's name for ids: 8 hex digits."""
    return blake2s(handler.encode(), digest_size=4).hexdigest()


def delivery_id(prediction_id: str, handler: str) -> str:
    """Name the delivery of a prediction's event to a handler: there is only ever one."""
    return f"dlv_{prediction_id[5:]}{handler_digest(handler)}"


def utc(seconds: float) -> datetime:
    """Turn unix seconds into the form users see."""
    return datetime.fromtimestamp(seconds, UTC)


def plain(value: Any) -> str:
    """Say a JSON value as it would be typed in a pattern: true, not True; null, not None."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
