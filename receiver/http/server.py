"""Run an ASGI app under uvicorn, and end within seconds whatever its tasks do."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from receiver.http.problems import problem_body

_STOP: Final = 2
"""Seconds that open requests get to end when we stop; handlers get their own time after that."""
LONGEST_STOP: Final = 9.5
"""Seconds after which we end whatever hangs: what is stored is owed to the next start."""
_LARGEST_HEAD: Final = 64 * 1024
_MOST_HEADERS: Final = 100
_LONGEST_URL: Final = 8 * 1024
_SLOWEST_HEAD: Final = 20.0
"""Seconds a request's line and headers may take, and a connection may be silent at first."""
_UNHEARD: Final = 2.0
"""Seconds for the rest of a request that was answered already: a reset would lose the answer."""
_LEAST_PATIENCE: Final = 1.0
"""Seconds that even a crowd leaves each connection."""
_REFUSALS: Final = {
    400: ("invalid-request", "this is no HTTP request"),
    414: ("uri-too-long", f"the URL has more than {_LONGEST_URL} bytes"),
    431: (
        "headers-too-large",
        f"there are more than {_MOST_HEADERS} headers, or more than {_LARGEST_HEAD} bytes of them",
    ),
}
_SLOWEST_READ: Final = 20.0
"""Seconds in which whoever reads an answer must take at least some of it (tens of KB)."""
LINGER: Final = 1.0
"""Seconds after everything is stored in which stubborn tasks may still end by themselves."""


class Waited:
    """The connections from which bytes are awaited, longest first, and a bound on their number.

    Where there are too many the one that takes longest is closed, but none in its first second
    while that can be helped: providers deliver in bursts, and each of a burst needs only that long.
    Addresses do not matter: all of a burst have the same, and all who come by one proxy.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._since: OrderedDict[Protocol, float] = OrderedDict()

    def add(self, connection: Protocol) -> None:
        now = self._clock()
        self._since[connection] = now
        self._since.move_to_end(connection)
        if len(self._since) > self._most:
            slowest, since = next(iter(self._since.items()))
            if now - since > _LEAST_PATIENCE or len(self._since) > 2 * self._most:
                slowest.give_up()

    def drop(self, connection: Protocol) -> None:
        self._since.pop(connection, None)


class _Refused(Exception):
    """Ends a request whose head is too much."""


class Protocol(HttpToolsProtocol):
    """HTTP with bounds on what uvicorn lets be endless.

    What comes with a request beside its body (line, headers, trailers, what frames its chunks) is
    bounded in size and number; its head is bounded in time, and so is what follows an answer that
    did not wait for the end of the request. Bodies are timed where they are read. Whoever asks and
    does not read the answer is cut off.
    """

    def __init__(self, *given: Any, waited: Waited, **more: Any) -> None:
        super().__init__(*given, **more)
        self._waited = waited
        self._beside = 0
        """Bytes of this request beside its body, which earns it as many more as it has itself."""
        self._in_head = True
        """Its line and headers are awaited, or under way."""
        self._in_request = False
        self._refusal = 400
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_bytes(_SLOWEST_HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_patience()
        self._stop_unread()
        self._waited.drop(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._beside += len(data)
        super().data_received(data)
        if self._beside > _LARGEST_HEAD or len(self.headers or ()) > _MOST_HEADERS:
            self._have_enough()
        elif self._in_head and self._patience is None:
            self._await_bytes(_SLOWEST_HEAD)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = self._in_request = True
        self._waited.add(self)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._end_patience()
        if len(self.url) > _LONGEST_URL:
            self._refusal = 414
            raise _Refused
        size = sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > _MOST_HEADERS or size > _LARGEST_HEAD:
            self._refusal = 431
            raise _Refused
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._beside -= 2 * len(body)
        super().on_body(body)

    def pause_writing(self) -> None:
        """Hear that more waits for the reader than it should: it gets a while to take some."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(_SLOWEST_READ, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_request = False
        self._beside = 0
        self._waited.drop(self)
        if self.cycle.response_complete:  # and uvicorn's patience with the next one has ended
            self._in_head = True
            self._await_bytes(_SLOWEST_HEAD)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing() or not self.cycle.response_complete:
            return  # or the next request is under way already
        if self._in_request:
            self._await_bytes(_UNHEARD)
        else:
            self._in_head = True
            self._waited.add(self)  # as long as uvicorn lets a connection be idle

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's shape
        """Refuse what is no request, or too much of one."""
        kind, why = _REFUSALS[self._refusal]
        body = problem_body(self._refusal, kind, why)
        head = (
            STATUS_LINE[self._refusal] + b"content-type: application/problem+json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.give_up()

    def _have_enough(self) -> None:
        """End a request that goes on and on beside its body; in its head that can still be said."""
        if self._in_head and self._in_request:
            self._refusal = 431
            self.send_400_response("")
        else:
            self.give_up()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: strangers would write our log."""

    def give_up(self) -> None:
        """Close the connection; what was written is still sent."""
        self._end_patience()
        self._waited.drop(self)
        self.transport.close()

    def _await_bytes(self, seconds: float) -> None:
        self._end_patience()
        self._patience = self.loop.call_later(seconds, self.give_up)
        self._waited.add(self)

    def _end_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def _most_waited() -> int:
    """Leave three quarters of the files that we may open for what is not waited for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(1000, soft // 4) if soft > 0 else 1000


def protocol() -> Callable[..., Protocol]:
    """Make what serves the connections of one server."""
    return partial(Protocol, waited=Waited(_most_waited()))


class Server(uvicorn.Server):
    """A uvicorn server that answers waiting callers before it stops, and then really stops."""

    def __init__(self, app: Starlette, host: str, port: int, *, leave: bool = True) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=protocol(),  # type: ignore[arg-type] # a class is only called
                log_config=None,
                access_log=False,
                proxy_headers=False,  # the app does it, by RECEIVER_TRUSTED_PROXIES
                server_header=False,
                timeout_graceful_shutdown=_STOP,
                ws="none",
                lifespan="on",
            )
        )
        self._release: Callable[[], Any] = getattr(app.state, "release", lambda: None)
        self._leave = leave
        app.state.stopped = self._stopped

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._release()
        if self._leave:
            exit_after(LONGEST_STOP, 1)
        await super().shutdown(sockets)

    def _stopped(self) -> None:
        """Hear that the store is closed, whatever brought us there.

        A handler that swallows its cancellation would keep the loop, and so the process, for ever.
        """
        if self._leave:
            exit_after(LINGER, 0 if self.should_exit else 1)


def exit_after(seconds: float, code: int) -> None:
    """End this process then, whatever its tasks do."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
