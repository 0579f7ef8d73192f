"""Carry committed pages from the write-ahead log into the database, beside the writer.

SQLite would do it inside some unlucky commit, which then waits for two more syncs and all the pages
since the last time. From a thread of its own it holds up nobody. The writer's own connection keeps a
far higher limit, so that the log stays bounded if this thread cannot keep up.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from typing import Final

LAST_RESORT: Final = 16_000
"""Pages in the log (64 MB) at which a commit does the work after all."""
_PERIOD: Final = 0.5
"""Seconds between two checkpoints, while there is something to carry."""


class Checkpointer:
    """Runs until it is closed; `dirty` tells it that there was a commit."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._stopped = threading.Event()
        self.dirty = threading.Event()
        self._thread = threading.Thread(target=self._run, name="receiver-checkpoint", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopped.set()
        self.dirty.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while self.dirty.wait() and not self._stopped.wait(_PERIOD):
            self.dirty.clear()
            try:
                self._checkpoint()
            except sqlite3.Error:
                continue  # the writer meets the same trouble, and reports it

    def _checkpoint(self) -> None:
        connection = self._connect()
        try:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        finally:
            connection.close()
