"""File descriptors of open connections: notice that other code of this process closed them.

A number that was closed is given to the next file that is opened, and SQLite would write there, or
carry the log there and then drop it. So we note the descriptors that a connection has, look at them
around each commit, and do not close a connection that has lost one: that may carry the log.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
import threading
from collections.abc import Callable
from typing import Final, TypeAlias

Identity: TypeAlias = tuple[int, int]

CLOSED: Final = "a file of the database was closed by other code in this process: restart it"

_OPEN: Final = "/dev/fd"
"""Lists the descriptors of this process, where a system has it."""


class Descriptors:
    """The descriptors under the connections to one database; callable from any thread."""

    def __init__(self, path: str) -> None:
        self._paths = (path, f"{path}-wal", f"{path}-shm")
        self._opening = threading.Lock()
        """Held while files of the database are opened, so that we know whose they are."""
        self._under: dict[int, dict[int, tuple[str, Identity]]] = {}
        """By the identity of the connection."""

    def open(self, connect: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
        """Open a connection, and note what is under it."""
        with self._opening:
            before = self._now()
            connection = connect()
            found = self._now()
        new = {fd: found[fd] for fd in found if found[fd] != before.get(fd)}
        self._under[id(connection)] = new
        return connection

    def lost(self, connection: sqlite3.Connection) -> set[str]:
        """Name the files that were closed under a connection."""
        under = self._under.get(id(connection), {})
        return {path for fd, (path, first) in under.items() if identity_of(fd) != first}

    def close(self, connection: sqlite3.Connection) -> None:
        """Close a connection, or keep it for good where a file was closed under it."""
        if self.lost(connection):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # not even the exit closes it
        else:
            connection.close()
        self._under.pop(id(connection), None)

    def _now(self) -> dict[int, tuple[str, Identity]]:
        paths = {file: path for path in self._paths if (file := identity_of(path))}
        try:
            open_now = [int(name) for name in os.listdir(_OPEN)]  # noqa: PTH208 - of numbers
        except OSError:
            return {}
        files = ((fd, identity_of(fd)) for fd in open_now)
        return {fd: (paths[file], file) for fd, file in files if file in paths}


def identity_of(file: str | int) -> Identity | None:
    """Return which file has a name or a descriptor."""
    try:
        found = os.stat(file)  # noqa: PTH116 - a name, as SQLite is given it
    except OSError:
        return None
    return found.st_dev, found.st_ino
