"""POST every event to a URL. Use: `FORWARD_URL=… FORWARD_SECRET=whsec_… receiver serve forward`.

FORWARD_URL     where to
FORWARD_SECRET  signs as Standard Webhooks do; several, separated by blanks, sign side by side while
                one replaces another
FORWARD_FORMAT  standard (default), or CloudEvents 1.0: cloudevents (all in the body), or
                cloudevents-binary (all but the data in headers); these also go unsigned
FORWARD_SOURCE  the `source` of CloudEvents: who speaks. Default: RECEIVER_PUBLIC_URL

The id is the same over retries, so the other side can tell a repeat. 410 ends a delivery; any other
answer that is no 2xx is tried again, when Retry-After says so.
"""

import os
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import msgspec
from standardwebhooks import Webhook

from receiver import Context, Event, expect, on

URL = os.environ.get("FORWARD_URL", "")
SIGNERS = [Webhook(secret) for secret in os.environ.get("FORWARD_SECRET", "").split()]
FORMAT = os.environ.get("FORWARD_FORMAT") or "standard"
SOURCE = (
    os.environ.get("FORWARD_SOURCE")
    or os.environ.get("RECEIVER_PUBLIC_URL")
    or "urn:prediction-receiver"
)
GONE = 410


@on("*", name="forward", timeout=30)
async def forward(event: Event, ctx: Context) -> None:
    headers, content = FORMATS[FORMAT](event, ctx.idempotency_key)
    body = msgspec.json.encode(content)
    headers |= signature(ctx.idempotency_key, body.decode())
    expect(await ctx.http.post(URL, content=body, headers=headers), final={GONE})


def signature(key: str, body: str) -> dict[str, str]:
    now = datetime.now(UTC)
    signatures = " ".join(signer.sign(key, now, body) for signer in SIGNERS)
    return {
        "webhook-id": key,
        "webhook-timestamp": str(int(now.timestamp())),
        **({"webhook-signature": signatures} if SIGNERS else {}),
    }


def data(event: Event) -> dict[str, Any]:
    """Give the event without the provider's own payload, which may be large."""
    return {"event_id": event.id, "channel": event.channel, "prediction": event.prediction}


def standard(event: Event, _: str) -> tuple[dict[str, str], Any]:
    content = {"type": event.type, "timestamp": event.time, "data": data(event)}
    return {"content-type": "application/json"}, content


def attributes(event: Event, key: str) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": key,
        "source": SOURCE,
        "type": event.type,
        "subject": event.prediction.id,
        "time": event.time.isoformat(),
    }


def structured(event: Event, key: str) -> tuple[dict[str, str], Any]:
    content = {
        **attributes(event, key),
        "datacontenttype": "application/json",
        "data": data(event),
    }
    return {"content-type": "application/cloudevents+json"}, content


def binary(event: Event, key: str) -> tuple[dict[str, str], Any]:
    # Headers are ASCII; what is not is written as its UTF-8 in percent, as the binding says.
    headers = {
        f"ce-{name}": quote(value, safe=PRINTABLE) for name, value in attributes(event, key).items()
    }
    return {"content-type": "application/json", **headers}, data(event)


PRINTABLE = "".join(map(chr, range(0x21, 0x7F))).translate({ord('"'): None, ord("%"): None})
FORMATS = {"standard": standard, "cloudevents": structured, "cloudevents-binary": binary}

if not URL or not (SIGNERS or FORMAT != "standard"):
    raise ValueError("forward needs FORWARD_URL and FORWARD_SECRET (whsec_… of 24 to 64 bytes)")
if FORMAT not in FORMATS:
    raise ValueError(f"FORWARD_FORMAT must be one of {', '.join(FORMATS)}, not {FORMAT!r}")
