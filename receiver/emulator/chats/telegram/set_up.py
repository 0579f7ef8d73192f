"""A bot's settings at Telegram: its webhook and its commands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from receiver.emulator.chats.forms import Given
from receiver.emulator.chats.telegram.files import bad

PORTS: Final = {443, 80, 88, 8443}
_LOCAL: Final = {"127.0.0.1", "localhost", "::1"}
_COMMAND = re.compile(r"[a-z0-9_]{1,32}")
_SECRET = re.compile(r"[A-Za-z0-9_-]{1,256}")
_MOST_COMMANDS, _MOST_CONNECTIONS, _LONGEST_ABOUT = 100, 100, 256


@dataclass
class Webhook:
    """The target of updates; none while `url` is empty."""

    url: str = ""
    secret: str = ""
    allowed: tuple[str, ...] = ()
    """Kinds of updates; empty: all."""
    error: str = ""
    error_at: float = 0


def read_webhook(given: Given) -> Webhook:
    """Return the webhook in a call; raise Problem if it is invalid."""
    url, secret = given.text("url"), given.text("secret_token")
    if not url:
        return Webhook()
    _check_url(url)
    if secret and not _SECRET.fullmatch(secret):
        raise bad("secret token contains unallowed characters")
    most = given.text("max_connections") or "40"
    if not most.isdecimal() or not 1 <= int(most) <= _MOST_CONNECTIONS:
        raise bad("invalid webhook max_connections specified")
    return Webhook(url, secret, tuple(given.value("allowed_updates") or ()))


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname in _LOCAL:
        return
    if parts.scheme != "https":
        raise bad("bad webhook: An HTTPS URL must be provided for webhook")
    if (parts.port or 443) not in PORTS:
        raise bad("bad webhook: Webhook can be set up only on ports 80, 88, 443 or 8443")


def read_commands(given: Any) -> list[dict[str, Any]]:
    """Return the commands if they are valid; raise Problem otherwise."""
    if not isinstance(given, list) or len(given) > _MOST_COMMANDS:
        raise bad(f"can't parse commands: a list of {_MOST_COMMANDS} at most")
    for one in given:
        if not _COMMAND.fullmatch(str(one.get("command", ""))):
            raise bad("BOT_COMMAND_INVALID")
        if not 0 < len(str(one.get("description", ""))) <= _LONGEST_ABOUT:
            raise bad("BOT_COMMAND_DESCRIPTION_INVALID")
    return given
