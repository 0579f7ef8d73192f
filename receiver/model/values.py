"""Frozen values: predictions, outputs, errors, events, and what adapters read.

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
"""How deep an input and metadata nest."""
LARGEST_METADATA: Final = 256 * 1024
"""Bytes of JSON."""
Mode = Literal["queue", "sync"]
CostSource = Literal["provider", "computed", "recipe"]
"""Who says what something costs."""


class Status(StrEnum):
    """Where a prediction stands."""

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

    def link(self, longest: int) -> str:
        """Return `address` with all escaped that a text could read otherwise.

        Empty where there is none, or none of at most `longest` characters.
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
    """Build the error of a deadline, with the last reason why nothing came sooner."""
    return Error(code=code, message=f"{what}; last: {last}"[:2000] if last else what)


class Order(Value, frozen=True, kw_only=True):
    """Which recipe a prediction was ordered by, by whom, where, and how it came in."""

    recipe: str
    person: str | None
    place: str | None
    via: str


class Cost(Value, frozen=True, kw_only=True):
    """What a prediction cost, as far as it is known: a provider's figure may come later."""

    amount: float
    currency: Literal["USD"] = "USD"
    source: CostSource
    """`provider`: it said so; `computed`: by the table of prices; `recipe`: its price."""


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
    reply_to: str | None = None
    """Where its submit wants the event sent."""
    order: Order | None = None
    """None where it was not ordered by a recipe, and when it was erased."""
    cost: Cost | None = None
    """None while nobody knows it, and mostly before the end."""

    @property
    def flagged(self) -> str:
        """Why a result may be useless, as `save` found or the metadata say; empty: no reason."""
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
        """Return the value that the metadata has as `key` if all of it matches `pattern` (ASCII).

        Empty otherwise: metadata may hold anything.
        """
        found = re.fullmatch(pattern, str(self.metadata.get(key)), re.ASCII)
        return found[0] if found else ""


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


class Announcement(Value, frozen=True, kw_only=True):
    """An event as the API shows it: without the provider's own payload."""

    id: str
    type: EventType
    time: datetime
    channel: Channel | None
    prediction: Prediction


class Event(Announcement, frozen=True, kw_only=True):
    """The one terminal fact of a prediction, as handlers see it."""

    raw: Any = None
    """The provider's own payload, decoded, or its text where that is no JSON.

    None where the end is our own verdict, and for payloads of more than 4 MiB.
    """


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
    cost: int | None = None
    """Millionths of a US dollar, where the payload says what it cost."""
    units: float | None = None
    """What the provider counts of it, where the answer says so and not what that costs."""


@overload
def utc(seconds: float) -> datetime: ...
@overload
def utc(seconds: float | None) -> datetime | None: ...
def utc(seconds: float | None) -> datetime | None:
    """Turn unix seconds into the form users see."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def plain(value: Any) -> str:
    """Return a JSON value as it is typed in a pattern: true, not True; null, not None."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


class Shift(Value, frozen=True, kw_only=True):
    """A step of the wall clock: seconds by which what is stored for later moves with it."""

    due: float
    """What is to be done then, and what was counted."""
    deadline: float
    """What ends then: time in which the computer was suspended does not count for it."""


class Recipients(msgspec.Struct, frozen=True):
    """The handlers that an event goes to."""

    handlers: tuple[str, ...] = ()
    after: Mapping[str, tuple[str, ...]] = {}
    """Of these handlers, those that wait, and for which others of them."""
