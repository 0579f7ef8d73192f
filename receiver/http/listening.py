"""Listening sockets, opened before anything is started."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from receiver.model import forks
from receiver.model.errors import ReceiverError

_BACKLOG = 2048
"""Connections that may wait to be accepted: uvicorn's default."""


@contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen on every address of a host, on the same port, until the block is left.

    Clients that connect wait until a server takes the sockets. Port 0 is any free port.
    Raises ReceiverError with advice.
    """
    with ExitStack() as stack:
        found: list[socket.socket] = []
        addresses = _addresses(host, port)
        for family, address in addresses:
            chosen = found[0].getsockname()[1] if found else port
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            try:
                _listen(listener, (address[0], chosen, *address[2:]))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL and address != addresses[-1][1]:
                    continue  # a host may have an address of a family that is disabled here
                raise ReceiverError(_problem(host, chosen, error)) from None
            forks.PRIVATE.add(listener.fileno())  # a handler's file may fork as it is loaded
            stack.callback(forks.PRIVATE.discard, listener.fileno())
            found.append(listener)
        yield found


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str | int, ...]]]:
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except (OSError, UnicodeError) as error:
        raise ReceiverError(f"--host {host} is not an address of this machine: {error}") from None
    return list(dict.fromkeys((family, (*address,)) for family, _, _, _, address in found))


def _listen(listener: socket.socket, address: tuple[str | int, ...]) -> None:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        with suppress(OSError):
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.setblocking(False)
    listener.bind(address)
    listener.listen(_BACKLOG)


def _problem(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is taken: stop what listens there, or give another by --port"
    return f"cannot listen on port {port} of {host}: {error.strerror or error}"


def url_of(listener: socket.socket) -> str:
    """Return the URL by which this machine reaches a listener."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - it is not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
