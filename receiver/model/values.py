"""Frozen values: predictions, outputs, errors, events, and the outcomes that adapters read.

Times are `datetime` in UTC wherever a user sees them and unix seconds (float) inside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final, Literal, overload
from urllib.parse import quote

import msgspec

Channel = Literal["webhook", "sse", "poll", "sync"]
MODEL_NAME: Final = r"^[!-\-0-~][!-.0-~]*(/[!-\-0-~][!-.0-~]*)*$"
"""Segments of visible ASCII, none of which is empty or begins with a dot."""
DEEPEST: Final = 64
"""The greatest nesting depth of input and metadata."""
LARGEST_METADATA: Final = 256 * 1024
"""Bytes of JSON."""
Mode = Literal["queue", "sync"]
CostSource = Literal["provider", "computed", "recipe"]
"""The source of a price or a cost."""


class Status(StrEnum):
    """The status of a prediction."""

    QUEUED = "queued"
    SUBMITTING = "submitting"
    PROCESSING = "processing"
    UNCONFIRMED = "unconfirmed"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A frozen value whose fields read as attributes or, as in its JSON, by name."""

    def __getitem__(self, name: str) -> Any:
        if name in self.__struct_fields__:
            return getattr(self, name)
        raise KeyError(name)


class Stored(Value, frozen=True, omit_defaults=True, kw_only=True):
    """The stored copy of a result: its URL, and its content when it was stored."""

    url: str
    sha256: str
    """Hex digest of the content."""
    size: int
    """Bytes."""
    content_type: str
    flagged: str | None = None
    """Why the result may be useless: `all_black` is the usual result of a content filter."""


class Output(Value, frozen=True, omit_defaults=True, kw_only=True):
    """One result: usually a file at a URL (possibly a data URI), sometimes only text."""

    url: str | None = None
    content_type: str | None = None
    file_name: str | None = None
    file_size: int | None = None
    """Bytes, as reported by the provider."""
    width: int | None = None
    height: int | None = None
    """Pixels, as reported by the provider."""
    duration: float | None = None
    """Seconds, as reported by the provider."""
    text: str | None = None
    """Set only if the provider returned text instead of a file."""
    stored: Stored | None = None
    """Set by a handler that stores results, such as `save`."""

    @property
    def address(self) -> str:
        """The public URL of the result: of the stored copy, or else the provider's.

        Empty if there is no HTTP URL, as for a local file or a data URI.
        """
        kept = self.stored.url if self.stored else ""
        both = (kept, self.url or "")
        return next((url for url in both if url.startswith(("http://", "https://"))), "")

    def link(self, longest: int) -> str:
        """Return `address` with every character percent-encoded that is unusual in a URL.

        Empty if there is no address, or if it is longer than `longest` characters.
        """
        linked = quote(self.address, safe=":/?#[]@!$&'()*+,;=%~")
        return linked if len(linked) <= longest else ""


ErrorCode = Literal[
    "rejected", "provider_error", "content_policy", "timeout", "expired", "unconfirmed", "canceled"
]


class Error(Value, frozen=True, kw_only=True):
    """Why a prediction did not succeed; `message` is in the provider's own words if it has any."""

    code: ErrorCode
    message: str


def expired(what: str, last: str, code: ErrorCode = "expired") -> Error:
    """Return the error of a passed deadline, with the last reason for the delay."""
    return Error(code=code, message=f"{what}; last: {last}"[:2000] if last else what)


class Order(Value, frozen=True, kw_only=True):
    """The order of a prediction: its recipe, the person, the place, and the way it came in."""

    recipe: str
    person: str | None
    place: str | None
    via: str


class Cost(Value, frozen=True, kw_only=True):
    """The cost of a prediction, as far as it is known: the provider may report it later."""

    amount: float
    currency: Literal["USD"] = "USD"
    source: CostSource
    """`provider`: reported by it; `computed`: from prices; `recipe`: the price of the recipe."""


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
    """None until the provider has answered the submit, and for blocking calls without an id."""
    output: list[Output] | None = None
    error: Error | None = None
    channel: Channel | None = None
    """None before the end, and if the receiver itself decided it (a deadline, an early cancel)."""
    parent_id: str | None = None
    """The prediction whose handler submitted this one."""
    depth: int = 0
    """How many predictions led to this one: 0 if no handler submitted it."""
    created_at: datetime
    submitted_at: datetime | None = None
    completed_at: datetime | None = None
    erased_at: datetime | None = None
    """When its content was erased: only its names, its status and its times remain."""
    reply_to: str | None = None
    """A URL to which the event is also sent, as given in the submit."""
    order: Order | None = None
    """None if it was not ordered by a recipe, or was erased."""
    cost: Cost | None = None
    """None while it is unknown, usually until the end."""

    @property
    def flagged(self) -> str:
        """Why a result may be useless, from `save` or the metadata; empty: no reason."""
        stored = [output.stored for output in self.output or [] if output.stored]
        reasons = [*(kept.flagged for kept in stored), self.metadata.get("flagged")]
        return next((str(reason) for reason in reasons if reason), "")

    def warning(self, clean: Callable[[str], str] = str) -> str:
        """Return a line like `(flagged: all black)` for the top of a message, or nothing.

        `clean` is applied to the reason, which may come from outside.
        """
        reason = self.flagged[:100].replace("_", " ")
        return f"(flagged: {clean(reason)})\n" if reason else ""

    def named(self, key: str, pattern: str) -> str:
        """Return the metadata value of `key` if all of it matches `pattern` (ASCII).

        Empty otherwise: metadata may hold anything.
        """
        found = re.fullmatch(pattern, str(self.metadata.get(key)), re.ASCII)
        return found[0] if found else ""


class Ticket(Value, frozen=True, kw_only=True):
    """The part of a prediction that an adapter needs."""

    id: str
    model: str
    mode: Mode
    input: dict[str, Any]
    provider_id: str | None = None
    links: dict[str, str] = {}
    """URLs that the provider returned for this prediction, already checked."""
    submitted_at: float | None = None
    cancel_requested: bool = False


EventType = Literal["prediction.succeeded", "prediction.failed", "prediction.canceled"]


class Announcement(Value, frozen=True, kw_only=True):
    """An event as the API shows it: without the provider's own payload."""

    id: str
    type: EventType
    time: datetime
    channel: Channel | None
    prediction: Prediction


class Event(Announcement, frozen=True, kw_only=True):
    """The end of a prediction, as handlers see it; each prediction has one event."""

    raw: Any = None
    """The provider's own payload, decoded, or its text if it is not JSON.

    None if the receiver itself decided the end, and for payloads of more than 4 MiB.
    """


OutcomeKind = Literal["processing", "succeeded", "failed", "canceled", "ask", "missing"]


class Outcome(Value, frozen=True, kw_only=True):
    """The content of a callback, a stream event or the answer to a poll, as an adapter reads it."""

    kind: OutcomeKind
    """`ask`: not conclusive, so poll now. `missing`: the provider does not know the id."""
    provider_id: str | None = None
    """The provider's id in the payload; None if there is none."""
    also_known_as: str | None = None
    """A second id the provider may use for the same prediction (fal's gateway id)."""
    output: list[Output] = []
    error: Error | None = None
    cost: int | None = None
    """Microdollars; None if the payload has no cost."""
    units: float | None = None
    """Billable units, if the answer reports these instead of a cost."""


@overload
def utc(seconds: float) -> datetime: ...
@overload
def utc(seconds: float | None) -> datetime | None: ...
def utc(seconds: float | None) -> datetime | None:
    """Return unix seconds in the form that users see."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def plain(value: Any) -> str:
    """Return a JSON value as it is typed in a pattern: true, not True; null, not None."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


class Shift(Value, frozen=True, kw_only=True):
    """A step of the wall clock: the seconds by which stored times move with it."""

    due: float
    """For due times, and times of counted requests."""
    deadline: float
    """For deadlines and leases of claims: time in which the computer was suspended is added."""


class Recipients(msgspec.Struct, frozen=True):
    """The handlers that an event goes to."""

    handlers: tuple[str, ...] = ()
    after: Mapping[str, tuple[str, ...]] = {}
    """Handlers that wait, with the handlers that each of them waits for."""
