"""Ports and clients for servers on this machine."""

from __future__ import annotations

import secrets
import socket
import ssl
from contextlib import suppress
from typing import Any, Final

import httpx

TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""A context without CAs for plain http: reading the CA bundle costs 30 ms each time."""


def free_port() -> int:
    """Return a TCP port that is free, and reserve it against other tests until this process ends.

    The reservation is a UDP socket with the same number. The port is below the ephemeral ports, as
    a connection could take one of those, and not drawn by `random`, as pytest-randomly gives every
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
    """Return whether any of these URLs answers with 2xx."""
    try:
        return any(get(url).is_success for url in urls)
    except httpx.HTTPError:
        return False
