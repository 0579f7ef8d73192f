"""POST every event to a URL, signed as Standard Webhooks.

Use: `FORWARD_URL=https://example.org/hook FORWARD_SECRET=whsec_… receiver serve forward`.
The `webhook-id` stays the same over retries, so the other side can tell a repeat. Several secrets,
separated by blanks, sign side by side while one replaces another.
"""

import os
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import msgspec
from standardwebhooks import Webhook

from receiver import Context, Dead, Event, Retry, on

URL = os.environ.get("FORWARD_URL", "")
SIGNERS = [Webhook(secret) for secret in os.environ.get("FORWARD_SECRET", "").split()]
GONE = 410
SLOW_DOWN = {429, 502, 503, 504}

if not URL or not SIGNERS:
    raise ValueError("forward needs FORWARD_URL and FORWARD_SECRET (whsec_… of 24 to 64 bytes)")


@on("*", name="forward", timeout=30)
async def forward(event: Event, ctx: Context) -> None:
    now = datetime.now(UTC)
    body = msgspec.json.encode(message(event)).decode()
    signatures = " ".join(signer.sign(ctx.idempotency_key, now, body) for signer in SIGNERS)
    headers = {
        "content-type": "application/json",
        "webhook-id": ctx.idempotency_key,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signatures,
    }
    answer = await ctx.http.post(URL, content=body, headers=headers)
    if answer.status_code == GONE:
        raise Dead("the other side wants no more events (410)")
    if answer.status_code in SLOW_DOWN and (after := wait(answer)) is not None:
        raise Retry(f"HTTP {answer.status_code}", after=after)
    if not answer.is_success:
        raise RuntimeError(f"HTTP {answer.status_code}")


def message(event: Event) -> dict[str, Any]:
    """Give the event without the provider's own payload, which may be large."""
    return {
        "type": event.type,
        "timestamp": event.time,
        "data": {"event_id": event.id, "channel": event.channel, "prediction": event.prediction},
    }


def wait(answer: httpx.Response) -> float | None:
    """Read Retry-After, in seconds or as a date; None where it says nothing."""
    text = answer.headers.get("retry-after", "")
    if text.isdecimal():
        return float(text)
    try:
        return max((parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None
