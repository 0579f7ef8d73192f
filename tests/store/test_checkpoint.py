"""The WAL checkpoint thread: it copies pages, survives errors and always ends."""

import sqlite3
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from receiver.store.sqlite.checkpoint import Checkpointer
from tests.patience import PATIENCE


def ends(checkpointer: Checkpointer) -> bool:
    closing = threading.Thread(target=checkpointer.close, daemon=True)
    closing.start()
    closing.join(PATIENCE)
    return not closing.is_alive()


def test_checkpoint_copies_pages_from_the_wal_into_the_database(tmp_path: Path) -> None:
    path = tmp_path / "c.db"
    writing = sqlite3.connect(path, isolation_level=None)
    writing.execute("PRAGMA journal_mode = WAL")
    writing.execute("CREATE TABLE t (a)")
    before = path.stat().st_size
    checkpointer = Checkpointer(lambda: sqlite3.connect(path, check_same_thread=False))
    checkpointer.start()
    writing.execute("INSERT INTO t VALUES (?)", (b"x" * 100_000,))
    checkpointer.dirty.set()
    ends_at = time.monotonic() + PATIENCE
    while path.stat().st_size <= before + 100_000:
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    writing.close()
    assert ends(checkpointer)


def test_checkpoint_thread_tries_again_after_a_disk_error() -> None:
    tries = threading.Semaphore(0)

    def connect() -> sqlite3.Connection:
        tries.release()
        raise sqlite3.OperationalError("unable to open database file")

    checkpointer = Checkpointer(connect)
    checkpointer.start()
    for _ in range(2):
        checkpointer.dirty.set()
        assert tries.acquire(timeout=PATIENCE)
    assert ends(checkpointer)


def test_close_just_before_the_thread_clears_its_event_is_not_missed(tmp_path: Path) -> None:
    closed: list[bool] = []
    called = threading.Event()

    class Raced(threading.Event):
        """An event that `close` sets just before the thread clears it."""

        def clear(self) -> None:
            closing.start()
            assert called.wait(PATIENCE)
            super().clear()

        def set(self) -> None:
            super().set()
            if threading.current_thread() is closing:
                called.set()

    checkpointer = Checkpointer(lambda: sqlite3.connect(tmp_path / "c.db"))
    checkpointer.dirty = Raced()

    def close() -> None:
        checkpointer.close()
        closed.append(True)

    closing = threading.Thread(target=close, daemon=True)
    checkpointer.start()
    checkpointer.dirty.set()
    assert called.wait(PATIENCE)
    closing.join(PATIENCE)
    assert closed == [True]


def test_checkpointer_that_never_started_can_be_closed() -> None:
    assert ends(Checkpointer(lambda: sqlite3.connect(":memory:")))


class Failing(sqlite3.Connection):
    """A connection that fails to truncate the log, once with each error in `troubles`."""

    troubles: ClassVar[list[str]]

    def execute(self, sql: str, params: Any = (), /) -> sqlite3.Cursor:
        if "TRUNCATE" in sql and self.troubles:
            raise sqlite3.OperationalError(self.troubles.pop())
        return super().execute(sql, params)


def test_wal_is_emptied_after_a_first_failed_attempt(tmp_path: Path) -> None:
    class Connection(Failing):
        troubles: ClassVar = ["database or disk is full"]

    checkpointer = Checkpointer(
        lambda: sqlite3.connect(tmp_path / "c.db", check_same_thread=False, factory=Connection)
    )
    checkpointer.start()
    assert checkpointer.empty(PATIENCE)
    assert not Connection.troubles
    assert ends(checkpointer)


def test_waiting_for_an_empty_wal_ends_when_the_checkpointer_closes() -> None:
    def connect() -> sqlite3.Connection:
        raise sqlite3.OperationalError("unable to open database file")

    checkpointer = Checkpointer(connect)
    checkpointer.start()
    assert not checkpointer.empty(0.0)
    answered: list[bool] = []
    waiting = threading.Thread(target=lambda: answered.append(checkpointer.empty(PATIENCE)))
    waiting.start()
    assert ends(checkpointer)
    waiting.join(PATIENCE / 2)
    assert len(answered) == 1
    assert not checkpointer.empty(PATIENCE)
