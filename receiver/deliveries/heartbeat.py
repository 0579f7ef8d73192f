"""The heartbeat: a thread that renews this process's claims and reports a blocked event loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Final

import msgspec
import structlog

from receiver.deliveries.containment import is_program
from receiver.model.tasks import start_thread
from receiver.observability.runtime import Runtime
from receiver.store.facade import Store

log = structlog.get_logger("receiver")


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """The intervals and time limits of the workers, in seconds."""

    lease: float = 30.0
    """Until a claim expires if not renewed; also the interval of looking for expired claims."""
    beat: float = 5.0
    """Between two renewals; an event loop that is blocked for this long is reported."""
    stuck: float = 60.0
    """A loop blocked for this plus the longest time-out of its running handlers is stuck."""
    nap: float = 5.0
    """Between two polls for due deliveries when no wake-up comes."""
    drain: float = 5.0
    """For running handlers to end when the process stops."""


TIMING: Final = Timing()
_LAST_LINE: Final = 1.0
"""Seconds to log where the loop is stuck, before the process ends."""
_MOST_FRAMES: Final = 20


class Heartbeat:
    """A thread that renews claims, also while a handler blocks the loop, and logs a blocked loop.

    If the loop is stuck in a process that runs our own program, the process ends, as nothing else
    helps: the attempt is lost and counts, and the supervisor starts the program again. In another
    program it is only logged.
    """

    def __init__(
        self,
        store: Store,
        runtime: Runtime,
        running: Callable[[], dict[str, list[str]]],
        timeouts: Mapping[str, float],
        pace: Timing,
    ) -> None:
        self._timeouts = timeouts
        self._store = store
        self._runtime = runtime
        self._running = running
        self._pace = pace
        self._stopped = threading.Event()
        self._turned = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._stopped.clear()
        self._thread = start_thread("receiver-heartbeat", self._beat, loop, threading.get_ident())

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def renew(self) -> list[str]:
        """Renew the claims of running deliveries; return the names of their handlers."""
        running = self._running()
        ids = [delivery_id for held in running.values() for delivery_id in held]
        if ids:
            lease_until = self._runtime.clock() + self._pace.lease
            self._store.renew(self._runtime.owner, ids, lease_until)
        return list(running)

    def _beat(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        silent = 0.0  # counted in beats: a process that was frozen for hours has missed only one
        while True:
            running = self.renew()
            self._turned.clear()
            try:
                loop.call_soon_threadsafe(self._turned.set)
            except RuntimeError:
                return
            if self._stopped.wait(self._pace.beat):
                return
            if self._turned.is_set():
                silent = 0.0
                continue
            silent += self._pace.beat
            log.warning("loop.blocked", seconds=self._pace.beat, running=running)
            longest = max((self._timeouts[name] for name in running), default=0.0)
            if silent - self._pace.beat < self._pace.stuck + longest <= silent:
                self._give_up(loop, thread, silent, running)

    def _give_up(
        self, loop: asyncio.AbstractEventLoop, thread: int, seconds: float, running: list[str]
    ) -> None:
        if is_program(loop):
            end = threading.Timer(_LAST_LINE, os._exit, (1,))  # even if writing the log blocks
            end.daemon = True
            end.start()
        frame = sys._current_frames().get(thread)  # noqa: SLF001 - the documented name
        stack = traceback.format_stack(frame)[-_MOST_FRAMES:] if frame else []
        log.error("loop.stuck", seconds=round(seconds, 3), running=running, stack="".join(stack))
