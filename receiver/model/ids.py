"""Ids of predictions, events and deliveries: how they are made, and derived from each other."""

from __future__ import annotations

import secrets
from functools import lru_cache
from hashlib import blake2s


def new_id(prefix: str, now: float) -> str:
    """Make an unguessable id that sorts by time: 56 bits of microseconds, 72 bits of chance.

    Predictions wait in the order of their ids, so two must not be made in one unit of their time.
    """
    return oldest_id(prefix, now) + secrets.token_hex(9)


def oldest_id(prefix: str, now: float) -> str:
    """Return what sorts before every id that is made from then on, and after all made before."""
    return f"{prefix}_{max(int(now * 1_000_000), 0):014x}"


def made_at(id: str) -> float:
    """Return when an id of that form was made, in unix seconds."""
    return int(id.partition("_")[2][:14], 16) / 1_000_000


def event_id(prediction_id: str) -> str:
    """Return the id of a prediction's event: it has only one."""
    return f"evt_{prediction_id[5:]}"


@lru_cache(maxsize=1024)
def handler_digest(handler: str) -> str:
    """Shorten a handler's name for ids: 8 hex digits."""
    return blake2s(handler.encode(), digest_size=4).hexdigest()


def delivery_id(prediction_id: str, handler: str) -> str:
    """Return the id of the delivery of an event to a handler: there is only one."""
    return f"dlv_{prediction_id[5:]}{handler_digest(handler)}"
