"""Ids of predictions, events and deliveries, and how they are derived from each other."""

from __future__ import annotations

import secrets
from functools import lru_cache
from hashlib import blake2s


def new_id(prefix: str, now: float) -> str:
    """Return an unguessable id that sorts by time: 56 bits of microseconds, 72 random bits.

    Predictions queue in the order of their ids, so no two may be made in the same microsecond.
    """
    return oldest_id(prefix, now) + secrets.token_hex(9)


def oldest_id(prefix: str, now: float) -> str:
    """Return a text that sorts before every id made from `now` on, and after all earlier ids."""
    return f"{prefix}_{max(int(now * 1_000_000), 0):014x}"


def made_at(id: str) -> float:
    """Return the unix seconds at which an id was made."""
    return int(id.partition("_")[2][:14], 16) / 1_000_000


def event_id(prediction_id: str) -> str:
    """Return the id of a prediction's event: it has only one."""
    return f"evt_{prediction_id[5:]}"


def prediction_id_of(id: str) -> str:
    """Return the id of an event's prediction; a prediction's own id is returned as it is."""
    return f"pred_{id.partition('_')[2]}"


@lru_cache(maxsize=1024)
def handler_digest(handler: str) -> str:
    """Return the 8 hex digits that stand for a handler's name in ids."""
    return blake2s(handler.encode(), digest_size=4).hexdigest()


def delivery_id(prediction_id: str, handler: str) -> str:
    """Return the id of the delivery of an event to a handler: there is only one."""
    return f"dlv_{prediction_id[5:]}{handler_digest(handler)}"
