"""File descriptors of open connections: detects that other code of this process closed them.

The next file that is opened gets the number of a closed descriptor, and SQLite would write to that
file, or copy the log into it and then delete the log. So we record the descriptors of a connection,
check them around each commit, and do not close a connection that has lost one: closing may copy the
log.
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
"""The folder that lists the descriptors of this process, if the system has it."""


class Descriptors:
    """The descriptors of the connections to one database; callable from any thread."""

    def __init__(self, path: str) -> None:
        self._paths = (path, f"{path}-wal", f"{path}-shm")
        self._opening = threading.Lock()
        """Held while a connection is opened, so that new descriptors can only be its own."""
        self._under: dict[int, dict[int, tuple[str, Identity]]] = {}
        """The path and file of each descriptor, by the `id` of its connection."""

    def open(self, connect: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
        """Open a connection, and record its descriptors."""
        with self._opening:
            before = self._now()
            connection = connect()
            found = self._now()
        new = {fd: found[fd] for fd in found if found[fd] != before.get(fd)}
        self._under[id(connection)] = new
        return connection

    def lost(self, connection: sqlite3.Connection) -> set[str]:
        """Return the files of a connection that other code has closed."""
        under = self._under.get(id(connection), {})
        return {path for fd, (path, first) in under.items() if identity_of(fd) != first}

    def close(self, connection: sqlite3.Connection) -> None:
        """Close a connection, or keep it for good if it has lost a file."""
        if self.lost(connection):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # the exit does not close it
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
    """Return the identity of the file with a name or a descriptor; None: there is none."""
    try:
        found = os.stat(file)  # noqa: PTH116 - a name, as SQLite is given it
    except OSError:
        return None
    return found.st_dev, found.st_ino
