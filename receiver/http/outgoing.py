"""What a receiver of ours gets: events as the built-in `forward` posts them, for the document.

That handler stands alone, as an example to copy; a test holds what it sends against these types.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from receiver.http.declare import Answer, Content, Endpoint
from receiver.http.routes.predictions import EXAMPLE
from receiver.model.values import Channel, EventType, Prediction


class EventData(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction that has ended. This alone is the body of a CloudEvent in binary mode."""

    event_id: str
    """There is one for each prediction, ever."""
    channel: Channel | None
    """How the outcome reached us; None where the end is our own verdict."""
    prediction: Prediction


class StandardWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """An event in the form of Standard Webhooks."""

    type: EventType
    timestamp: datetime
    data: EventData


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event as a CloudEvent 1.0 in structured mode."""

    specversion: Literal["1.0"]
    id: str
    """The same over retries: take an event once by it."""
    source: str
    """FORWARD_SOURCE, or our public URL."""
    type: EventType
    subject: str
    """The prediction's id."""
    time: datetime
    datacontenttype: Literal["application/json"]
    data: EventData


class OutgoingHeaders(msgspec.Struct, frozen=True, rename="kebab"):
    """What comes with an event."""

    webhook_id: str
    """The same over retries: take an event once by it."""
    webhook_timestamp: Annotated[str, Meta(pattern="^[0-9]+$")]
    """Unix seconds; refuse what is older than some minutes."""
    webhook_signature: str | None = None
    """`v1,…`: HMAC-SHA256 in base64 over id, timestamp and body, each followed by a dot but the
    last; one for each secret, separated by blanks. Missing only where FORWARD_SECRET is not set."""
    ce_specversion: Literal["1.0"] | None = None
    """This and the other `ce-` headers: the attributes of a CloudEvent in binary mode."""
    ce_id: str | None = None
    ce_source: str | None = None
    ce_type: EventType | None = None
    ce_subject: str | None = None
    ce_time: str | None = None


_DATA: Final = EventData(
    event_id=f"evt_{EXAMPLE.id[5:]}", channel=EXAMPLE.channel, prediction=EXAMPLE
)
_AT: Final = datetime.fromisoformat("2026-01-31T12:00:03.500000+00:00")
_EVENT: Final = CloudEvent(
    specversion="1.0",
    id=f"dlv_{EXAMPLE.id[5:]}5c1d0e2f",
    source="https://hooks.example.org",
    type="prediction.succeeded",
    subject=EXAMPLE.id,
    time=_AT,
    datacontenttype="application/json",
    data=_DATA,
)
WEBHOOKS: Final = tuple(
    Endpoint(
        "POST",
        kind,
        f"A prediction is {kind.partition('.')[2]}",
        (
            Answer(200, "taken; any other 2xx says so too"),
            Answer(410, "never send this again: the delivery ends dead"),
            Answer(503, "try again later, when Retry-After says so; any other answer does too"),
        ),
        detail="Sent by the built-in handler `forward` to FORWARD_URL, in the form that "
        "FORWARD_FORMAT names, at least once, in no certain order.",
        headers=OutgoingHeaders,
        body=(
            Content(StandardWebhook, StandardWebhook(type=_EVENT.type, timestamp=_AT, data=_DATA)),
            Content(EventData, _DATA),
            Content(CloudEvent, _EVENT, "application/cloudevents+json"),
        ),
        is_open=True,
    )
    for kind in get_args(EventType)
)
