"""Ports and clients for servers of this machine."""

from __future__ import annotations

import secrets
import socket
import ssl
from contextlib import suppress
from typing import Any, Final

import httpx

TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts nobody, and is asked by nobody: to read the CA bundle costs 30 ms each time."""


def free_port() -> int:
    """Return a TCP port that is free, and reserve it against other tests until this process ends.

    The reservation is a UDP socket on the same number. The port is below those that connections
    get, as one of them could take it, and not drawn by `random`: pytest-randomly gives every
    worker the same seed.
    """
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        reservation = socket.socket(type=socket.SOCK_DGRAM)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            reservation.bind(("127.0.0.1", port))
            reservation.detach()  # it stays open
            return port
        reservation.close()


def request(method: str, url: str, **more: Any) -> httpx.Response:
    return httpx.request(method, url, verify=TLS, trust_env=False, **more)


def get(url: str, **more: Any) -> httpx.Response:
    return request("GET", url, **more)


def is_ready(*urls: str) -> bool:
    """Return whether any of these is answered with a 2xx."""
    try:
        return any(get(url).is_success for url in urls)
    except httpx.HTTPError:
        return False
