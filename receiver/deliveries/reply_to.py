"""The allow list of `reply_to`: a host of FORWARD_HOSTS, at a public address.

It is looked at when a prediction is submitted, to refuse at once; what sends the event looks again.
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
"""Seconds for a name server; what it does not say in time is seen when the event is sent."""


async def check_reply_to(url: str, hosts: Collection[str], *, allow_private: bool) -> None:
    """Raise a Problem where no event may be sent."""
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
