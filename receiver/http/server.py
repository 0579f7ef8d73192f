"""The uvicorn server that `receiver serve` runs; it ends within seconds whatever its tasks do."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette

from receiver.http.connection import protocol
from receiver.http.stopping import LIMIT, LINGER, exit_after, keep_signals, run
from receiver.observability import logging as logs

_STOP: Final = 2
"""Seconds that open requests get to end when we stop; handlers get their own time after that."""
_KEEP_ALIVE: Final = 620
"""Seconds a connection may be idle between requests: longer than any proxy keeps it before us, or
the proxy's next request could meet our close. Google's load balancer has the longest, 600."""


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
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=_STOP,
                ws="none",
                lifespan="on",
            )
        )
        self._release: Callable[[], Any] = getattr(app.state, "release", lambda: None)
        self._leave = leave
        app.state.stopped = self._stopped

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        if not self._leave:
            super().run(sockets)
            return
        factory = self.config.get_loop_factory()
        run(self.serve(sockets), asyncio.new_event_loop() if factory is None else factory())

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super()._serve(sockets)
        finally:
            if self._leave:
                logs.flush()  # the signal may follow once more, and end us at once

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal, also where the loop is stuck."""
        LIMIT.arm()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._leave:
            keep_signals(self.handle_exit)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._release()
        if self._leave:
            LIMIT.arm()
        await super().shutdown(sockets)

    def _stopped(self) -> None:
        """Exit soon, now that the store is closed.

        A handler that swallows its cancellation would keep the loop, and so the process, for ever.
        """
        if self._leave:
            exit_after(LINGER, 0 if self.should_exit else 1)
