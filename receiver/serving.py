"""Run an ASGI app under uvicorn, and end within seconds whatever its tasks do."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_STOP: Final = 2
"""Seconds that open requests get to end when we stop; handlers get their own time after that."""
LONGEST_STOP: Final = 9.5
"""Seconds after which we end whatever hangs: what is stored is owed to the next start."""
_LARGEST_HEAD: Final = 64 * 1024
_SLOWEST_HEAD: Final = 20.0
"""Seconds a request's line and headers may take, and a connection may be silent at first."""
_SLOWEST_READ: Final = 20.0
"""Seconds in which whoever reads an answer must take at least some of it (tens of KB)."""
LINGER: Final = 1.0
"""Seconds after everything is stored in which stubborn tasks may still end by themselves."""


class Protocol(HttpToolsProtocol):
    """HTTP with a bound on what comes before a request's body, in bytes and in time.

    uvicorn's own has neither: one endless header would fill the memory, and a connection that says
    nothing would hold its place for ever. So would one that asks and does not read the answer.
    """

    _head = 0
    _in_head = True
    _patience: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(_SLOWEST_HEAD, self._give_up)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._in_head = 0, True
        if self._patience is None:
            self._patience = self.loop.call_later(_SLOWEST_HEAD, self._give_up)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._be_patient()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > _LARGEST_HEAD:
                self._give_up()

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

    def connection_lost(self, exc: Exception | None) -> None:
        self._be_patient()
        self._stop_unread()
        super().connection_lost(exc)

    def _be_patient(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        self.transport.close()


class Server(uvicorn.Server):
    """A uvicorn server that answers waiting callers before it stops, and then really stops."""

    def __init__(self, app: Starlette, host: str, port: int, *, leave: bool = True) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=Protocol,
                log_config=None,
                access_log=False,
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
