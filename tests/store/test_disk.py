"""A disk that accepts no writes: reported once, nothing stored, and no restart needed after it."""

import asyncio
import errno
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from receiver.model.errors import StoreUnavailable
from receiver.store.inbox import accept_outcome
from tests.forked import run_to_end
from tests.receiving import eventually
from tests.store.parts import NOW, SQLite, arrival, new, pred

pytestmark = pytest.mark.anyio

FULL = "PRAGMA max_page_count = 1"  # SQLite raises it to the current size: no page can be added
READ_ONLY = "PRAGMA query_only = ON"


class Disk:
    """Applies one pragma to every connection, open or opened later."""

    def __init__(self) -> None:
        self._pragma: str | None = None
        self.connections: list[sqlite3.Connection] = []

    def connect(self, connection: sqlite3.Connection) -> sqlite3.Connection:
        if threading.current_thread().name != "receiver-checkpoint":
            self.connections.append(connection)
        if self._pragma is not None:
            connection.execute(self._pragma)
        return connection

    def breaks(self, pragma: str) -> None:
        self._pragma = pragma
        for connection in self.connections:
            with suppress(sqlite3.ProgrammingError):  # already closed: it only created the tables
                connection.execute(pragma)

    def fixes(self) -> None:
        self._pragma = None


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: disk.connect(connect(*a, **k)))
    return disk


@pytest.fixture
def engine(disk: Disk, tmp_path: Path) -> Iterator[SQLite]:  # noqa: ARG001 - patched first
    engine = SQLite(tmp_path / "receiver.db")
    engine.store.open()
    yield engine
    engine.store.close()


def _read_only(path: str, *_: object) -> int:
    raise OSError(errno.EROFS, "Read-only file system", path)


LARGE: dict[str, Any] = {"input": {"prompt": "x" * 200_000}}


@pytest.mark.parametrize(
    ("pragma", "words"), [(FULL, "disk is full"), (READ_ONLY, "readonly database")]
)
async def test_full_or_read_only_disk_is_reported_once_and_writes_resume_later(
    engine: SQLite, disk: Disk, monkeypatch: pytest.MonkeyPatch, pragma: str, words: str
) -> None:
    store = engine.store
    await store.predictions.create(new(1))
    before = engine.dump()
    disk.breaks(pragma)
    monkeypatch.setattr(os, "open", _read_only)  # no file can be opened for writing either

    for number in (2, 3, 4):
        with pytest.raises(StoreUnavailable, match=words):
            await store.predictions.create(new(number, **LARGE))
    answers = await asyncio.gather(
        *(accept_outcome(store, arrival(1, body=b"\xff" * 200_000)) for _ in range(5)),
        return_exceptions=True,
    )
    assert [type(answer) for answer in answers] == [StoreUnavailable] * 5
    assert engine.dump() == before
    assert (await store.predictions.get(pred(1))) is not None  # stored rows can be read
    [report] = engine.reports
    assert words in str(report)

    disk.fixes()
    assert (await accept_outcome(store, arrival(1))).verdict == "accepted"
    await store.predictions.create(new(5, **LARGE))
    assert engine.reports[1:] == [None]


async def test_second_disk_failure_is_reported_again(engine: SQLite, disk: Disk) -> None:
    for _ in range(2):
        disk.connections[:] = disk.connections[-1:]
        disk.breaks(READ_ONLY)
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                await engine.store.try_write(NOW)
        disk.fixes()
        await engine.store.try_write(NOW)
    assert [report is None for report in engine.reports] == [False, True, False, True]


async def test_failed_write_without_a_caller_leaves_the_writer_running(
    engine: SQLite, disk: Disk
) -> None:
    disk.breaks(READ_ONLY)
    engine.store.renew("me", [], NOW)
    [report] = await eventually(lambda: engine.reports)
    assert "readonly database" in str(report)
    disk.fixes()
    await engine.store.try_write(NOW)
    assert engine.reports == [report, None]


@pytest.mark.parametrize("trouble", [sqlite3.OperationalError, sqlite3.DatabaseError])
async def test_read_error_raises_store_unavailable_until_a_new_connection_can_read(
    engine: SQLite, monkeypatch: pytest.MonkeyPatch, trouble: type[sqlite3.Error]
) -> None:
    broken = False

    class Reading(sqlite3.Connection):
        has_failed = False

        def execute(self, sql: str, params: Any = (), /) -> sqlite3.Cursor:
            self.has_failed = self.has_failed or broken
            if self.has_failed:
                raise trouble("disk I/O error")
            return super().execute(sql, params)

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Reading, **k))
    await engine.store.predictions.create(new(1))
    for broken in (True, False, True, False):
        for _ in range(4):
            if broken:
                with pytest.raises(StoreUnavailable, match="cannot be read"):
                    await engine.store.predictions.get(pred(1))
            else:
                assert await engine.store.predictions.get(pred(1)) is not None


LIMITED = """
import asyncio, resource, sys
from receiver.model.errors import StoreUnavailable
from receiver.store.sqlite.engine import SQLiteStore
from receiver.store.predictions import NewPrediction

reports = []
store = SQLiteStore(sys.argv[1], reports.append)
store.open()

def new(number):
    return NewPrediction(id=f"pred_{number:032d}", provider="fal", model="m", mode="queue",
                         input={"prompt": "x" * 300_000}, metadata={}, created_at=1.0)

async def main():
    await store.predictions.create(new(0))
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    for number in (1, 2, 3):
        try:
            await store.predictions.create(new(number))
        except StoreUnavailable:
            continue
        sys.exit("a file that may not grow has grown")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    await store.predictions.create(new(4))

asyncio.run(main())
store.close()
print([report is None for report in reports])
"""


def test_file_size_limit_fails_writes_like_a_full_disk_until_raised(tmp_path: Path) -> None:
    path = tmp_path / "receiver.db"
    done = run_to_end(["-c", LIMITED, str(path)], tmp_path, os.environ)
    assert done.stderr == ""
    assert done.stdout == "[False, True]\n"
    engine = SQLite(path)
    engine.store.open()
    engine.store.close()
    assert engine.rows("SELECT id FROM predictions ORDER BY id") == [(pred(0),), (pred(4),)]
    assert engine.rows("PRAGMA integrity_check") == [("ok",)]
