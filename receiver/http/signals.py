"""Signal handlers that notice SIGTERM and SIGINT, whichever server runs the app.

A server waits for its connections before it ends the lifespan, but clients that read a stream or
wait for an outcome would wait for that end. So our handler is called first, and then the server's
own, as if ours did not exist. If a signal has no handler, and so ends the process at once, or if
this is not the main thread, nothing is changed. Hypercorn's workers get no signal: their parent
sets an event, which is polled.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

_ENDING: Final = (signal.SIGTERM, signal.SIGINT)

_EVERY: Final = 0.5


def _parents_event() -> Callable[[], bool]:
    """Return a function: whether hypercorn's parent process has asked this worker to stop."""
    module = sys.modules.get("multiprocessing.process")
    process = module.current_process() if module else None
    event = getattr(process, "_kwargs", {}).get("shutdown_event")
    return getattr(event, "is_set", None) or (lambda: False)


class _Link:
    """A signal handler that calls `on_signal`, and then the handler that was set before."""

    def __init__(self, on_signal: Callable[[], None], before: Callable[..., Any]) -> None:
        self.on_signal: Callable[[], None] | None = on_signal
        self.before = before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.on_signal is not None:
            self.on_signal()
        self.before(number, frame)


class Ending:
    """The handlers that call `on_signal` on this loop when a signal asks the process to end."""

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self._on_signal = on_signal
        self._loop = asyncio.get_running_loop()
        self._links: list[tuple[signal.Signals, _Link]] = []

    def listen(self) -> None:
        """Put ours before the present signal handlers; again if a server has set its own since."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _ENDING:
            handler = signal.getsignal(number)
            # A link is ours already, or belongs to another app of ours.
            if callable(handler) and not isinstance(handler, _Link):
                made = (one for kind, one in self._links if kind == number)
                link = next((one for one in made if one.before == handler), None)
                if link is None:
                    link = _Link(self._receive, handler)
                    self._links.append((number, link))
                signal.signal(number, link)  # the same again, if a server restores its own

    async def keep(self) -> None:
        """Keep listening as long as we run: some servers set their handlers after the start."""
        is_stopping = _parents_event()
        while not is_stopping():
            await asyncio.sleep(_EVERY)
            self.listen()
        self._on_signal()

    def stop(self) -> None:
        """Restore the signal handlers; if another was put before ours, ours stays and forwards."""
        for number, link in reversed(self._links):
            before, link.on_signal = link.before, None
            if signal.getsignal(number) is link:
                signal.signal(number, before)
        self._links.clear()

    def _receive(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no request waits
            self._loop.call_soon_threadsafe(self._on_signal)
