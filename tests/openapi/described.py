"""Parts of the document that no route declares: examples, the callback, and what `forward` sends.

The handler `forward` does not use these types, as it is an example to copy; a test compares what it
sends with them. The docstrings of these types become descriptions in the document.
"""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta

from receiver.http.declare import ProviderName
from receiver.http.live import frame
from receiver.http.routes.costs import CostRoutes
from receiver.http.routes.deliveries import DeliveryRoutes
from receiver.http.routes.discarded import DiscardedRoutes
from receiver.http.routes.docs import DocsRoutes
from receiver.http.routes.drain import DrainRoutes
from receiver.http.routes.echo import EchoRoutes
from receiver.http.routes.events import MEDIA_TYPE, EventRoutes
from receiver.http.routes.handlers import HandlerRoutes
from receiver.http.routes.health import AliveRoutes, ReadyRoutes
from receiver.http.routes.metrics import MetricsPage
from receiver.http.routes.predictions import PredictionRoutes, Submission
from receiver.http.routes.recipes import OrderBody, RecipeRoutes
from receiver.http.routes.replays import ReplayRoutes
from receiver.http.webhooks import Receipt
from receiver.model.answers import (
    AttemptRecord,
    Change,
    CostReport,
    CostRow,
    Delivery,
    DiscardedItem,
    Drained,
    ExplainedHandler,
    Explanation,
    HandlerState,
    Health,
    Moved,
    OfferedRecipe,
    Readiness,
    Redelivered,
    Replay,
    Selection,
)
from receiver.model.recipes import OfferedButton, Option, Recipe
from receiver.model.values import Channel, Cost, EventType, Output, Prediction, Status, utc
from receiver.predictions.recipes import offered
from receiver.providers import NAMES
from tests.openapi.document import Answer, Content, Row

# --- examples, by type ---

_SUBMITTED: Final = Prediction(
    id="pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
    provider="fal",
    model="fal-ai/nano-banana",
    status=Status.PROCESSING,
    mode="queue",
    input={"prompt": "a lighthouse"},
    metadata={"channel": "#art"},
    provider_id="3f6cbd1e-7a92-4a52-9d9b-1c1f7a8e2b90",
    created_at=datetime(2026, 1, 31, 12, tzinfo=UTC),
    submitted_at=datetime(2026, 1, 31, 12, 0, 0, 200000, UTC),
)
_ENDED: Final = msgspec.structs.replace(
    _SUBMITTED,
    status=Status.SUCCEEDED,
    output=[Output(url="https://v3.fal.media/files/a.png", content_type="image/png")],
    channel="webhook",
    cost=Cost(amount=0.039, source="provider"),
    completed_at=datetime(2026, 1, 31, 12, 0, 3, 500000, UTC),
)
_DELIVERY: Final = Delivery(
    id="dlv_0199f3a6d2c1e45b7f1c9d3e8a260f4b5c1d0e2f",
    event_id="evt_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
    prediction_id="pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
    model="fal-ai/nano-banana",
    handler="forward",
    state="dead",
    attempts=1,
    round=0,
    replay_id=None,
    reason="HTTP 410: gone",
    created_at="2026-01-31T12:00:03.600000Z",
    due_at=None,
    ended_at="2026-01-31T12:00:03.900000Z",
    history=[
        AttemptRecord(
            number=1,
            started_at="2026-01-31T12:00:03.610000Z",
            ended_at="2026-01-31T12:00:03.900000Z",
            result="dead",
            reason="HTTP 410: gone",
            note="",
        )
    ],
)
_HANDLER: Final = HandlerState(
    name="save",
    state="paused",
    registered=True,
    pending=12,
    paused_at=utc(1769860800),
    open_until=None,
    reason="",
)
_REPLAY: Final = Replay(
    id="rep_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
    state="counted",
    events=1200,
    matched=1200,
    replayed=0,
    wanted={"handler": "save", "state": "dead"},
    created_at="2026-01-31T12:00:00.000000Z",
    ended_at=None,
)
_SELECTION_FITS: Final = {
    "properties": {"provider": {"enum": [*NAMES, None]}},
    "anyOf": [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
        for name in Selection.__struct_fields__
    ],
}
_DISCARDED: Final = DiscardedItem(
    kind="rejected",
    reason="bad_signature",
    provider="fal",
    channel=None,
    source="203.0.113.9",
    prediction_id=None,
    event_id=None,
    times=17,
    first_at="2026-01-31T12:00:00.000000Z",
    last_at="2026-01-31T12:20:00.000000Z",
)
_RECIPE: Final = offered(
    Recipe(
        name="imagine",
        about="A picture from words",
        provider="fal",
        model="fal-ai/nano-banana",
        price=40_000,
        latest=600,
        options={
            "prompt": Option(about="What to draw", required=True, longest=2000, rest=True),
            "ratio": Option(choices=("1:1", "16:9"), default="1:1"),
        },
        buttons={"Again": OfferedButton(recipe="imagine")},
    )
)
_CHANGE: Final = Change(
    type="prediction.processing",
    time=utc(1769860800),
    prediction=Moved(
        id="pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b",
        provider="fal",
        model="fal-ai/nano-banana",
        status=Status.PROCESSING,
        metadata={"channel": "#art"},
    ),
)


EXAMPLES: Final[dict[Any, Any]] = {
    (Prediction, 202): _SUBMITTED,
    Prediction: _ENDED,
    Submission: Submission(
        provider="fal",
        model="fal-ai/nano-banana",
        input={"prompt": "a lighthouse"},
        metadata={"channel": "#art"},
    ),
    OfferedRecipe: _RECIPE,
    OrderBody: OrderBody(
        options={"prompt": "a lighthouse", "ratio": "16:9"},
        person="slack:T01/U01",
        place="slack:T01/C01",
    ),
    Redelivered: Redelivered(2, ("save", "slack")),
    Explanation: Explanation(
        prediction=_ENDED.id,
        type="prediction.succeeded",
        assumed=True,
        handlers=[
            ExplainedHandler(
                handler="slack", runs=True, reason=None, after=("save",), delivery=None
            )
        ],
    ),
    Delivery: _DELIVERY,
    (Delivery, 202): msgspec.structs.replace(_DELIVERY, state="pending", attempts=0),
    Drained: Drained(deliveries=3, submits=1, polls=2, more=False),
    HandlerState: _HANDLER,
    Replay: _REPLAY,
    Selection: Selection(handler="save", state="dead"),
    DiscardedItem: _DISCARDED,
    CostReport: CostReport(
        since=date(2026, 1, 1),
        until=date(2026, 2, 1),
        data=[CostRow(of={"day": "2026-01-31"}, amount=4.68, predictions=120, unknown=3)],
        total=CostRow(of={}, amount=4.68, predictions=120, unknown=3),
    ),
    Health: Health(),
    Readiness: Readiness(locked=[]),
    MEDIA_TYPE: frame(_CHANGE.type, 1207, _CHANGE).decode(),
}
"""Examples by type, by type and status, or by media type."""
ALSO_FITS: Final = {Selection: _SELECTION_FITS}
"""JSON Schema that a body must satisfy in addition to its type."""

GROUPS: Final[dict[str, tuple[type, ...]]] = {
    "Predictions": (PredictionRoutes,),
    "Recipes": (RecipeRoutes,),
    "Deliveries": (DeliveryRoutes, DrainRoutes),
    "Events": (EventRoutes,),
    "Handlers": (HandlerRoutes,),
    "Replays": (ReplayRoutes,),
    "Discarded": (DiscardedRoutes,),
    "Costs": (CostRoutes,),
    "Callbacks": (EchoRoutes,),
    "Plugins": (),
    "Health": (AliveRoutes, ReadyRoutes, MetricsPage),
    "About": (DocsRoutes,),
}
"""The groups of the document; a test checks that no route of the app is missing."""

# --- callbacks ---


class Proofs(msgspec.Struct, frozen=True, rename="kebab"):
    """The headers by which providers prove a callback, in addition to the token."""

    x_webhook_secret: str | None = None
    """Eachlabs: the secret that was sent with the submit."""
    x_fal_webhook_request_id: str | None = None
    """fal.ai: the id of the request."""
    x_fal_webhook_user_id: str | None = None
    """fal.ai: the id of the user."""
    x_fal_webhook_timestamp: str | None = None
    """fal.ai: the time in Unix seconds."""
    x_fal_webhook_signature: str | None = None
    """fal.ai: an Ed25519 signature in hex over the three headers above and the body's SHA-256."""
    x_ideogram_webhook_generation_id: str | None = None
    """Ideogram: the id of the generation."""
    x_ideogram_webhook_user_id: str | None = None
    """Ideogram: the id of the user."""
    x_ideogram_webhook_timestamp: str | None = None
    """Ideogram: the time in Unix seconds."""
    x_ideogram_webhook_signature: str | None = None
    """Ideogram: a signature like fal.ai's."""
    webhook_id: str | None = None
    """Replicate, WaveSpeed: the id of the message."""
    webhook_timestamp: str | None = None
    """Replicate, WaveSpeed: the time in Unix seconds."""
    webhook_signature: str | None = None
    """Replicate: a signature by Standard Webhooks. WaveSpeed: `v3,` and an HMAC in hex."""
    x_bfl_signature: str | None = None
    """BFL: `sha256=` and an HMAC-SHA256 in hex of the body."""
    x_openrouter_signature: str | None = None
    """OpenRouter: `t=<seconds>,v1=<HMAC-SHA256 in hex of the seconds, a comma and the body>`."""


Token = Annotated[
    str,
    msgspec.Meta(description="Generated for one prediction; part of the callback URL."),
]


# --- what forward sends ---


class EventData(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction that has ended. It is the whole body of a CloudEvent in binary mode."""

    event_id: str
    """The id of the event; each prediction has exactly one."""
    channel: Channel | None
    """How the receiver learned the outcome; null if it ended the prediction itself."""
    prediction: Prediction


class StandardWebhook(msgspec.Struct, frozen=True, kw_only=True):
    """An event in the format of Standard Webhooks."""

    type: EventType
    timestamp: datetime
    data: EventData


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event as a CloudEvent 1.0 in structured mode."""

    specversion: Literal["1.0"]
    id: str
    """The same in all retries, so that duplicates can be detected."""
    source: str
    """FORWARD_SOURCE, or the receiver's public URL."""
    type: EventType
    subject: str
    """The id of the prediction."""
    time: datetime
    datacontenttype: Literal["application/json"]
    data: EventData


class OutgoingHeaders(msgspec.Struct, frozen=True, rename="kebab"):
    """The headers of a forwarded event."""

    webhook_id: str
    """The same in all retries, so that duplicates can be detected."""
    webhook_timestamp: Annotated[str, Meta(pattern="^[0-9]+$")]
    """The time in Unix seconds; refuse an event that is older than some minutes."""
    webhook_signature: str | None = None
    """`v1,` and an HMAC-SHA256 in base64 of the id, the timestamp and the body, joined by dots; one
    for each secret, separated by spaces. Missing only if FORWARD_SECRET is not set."""
    ce_specversion: Literal["1.0"] | None = None
    """This and the other `ce-` headers are the attributes of a CloudEvent in binary mode."""
    ce_id: str | None = None
    ce_source: str | None = None
    ce_type: EventType | None = None
    ce_subject: str | None = None
    ce_time: str | None = None


_DATA: Final = EventData(event_id=f"evt_{_ENDED.id[5:]}", channel=_ENDED.channel, prediction=_ENDED)
_AT: Final = datetime.fromisoformat("2026-01-31T12:00:03.500000+00:00")
_EVENT: Final = CloudEvent(
    specversion="1.0",
    id=f"dlv_{_ENDED.id[5:]}5c1d0e2f",
    source="https://hooks.example.org",
    type="prediction.succeeded",
    subject=_ENDED.id,
    time=_AT,
    datacontenttype="application/json",
    data=_DATA,
)
CALLBACK: Final = Row(
    method="POST",
    path="/webhooks/{provider}/{token}",
    summary="Take a provider's callback",
    answers=(Answer(200, "recorded, now or before", Content(Receipt, Receipt("accepted"))),),
    problems=(
        "not-found",
        "unproved",
        "too-slow",
        "too-large",
        "rate-limited",
        "unavailable",
        "keys-unavailable",
        "sources-unavailable",
    ),
    detail="Not for callers: the URL is given to the provider with each submit. The body is parsed "
    "only after the callback is proved, by the token in the path and by the provider's signature "
    "or secret.",
    names={"provider": ProviderName, "token": Token},
    headers=Proofs,
    body=(Content(Any, {"request_id": "…", "status": "OK", "payload": {"images": []}}),),
    is_open=True,
)
PluginName = Annotated[
    str, msgspec.Meta(pattern="^[a-z0-9]([a-z0-9_-]{0,62}[a-z0-9])?$", examples=["shop"])
]
WAY_IN: Final = Row(
    method="POST",
    path="/in/{name}",
    summary="Call a plugin's route",
    answers=(Answer(200, "the plugin's answer, which may have another status and type"),),
    problems=(
        "not-found",
        "unknown-recipe",
        "unproved",
        "invalid-json",
        "invalid-body",
        "too-slow",
        "too-large",
        "rate-limited",
        "unavailable",
        "route-failed",
        "route-too-slow",
    ),
    detail="A route that a handler file registers with `@route`, for a chat platform or a trigger. "
    "The body is parsed only after the plugin's own proof has passed. Plugins may also accept "
    "other methods, and paths below this one.",
    names={"name": PluginName},
    body=(Content(Any, {}),),
    is_open=True,
)
SENT: Final = tuple(
    Row(
        method="POST",
        path=kind,
        summary=f"A prediction is {kind.partition('.')[2]}",
        answers=(
            Answer(200, "accepted, as with any other 2xx"),
            Answer(410, "never retried: the delivery ends dead"),
            Answer(503, "retried later, after Retry-After if it is given, as is any other answer"),
        ),
        detail="Sent by the built-in handler `forward` to FORWARD_URL, in the format of "
        "FORWARD_FORMAT, and in the first format to the `reply_to` of its submit. Each is sent at "
        "least once, in any order.",
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
