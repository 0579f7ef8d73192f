"""An SQLite database for the tests: made once per process, and copied for each test."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from receiver.store.sqlite.engine import SQLiteStore


def lay_out(path: Path) -> None:
    """Copy an empty database with the schema to `path`, if none is there: making one is slow."""
    if path.parent.is_dir() and not path.exists():
        path.touch(0o600)  # as the receiver would make it
        path.write_bytes(_made())


@cache
def _made() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "receiver.db"
        store = SQLiteStore(str(path), lambda _: None)
        store.open()
        store.close()
        return path.read_bytes()
