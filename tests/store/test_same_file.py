"""A database that is removed, replaced or truncated under a running receiver is detected."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest

from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.store.leases import LeaseRequest
from receiver.store.sqlite.descriptors import CLOSED, Descriptors
from receiver.store.sqlite.engine import SQLiteStore, _SameFile
from tests.conftest import Logged
from tests.forked import Forked
from tests.patience import PATIENCE
from tests.receiving import eventually

pytestmark = pytest.mark.anyio


async def test_writes_are_rejected_until_the_moved_file_is_back(tmp_path: Path) -> None:
    reports: list[StoreUnavailable | None] = []
    path = tmp_path / "receiver.db"
    store = SQLiteStore(str(path), reports.append)
    store.open()
    try:
        await store.try_write(1.0)
        away = path.rename(tmp_path / "away.db")
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            await _probe_until_refused(store)
        assert not path.exists()  # no new file was created
        away.rename(path)
        await store.try_write(3.0)
        assert [report is None for report in reports] == [False, True]
    finally:
        store.close()


@pytest.mark.parametrize(
    "lost", [["-wal"], ["-shm"], ["-wal", "-shm"], ["", "-wal", "-shm"], [""]], ids="+".join
)
@pytest.mark.parametrize("way", ["removed", "replaced"])
async def test_writes_fail_and_data_is_saved_if_database_files_are_lost(
    tmp_path: Path, logged: Logged, lost: list[str], way: str
) -> None:
    path = tmp_path / "receiver.db"
    store = SQLiteStore(str(path), lambda _: None)
    store.open()
    try:
        await store.leases.hold(role("kept"))
        for name in lost:
            file = tmp_path / f"receiver.db{name}"
            content = file.read_bytes()
            file.unlink()
            if way == "replaced":
                file.write_bytes(content)
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="removed or replaced"):
                await store.leases.hold(role("refused"))
        told = await eventually(lambda: [one for one in logged if one["event"] == "store.saved"])
        with closing(sqlite3.connect(told[0]["file"])) as saved:
            assert ("kept",) in saved.execute("SELECT name FROM leases").fetchall()
            assert saved.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert len(told) == 1
    finally:
        store.close()


@pytest.mark.parametrize(
    ("cut", "left"),
    [("receiver.db", 0), *(("receiver.db-wal", left) for left in (0, 20, 32, 5_000, -1))],
)
async def test_writes_fail_after_a_file_was_truncated(tmp_path: Path, cut: str, left: int) -> None:
    store = SQLiteStore(str(tmp_path / "receiver.db"), lambda _: None)
    store.open()
    try:
        await store.leases.hold(role("kept"))
        size = (tmp_path / cut).stat().st_size
        os.truncate(tmp_path / cut, left % size)
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match=f"{cut}.* was cut"):
                await store.leases.hold(role("refused"))
    finally:
        store.close()


@pytest.mark.parametrize("left", [b"\0" * 8192, b"\x37\x7f\x06\x82", b"x" * 40])
async def test_wal_without_a_valid_header_after_a_power_failure_is_restarted(
    tmp_path: Path, left: bytes
) -> None:
    for _ in range(2):
        (tmp_path / "receiver.db-wal").write_bytes(left)
        store = SQLiteStore(str(tmp_path / "receiver.db"), lambda _: None)
        store.open()
        try:
            await store.leases.hold(role("kept"))
        finally:
            store.close()


async def test_concurrent_checks_of_a_growing_wal_report_no_truncation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer and the checkpointer check it from two threads."""
    wal = tmp_path / "receiver.db-wal"
    store = SQLiteStore(str(tmp_path / "receiver.db"), lambda _: None)
    store.open()
    try:
        await store.leases.hold(role("begun"))
        file, fstat = _SameFile(str(tmp_path / "receiver.db")), os.fstat
        file.remember()

        def grown_meanwhile(fd: int) -> os.stat_result:
            found = fstat(fd)
            monkeypatch.setattr(os, "fstat", fstat)
            os.truncate(wal, found.st_size + 4_096)
            assert file.check()
            return found

        monkeypatch.setattr(os, "fstat", grown_meanwhile)
        assert file.check()
        assert os.fstat is fstat
    finally:
        store.close()


async def test_removed_lock_file_is_locked_again_or_writes_fail(tmp_path: Path) -> None:
    path, lock = tmp_path / "receiver.db", tmp_path / "receiver.db.lock"
    stores = [SQLiteStore(str(path), lambda _: None) for _ in range(3)]
    stores[0].open()
    try:
        lock.unlink()
        await stores[0].leases.hold(role("kept"))
        with pytest.raises(StoreUnusable, match="in use by another receiver"):
            stores[1].open()
        lock.unlink()
        stores[2].open()
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="in use by another receiver"):
                await stores[0].leases.hold(role("refused"))
        await stores[2].leases.hold(role("kept too"))
        stores[2].close()
        await stores[0].leases.hold(role("kept again"))
    finally:
        for store in stores:
            store.close()


@pytest.mark.parametrize("reuse", ["nothing", "another file", "the database"])
@pytest.mark.parametrize("lost", [["-wal"], ["-shm"], [""], ["", "-wal", "-shm"]], ids="+".join)
async def test_descriptor_closed_by_other_code_loses_no_committed_write(
    tmp_path: Path, lost: list[str], reuse: str
) -> None:
    """Runs in a child process, as the files that get the closed descriptors stay open."""
    command = [str(DESCRIPTORS), str(tmp_path / "receiver.db"), reuse, *lost]
    out, err = tmp_path / "out", tmp_path / "err"
    process = Forked(command, tmp_path, os.environ, out, err)
    assert process.wait(PATIENCE) == 9, err.read_text()
    promised, refused = json.loads(out.read_text())
    with closing(sqlite3.connect(tmp_path / "receiver.db")) as left:
        kept = {name for (name,) in left.execute("SELECT name FROM leases")}
        assert left.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert set(promised) <= kept
    assert len(promised) >= (5 if "-shm" in lost else 25)
    assert ("-shm" in lost) == bool(refused)
    assert set(refused) <= {CLOSED}


async def test_writes_fail_after_a_commit_into_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[StoreUnavailable | None] = []
    store = SQLiteStore(str(tmp_path / "receiver.db"), reports.append)
    store.open()
    try:
        await store.leases.hold(role("kept"))
        answers = iter([set(), {"receiver.db-wal"}])  # before the commit, and after
        monkeypatch.setattr(Descriptors, "lost", lambda *_: next(answers, set()))
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match="was closed by other code"):
                await store.leases.hold(role("refused"))
        assert [str(report) for report in reports] == [CLOSED]
    finally:
        store.close()


DESCRIPTORS: Final = Path(__file__).with_name("descriptors.py")


def role(name: str) -> LeaseRequest:
    return LeaseRequest(name=name, owner="me", now=1.0, until=2.0)


async def _probe_until_refused(store: SQLiteStore) -> None:
    """Write until it fails: the checkpointer checks after a commit, ten times a second."""
    async with asyncio.timeout(PATIENCE):
        while True:
            await store.try_write(2.0)
            await asyncio.sleep(0.01)
