"""Heartbeat: a thread that renews the leases of claims, also while the event loop is blocked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from queue import SimpleQueue
from typing import Any, Final, TypeAlias

import structlog

from receiver.model.tasks import start_thread
from receiver.store.postgres.group_commit import Connection

log = structlog.get_logger("receiver")

_Renewal: TypeAlias = tuple[str, list[str], float]
"""An owner, the deliveries that it holds, and the end of their leases."""
_LAST_BEAT: Final = 2.0
"""Seconds to wait for the thread at the end; with the server away it may hang for longer."""
_PATIENCE: Final = 2.0
"""Seconds that the loop may take to renew; after that the thread uses its own connection."""


class Heartbeat:
    """Renews leases on its own connection; with `in_loop` in the loop, unless it is blocked."""

    def __init__(
        self,
        renew: Callable[[Connection, str, list[str], float], Awaitable[None]],
        connect: Callable[[], Awaitable[Connection]],
        in_loop: Callable[[str, list[str], float], Coroutine[Any, Any, None]] | None,
    ) -> None:
        self._renew = renew
        self._connect = connect
        self._in_loop = in_loop
        self._renewals: SimpleQueue[_Renewal | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread, from the loop, once there is a lease to renew."""
        if self._thread is None:
            loop = asyncio.get_running_loop()
            self._thread = start_thread("receiver-renewal", self._run, loop)

    def put(self, renewal: _Renewal) -> None:
        self._renewals.put(renewal)

    def stop(self) -> None:
        self._renewals.put(None)
        if self._thread is not None:
            self._thread.join(_LAST_BEAT)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner() as runner:
            connection: Connection | None = None
            while (renewal := self._newest()) is not None:
                if self._in_loop is None:
                    connection = runner.run(self._beat(connection, renewal))
                elif not _renewed_in_loop(self._in_loop(*renewal), loop):
                    runner.run(self._beat_once(renewal))
            if connection is not None:
                connection.terminate()

    async def _beat_once(self, renewal: _Renewal) -> None:
        if (connection := await self._beat(None, renewal)) is not None:
            connection.terminate()

    def _newest(self) -> _Renewal | None:
        """Wait for a renewal; of several that wait, return the latest, which covers the others."""
        renewal = self._renewals.get()
        while renewal is not None and not self._renewals.empty():
            renewal = self._renewals.get()
        return renewal

    async def _beat(self, connection: Connection | None, renewal: _Renewal) -> Connection | None:
        """Renew once; a lease that cannot be renewed runs out, and its work is done again."""
        try:
            connection = connection or await self._connect()
            await self._renew(connection, *renewal)
        except Exception as error:  # noqa: BLE001 - the thread must go on to the next beat
            log.warning("lease.unrenewed", reason=f"{type(error).__name__}: {error}")
            if connection is not None:
                connection.terminate()
            return None
        return connection


def _renewed_in_loop(renewing: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> bool:
    """Renew in the loop; False: the loop is blocked, or the renewal failed."""
    try:
        future = asyncio.run_coroutine_threadsafe(renewing, loop)
    except RuntimeError:  # the loop is closed, and with it all claims
        renewing.close()
        return True
    try:
        future.result(_PATIENCE)
    except Exception:  # noqa: BLE001 - the caller tries its own connection
        future.cancel()
        return False
    return True
