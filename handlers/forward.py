"""POST every event to a URL. Use: `FORWARD_URL=… FORWARD_SECRET=whsec_… receiver serve forward`.

FORWARD_HOSTS names the hosts (by comma, with a port if the URL has one) that a submit may name as
`reply_to`, to receive its own event: always as Standard Webhooks, and to public addresses only.

FORWARD_FORMAT is standard (Standard Webhooks), or CloudEvents 1.0: cloudevents (all in the body) or
cloudevents-binary (all but the data in headers); these may be sent unsigned. Several secrets,
separated by blanks, all sign each event, so that one can replace another.

The id is the same for all retries, so the receiving service can detect repeats. 410 ends a
delivery; any other answer except a 2xx is retried, after the time in Retry-After if given.
"""

from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import msgspec
from standardwebhooks import Webhook

from receiver import Context, Dead, Event, expect, on, read_settings

from ._proofs import encoded

GONE = 410


def signers(text: str) -> list[Webhook]:
    return [signer(secret) for secret in text.split()]


def signer(secret: str) -> Webhook:
    """Read a secret that every library of Standard Webhooks decodes to the same key."""
    # Some services put the version of the signature before it.
    return Webhook(encoded(secret.removeprefix("v1,")))


with read_settings() as read:
    URL = read.url("FORWARD_URL", "the address that gets events", default="")
    FORMAT = read.choice(
        "FORWARD_FORMAT",
        "how events are written",
        *("standard", "cloudevents", "cloudevents-binary"),
        default="standard",
    )
    SIGNERS = read.parsed("FORWARD_SECRET", "the secret that signs: whsec_…", signers, default="")
    SOURCE = read.text(
        "FORWARD_SOURCE",
        "the `source` of CloudEvents",
        default=read.text("RECEIVER_PUBLIC_URL", "our address", default="urn:prediction-receiver"),
    )
    HOSTS = read.text("FORWARD_HOSTS", "the hosts that `reply_to` may name", default="")
    if (URL == "" and HOSTS == "") or (SIGNERS == [] and (HOSTS or FORMAT == "standard")):
        read.refuse(
            "forward needs FORWARD_URL and FORWARD_SECRET (whsec_… of 24 to 64 bytes), or "
            "FORWARD_HOSTS and FORWARD_SECRET"
        )


async def forward(event: Event, ctx: Context) -> None:
    await send(ctx, ctx.http, URL, *FORMATS[FORMAT](event, ctx.idempotency_key))


async def reply(event: Event, ctx: Context) -> None:
    url = event.prediction.reply_to or ""
    if urlsplit(url).netloc.lower() not in {host.strip().lower() for host in HOSTS.split(",")}:
        raise Dead("FORWARD_HOSTS no longer names its host")
    try:
        await send(ctx, ctx.guarded, url, *standard(event, ctx.idempotency_key))
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise Dead(f"reply_to: {error}") from error


if URL:
    on("*", name="forward", timeout=30)(forward)
if HOSTS:
    on("*", name="reply", reply_to="*", timeout=30)(reply)


async def send(
    ctx: Context, http: httpx.AsyncClient, url: str, headers: dict[str, str], content: Any
) -> None:
    body = msgspec.json.encode(content)
    headers |= signature(ctx.idempotency_key, body.decode())
    expect(await http.post(url, content=body, headers=headers), final={GONE})


def signature(key: str, body: str) -> dict[str, str]:
    now = datetime.now(UTC)
    signatures = " ".join(signer.sign(key, now, body) for signer in SIGNERS)
    return {
        "webhook-id": key,
        "webhook-timestamp": str(int(now.timestamp())),
        **({"webhook-signature": signatures} if SIGNERS else {}),
    }


def data(event: Event) -> dict[str, Any]:
    """Return the event without the provider's own payload, which may be large."""
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
    # Headers are ASCII; other characters are percent-encoded UTF-8, as the HTTP binding specifies.
    headers = {
        f"ce-{name}": quote(value, safe=PRINTABLE) for name, value in attributes(event, key).items()
    }
    return {"content-type": "application/json", **headers}, data(event)


PRINTABLE = "".join(map(chr, range(0x21, 0x7F))).translate({ord('"'): None, ord("%"): None})
FORMATS = {"standard": standard, "cloudevents": structured, "cloudevents-binary": binary}
