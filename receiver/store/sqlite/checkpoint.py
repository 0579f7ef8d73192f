"""WAL checkpoints: carry committed pages from the log into the database, beside the writer.

SQLite would do it inside some unlucky commit, which then waits for two more syncs and for all pages
since the last time. In a thread of its own it delays no write. Now and then a commit of the writer
does it too, with the little that is left: only then can the log start again from its beginning.

What was deleted stays in the log until then. An erasure that cannot wait for that has it emptied.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Final

from receiver.model.tasks import start_thread

RESTART: Final = 4_000
"""Pages in the log (16 MB) after which a commit carries the rest, and the log starts again."""
_PERIOD: Final = 0.1
"""Seconds between two checkpoints, while there is something to carry."""
_HELD_UP: Final = 20
"""Milliseconds for which the writer may have to wait while the log is emptied among readers."""


class Checkpointer:
    """Runs until it is closed; `dirty` is set after a commit."""

    def __init__(
        self,
        connect: Callable[[], sqlite3.Connection],
        check: Callable[[], bool] = lambda: True,
        is_sound: Callable[[sqlite3.Connection], bool] = lambda _: True,
        end: Callable[[sqlite3.Connection], None] = sqlite3.Connection.close,
    ) -> None:
        self._is_sound = is_sound
        self._end = end
        self._connection: sqlite3.Connection | None = None
        """Kept, as SQLite uses the descriptors of closed ones again without a look at them."""
        self._is_stale = False
        self._connect = connect
        self._check = check
        self._stopped = threading.Event()
        self.dirty = threading.Event()
        self._wishes: SimpleQueue[threading.Event] = SimpleQueue()
        """Requests to empty the log; each is set when it has been."""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = start_thread("receiver-checkpoint", self._run)

    def close(self) -> None:
        self._stopped.set()
        self.dirty.set()
        if self._thread is not None:
            self._thread.join()
        for wish in _all_of(self._wishes):
            wish.set()  # closing the database carries the rest, and the log is gone

    def empty(self, seconds: float) -> bool:
        """Ask for the log to be emptied; return whether it was within so many seconds."""
        done = threading.Event()
        self._wishes.put(done)
        if self._stopped.is_set():
            return False
        self.dirty.set()
        return done.wait(seconds)

    def renew(self) -> None:
        """Open anew before the next checkpoint, as the writer has done."""
        self._is_stale = True

    def _run(self) -> None:
        self._carry_on()
        self._drop()

    def _carry_on(self) -> None:
        while not self._stopped.is_set():  # asked after `clear`, which may have undone a `close`
            self.dirty.wait()
            if self._stopped.wait(_PERIOD):
                return
            self.dirty.clear()
            if not self._check():
                continue  # the file is gone, and opening would make another
            try:
                self._checkpoint()
            except sqlite3.Error:
                self._is_stale = True  # the writer meets the same trouble, and reports it

    def _checkpoint(self) -> None:
        connection = self._connection
        if connection is None or self._is_stale or not self._is_sound(connection):
            self._drop()
            self._is_stale = False
            connection = self._connection = self._connect()
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        if not self._wishes.empty():
            self._empty(connection)

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._end(connection)

    def _empty(self, connection: sqlite3.Connection) -> None:
        """Try once to carry the rest and cut the log to nothing; readers may be in the way."""
        connection.execute(f"PRAGMA busy_timeout = {_HELD_UP}")
        wishes = list(_all_of(self._wishes))
        [[is_busy, _, _]] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        for wish in wishes:
            if is_busy:
                self._wishes.put(wish)
                self.dirty.set()
            else:
                wish.set()


def _all_of(wishes: SimpleQueue[threading.Event]) -> Iterator[threading.Event]:
    with contextlib.suppress(Empty):
        while True:
            yield wishes.get_nowait()
