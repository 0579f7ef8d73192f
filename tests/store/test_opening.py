"""Opening a SQLite file: one process per file, migrations, permissions, and clear errors."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.store.inbox import accept_outcome
from receiver.store.schema import migrations
from receiver.store.sqlite.engine import SQLiteStore
from receiver.store.statement import Statement
from tests.store.parts import TABLES, SQLite, arrival, copy, dump, ended, new, pred

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "receiver.db"


def opened(path: Path) -> SQLite:
    engine = SQLite(path)
    engine.store.open()
    return engine


def version(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        number: int = connection.execute("PRAGMA user_version").fetchone()[0]
        return number


async def test_data_is_unchanged_after_the_store_is_reopened(path: Path) -> None:
    first = opened(path)
    await ended(first.store, 1, "greet")
    before = first.dump()
    first.store.close()

    second = opened(path)
    assert second.dump() == before
    assert (await accept_outcome(second.store, arrival(1))).verdict == "duplicate"
    second.store.close()


@pytest.mark.parametrize("mode", [None, 0o640])
def test_new_file_is_for_its_owner_only_and_an_existing_mode_is_kept(
    path: Path, mode: int | None
) -> None:
    """It contains prompts and pictures; an operator who creates it beforehand chooses its mode."""
    if mode is not None:
        path.touch(mode)
        path.chmod(mode)
    engine = opened(path)
    modes = {file.stat().st_mode & 0o777 for file in path.parent.glob(f"{path.name}-*")}
    assert {path.stat().st_mode & 0o777, *modes} == {mode or 0o600}
    engine.store.close()


async def test_missing_folder_is_created(tmp_path: Path) -> None:
    engine = opened(tmp_path / "a" / "b" / "receiver.db")
    assert (await engine.store.predictions.create(new(1))).is_new
    engine.store.close()


def test_schema_is_created_by_all_migrations_once(path: Path) -> None:
    opened(path).store.close()
    assert version(path) == len(migrations("sqlite"))
    opened(path).store.close()
    assert dump(path) == {table: [] for table in TABLES}


def test_migration_killed_at_any_statement_completes_at_the_next_open(
    path: Path, tmp_path: Path
) -> None:
    copies: list[Path] = []

    def keep(_: str) -> None:
        copies.append(tmp_path / "killed" / f"{len(copies)}.db")
        copy(path, copies[-1])

    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.set_trace_callback(keep)
        for number, script in enumerate(migrations("sqlite"), 1):
            connection.executescript(f"BEGIN;{script};PRAGMA user_version = {number};COMMIT;")
        connection.set_trace_callback(None)

    assert len(copies) > 10
    for killed in copies:
        assert version(killed) < len(migrations("sqlite"))
        opened(killed).store.close()
        assert version(killed) == len(migrations("sqlite"))


def test_database_of_a_newer_receiver_is_rejected_and_left_unchanged(path: Path) -> None:
    opened(path).store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 999")
    before = path.read_bytes()
    for _ in range(2):  # the first attempt must release its lock
        with pytest.raises(
            StoreUnusable,
            match=rf"newer receiver \(schema 999, this one knows {len(migrations('sqlite'))}\)",
        ):
            SQLite(path).store.open()
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"This is a diary, no database.\n" * 100, b"\0" * 4096])
def test_file_that_is_not_a_database_is_rejected_and_left_unchanged(
    path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    for _ in range(2):  # the first attempt must release its lock
        with pytest.raises(StoreUnusable, match=r"not a database.*RECEIVER_DATABASE_URL"):
            SQLite(path).store.open()
    assert path.read_bytes() == content


@pytest.mark.parametrize("place", ["", "file/receiver.db"])
def test_path_that_cannot_be_a_database_file_is_rejected(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnusable, match="cannot open the database"):
        SQLite(tmp_path / place).store.open()


def test_second_store_on_a_file_is_rejected_until_the_first_is_closed(path: Path) -> None:
    first = opened(path)
    with pytest.raises(StoreUnusable, match="in use by another receiver"):
        SQLite(path).store.open()
    first.store.close()
    opened(path).store.close()


HOLD = """
import sys
from receiver.store.sqlite.engine import SQLiteStore
store = SQLiteStore(sys.argv[1], lambda _: None)
store.open()
print("open", flush=True)
sys.stdin.read()
"""


def test_second_process_is_rejected_with_the_pid_of_the_first_until_it_dies(
    path: Path,
) -> None:
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        with pytest.raises(StoreUnusable) as refused:
            SQLite(path).store.open()
        assert f"(process {first.pid})" in str(refused.value)
        assert str(path) in str(refused.value)
        assert "RECEIVER_DATABASE_URL" in str(refused.value)
        first.kill()
        first.wait()
    opened(path).store.close()


def test_lock_file_without_a_pid_still_locks_the_database(path: Path) -> None:
    first = opened(path)
    path.with_name("receiver.db.lock").write_bytes(b"")
    with pytest.raises(StoreUnusable, match=r"\(process unknown\)"):
        SQLite(path).store.open()
    first.store.close()


def test_store_uses_wal_synchronous_full_and_foreign_keys(path: Path) -> None:
    """The answer 200 promises that a callback is on disk; it depends on these pragmas."""
    seen: list[tuple[str, int, int]] = []
    connect = sqlite3.connect

    class Asked(sqlite3.Connection):
        def close(self) -> None:
            seen.append(
                tuple(
                    self.execute(f"PRAGMA {name}").fetchone()[0]
                    for name in ("journal_mode", "synchronous", "foreign_keys")
                )
            )
            super().close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Asked, **k))
        store = SQLiteStore(str(path), lambda _: None)
        store.open()
        store.close()
    assert seen == [("wal", 2, 1)]


async def test_statement_that_writes_fails_on_a_reading_connection(path: Path) -> None:
    engine = opened(path)
    await engine.store.predictions.create(new(1))
    before = engine.dump()
    with pytest.raises(StoreUnavailable, match="cannot be read: attempt to write a readonly"):
        await engine.store.read(Statement("UPDATE predictions SET input = 'other'"))
    assert engine.dump() == before
    assert (await engine.store.predictions.get(pred(1))) is not None
    engine.store.close()
