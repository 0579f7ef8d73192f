"""Run an ASGI app under uvicorn, and end within seconds whatever its tasks do."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import uvicorn
from starlette.applications import Starlette

_STOP: Final = 2
"""Seconds that open requests get to end when we stop; handlers get their own time after that."""
_LONGEST_STOP: Final = 9.5
"""Seconds after which we end whatever hangs: what is stored is owed to the next start."""
_LINGER: Final = 1.0
"""Seconds after everything is stored in which stubborn tasks may still end by themselves."""


class Server(uvicorn.Server):
    """A uvicorn server that answers waiting callers before it stops, and then really stops."""

    def __init__(self, app: Starlette, host: str, port: int, *, leave: bool = True) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
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
            _exit_after(_LONGEST_STOP, 1)
        await super().shutdown(sockets)

    def _stopped(self) -> None:
        """Hear that the store is closed, whatever brought us there.

        A handler that swallows its cancellation would keep the loop, and so the process, for ever.
        """
        if self._leave:
            _exit_after(_LINGER, 0 if self.should_exit else 1)


def _exit_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
