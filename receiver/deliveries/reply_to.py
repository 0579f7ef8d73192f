"""The check of `reply_to`: it must name a host of FORWARD_HOSTS, at a public address.

It runs when a prediction is submitted, to refuse at once; the handler that sends the event checks
again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Collection
from typing import Final
from urllib.parse import urlsplit

from receiver.deliveries.guard import is_public
from receiver.model.errors import Problem

_PATIENCE: Final = 5.0
"""Seconds for name resolution; if it takes longer, only the sending of the event checks."""


async def check_reply_to(url: str, hosts: Collection[str], *, allow_private: bool) -> None:
    """Raise a Problem if no event may be sent to this URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Problem(403, "reply-to-refused", "reply_to: it is not a URL") from None
    if parts.netloc.lower() not in hosts:
        raise Problem(
            403,
            "reply-to-refused",
            f"reply_to: {parts.netloc[:100]} is not one of FORWARD_HOSTS: they are written as in "
            "the URL, with the port where there is one",
        )
    if allow_private:
        return
    addresses: set[str] = set()
    with contextlib.suppress(OSError, UnicodeError, TimeoutError):
        async with asyncio.timeout(_PATIENCE):
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(host, port or parts.scheme, type=socket.SOCK_STREAM)
            addresses = {str(entry[4][0]) for entry in found}
    if not all(map(is_public, addresses)):
        raise Problem(
            403,
            "reply-to-refused",
            f"reply_to: {host[:100]} leads to an address that is not public",
        )
