"""The end of this process: signals, and a time limit on stopping whatever its tasks do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from types import FrameType
from typing import Any, Final, TypeVar

from receiver.deliveries import containment
from receiver.model.tasks import start_thread
from receiver.observability import logging as logs

T = TypeVar("T")

LONGEST_STOP: Final = 9.5
"""Seconds after which we end whatever hangs: what is stored is left to the next start."""
_LATER: Final = 0.3
"""Seconds by which the system's limit is longer than our own."""
_LOOK: Final = 0.5
"""Seconds between two checks that signals still reach us."""
LINGER: Final = 1.0
"""Seconds after everything is stored in which hanging tasks may still end by themselves."""


class _Limit:
    """A time limit after which this process ends, whatever its loop and its tasks do."""

    def __init__(self) -> None:
        self._armed = threading.Lock()
        self._watches = False

    def watch(self) -> None:
        """Start the thread: a signal handler, where the limit is armed, cannot start one."""
        if not self._watches:
            self._watches = True
            self._armed.acquire()
            start_thread("receiver-limit", self._end)

    def arm(self) -> None:
        """Start the time limit; by the system too, as code in C may let no thread of ours run."""
        try:
            self._armed.release()
        except RuntimeError:  # armed already, or not watched
            return
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LONGEST_STOP + _LATER)

    def _end(self) -> None:
        self._armed.acquire()
        time.sleep(LONGEST_STOP)
        _end(1)


LIMIT: Final = _Limit()


def run(main: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Run a program to its end; what hangs after it is ended by the time limit."""
    LIMIT.watch()

    async def limited() -> T:
        try:
            return await main
        finally:
            LIMIT.arm()

    return containment.run(limited(), loop)


def keep_signals(stop: Callable[[int, FrameType | None], Any]) -> None:
    """Set the handler of SIGINT and SIGTERM, also where plugin code has replaced it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != stop:
            signal.signal(number, stop)


@asynccontextmanager
async def stop_signal() -> AsyncIterator[asyncio.Event]:
    """Yield an event that is set when a signal asks this process to stop."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop(_number: int, _frame: FrameType | None) -> None:
        LIMIT.arm()  # the loop may be stuck
        loop.call_soon_threadsafe(stopping.set)

    async def keep() -> None:
        while True:
            keep_signals(stop)
            await asyncio.sleep(_LOOK)

    keeping = asyncio.create_task(keep())
    try:
        yield stopping
    finally:
        keeping.cancel()


def exit_after(seconds: float, code: int) -> None:
    """End this process after so many seconds, whatever its tasks do."""
    timer = threading.Timer(seconds, _end, (code,))
    timer.daemon = True
    timer.start()


def _end(code: int) -> None:
    """Write the last log lines, and end this process at once."""
    logs.flush()
    os._exit(code)
