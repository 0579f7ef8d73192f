"""WAL checkpoints: copy committed pages from the log into the database, in a separate thread.

SQLite alone would do it inside a commit, which then waits for two more syncs and for all pages
since the last checkpoint. In a separate thread it delays no write. Occasionally a commit of the
writer does it too, with the few remaining pages: only then can the log restart at its beginning.

Deleted content stays in the log until then. An erasure that cannot wait has the log emptied.
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
"""Pages in the log (16 MB) after which a commit copies the rest, and the log restarts."""
_PERIOD: Final = 0.1
"""Seconds between two checkpoints, while there are pages to copy."""
_HELD_UP: Final = 20
"""Milliseconds for which emptying the log waits for readers, which may delay the writer."""


class Checkpointer:
    """The checkpoint thread, which runs until it is closed; `dirty` is set after a commit."""

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
        """Kept open, as SQLite reuses the descriptors of closed ones without checking them."""
        self._is_stale = False
        self._connect = connect
        self._check = check
        self._stopped = threading.Event()
        self.dirty = threading.Event()
        self._wishes: SimpleQueue[threading.Event] = SimpleQueue()
        """Requests to empty the log; each is set when the log is empty."""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = start_thread("receiver-checkpoint", self._run)

    def close(self) -> None:
        self._stopped.set()
        self.dirty.set()
        if self._thread is not None:
            self._thread.join()
        for wish in _all_of(self._wishes):
            wish.set()  # closing the database copies the rest and deletes the log

    def empty(self, seconds: float) -> bool:
        """Request that the log be emptied; return whether it was within `seconds`."""
        done = threading.Event()
        self._wishes.put(done)
        if self._stopped.is_set():
            return False
        self.dirty.set()
        return done.wait(seconds)

    def renew(self) -> None:
        """Reopen the connection before the next checkpoint, as the writer has done."""
        self._is_stale = True

    def _run(self) -> None:
        self._carry_on()
        self._drop()

    def _carry_on(self) -> None:
        while not self._stopped.is_set():  # after `clear`, which may have undone the set of `close`
            self.dirty.wait()
            if self._stopped.wait(_PERIOD):
                return
            self.dirty.clear()
            if not self._check():
                continue  # the file is missing, and opening would create another
            try:
                self._checkpoint()
            except sqlite3.Error:
                self._is_stale = True  # the writer gets the same error, and reports it

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
        """Try once to copy the rest and truncate the log; readers, or an error, may prevent it."""
        connection.execute(f"PRAGMA busy_timeout = {_HELD_UP}")
        wishes = list(_all_of(self._wishes))
        is_busy = True
        try:
            [[is_busy, _, _]] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
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
