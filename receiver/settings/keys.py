"""API keys as settings: those that callers send, those that only read, and those that only drain.

A key may have a name before it, as in `web:KEY`: costs and limits identify the caller by it.
"""

from __future__ import annotations

import re
from typing import Final

from receiver.settings.parsers import header_safe, secrets, texts
from receiver.settings.reader import Reader, Secret

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,31}", re.ASCII)


class ApiKey(Secret):
    """A key of callers, and its name if it has one."""

    __slots__ = ("name",)

    def __init__(self, text: str, name: str | None = None) -> None:
        super().__init__(text)
        self.name = name


def _one(text: str) -> ApiKey:
    name, colon, key = text.partition(":")
    if not colon:
        return ApiKey(text)
    if not _NAME.fullmatch(name) or not key.strip():
        raise ValueError(
            "what stands before a colon must be a name of letters, digits, _ and -, and a key must "
            "follow it, as in web:KEY"
        )
    return ApiKey(key.strip(), name)


def keys(text: str) -> tuple[ApiKey, ...]:
    found = tuple(map(_one, texts(text)))
    if len(set(found)) < len({(key, key.name) for key in found}):
        raise ValueError("a key must have one name, or none")
    return found


def shown(text: str) -> ApiKey:
    if "," in text:
        raise ValueError("must be one key; those that the receiver takes are in RECEIVER_API_KEYS")
    key = _one(text)
    header_safe(key.reveal())
    return key


def api_keys(reader: Reader) -> tuple[ApiKey, ...]:
    """Read the keys that are accepted; without a list, the one that commands send."""
    if reader.is_set("RECEIVER_API_KEYS"):
        return reader.get("RECEIVER_API_KEYS", keys, ())
    key = reader.get("RECEIVER_API_KEY", shown, None)
    return () if key is None else (key,)


def shown_key(reader: Reader) -> Secret | None:
    """Read the key that commands send; without one, the first of those that are accepted."""
    if reader.is_set("RECEIVER_API_KEY"):
        return reader.get("RECEIVER_API_KEY", shown, None)
    return reader.get("RECEIVER_API_KEYS", lambda text: next(map(shown, texts(text)), None), None)


def cron_secrets(reader: Reader) -> tuple[Secret, ...]:
    """Read the keys that may only drain; platforms set the one without our prefix."""
    names = ("RECEIVER_CRON_SECRET", "CRON_SECRET")
    return tuple(key for name in names for key in reader.get(name, secrets, ()))
