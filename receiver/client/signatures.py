"""Verify the signature of an event that `forward` sent (Standard Webhooks)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

import msgspec

from receiver.client.steps import ClientError
from receiver.model.values import Channel, Event, EventType, Prediction

_TOLERANCE: Final = 300
"""Seconds by which the clocks may differ; within them, a captured request can be replayed."""
_KEY_BYTES: Final = range(24, 65)


class _Data(msgspec.Struct, frozen=True):
    event_id: str
    channel: Channel | None
    prediction: Prediction


class _Sent(msgspec.Struct, frozen=True):
    type: EventType
    timestamp: datetime
    data: _Data


def verify(
    secret: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    clock: Callable[[], float] = time.time,
) -> Event:
    """Return the event that `forward` sent, or raise ClientError: answer that with a 401.

    `secret` is FORWARD_SECRET (during a rotation several, separated by blanks), `body` the bytes as
    received. An event may arrive twice: use its `id` to process it once.
    """
    given = {name.lower(): value for name, value in headers.items()}
    name, at = given.get("webhook-id", ""), given.get("webhook-timestamp", "")
    signatures = [
        part.removeprefix("v1,").encode("utf-8", "replace")
        for part in given.get("webhook-signature", "").split()
        if part.startswith("v1,")
    ]
    if not (name and at.isascii() and at.isdecimal() and len(at) < 12 and signatures):  # noqa: PLR2004 - digits
        raise _unverified("it has no signature of Standard Webhooks")
    signed = b".".join([name.encode("utf-8", "replace"), at.encode(), body])
    expected = [base64.b64encode(hmac.digest(key, signed, hashlib.sha256)) for key in _keys(secret)]
    if not any(hmac.compare_digest(one, other) for one in expected for other in signatures):
        raise _unverified("its signature is of another secret, or of another body")
    if abs(clock() - int(at)) > _TOLERANCE:
        raise _unverified("it was signed too long ago, or the clocks differ")
    try:
        sent = msgspec.json.decode(body, type=_Sent)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        detail = f"it is not an event as `forward` sends it by FORWARD_FORMAT=standard ({error})"
        raise ClientError("unverified", detail) from error
    return Event(
        id=sent.data.event_id,
        type=sent.type,
        time=sent.timestamp,
        channel=sent.data.channel,
        prediction=sent.data.prediction,
    )


def _unverified(reason: str) -> ClientError:
    return ClientError("unverified", f"this event could not be proved: {reason}")


def _keys(secret: str) -> list[bytes]:
    """Return the keys of the secrets; raise ClientError if one is not valid or there are none."""
    keys = []
    for text in secret.split():
        encoded = text.removeprefix("v1,").removeprefix("whsec_")
        try:
            key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
        except ValueError:
            key = b""
        if len(key) not in _KEY_BYTES:
            raise ClientError("unfit", "the secret must be whsec_ and base64 of 24 to 64 bytes")
        keys.append(key)
    if not keys:
        raise ClientError("unfit", "there is no secret to verify with: set FORWARD_SECRET")
    return keys
