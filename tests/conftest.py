from __future__ import annotations

import gc
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractAsyncContextManager
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, flock
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog
from structlog._config import BoundLoggerLazyProxy
from structlog.testing import capture_logs

from receiver.predictions import submitter
from tests.patience import PATIENCE
from tests.postgres import Database, bare_database, database, lasting_database, server
from tests.receiving import Network, Station, receiving

__all__ = ["bare_database", "database", "lasting_database", "server"]

Start = Callable[..., AbstractAsyncContextManager[Station]]
Logged = list[MutableMapping[str, Any]]


hypothesis.settings.register_profile(
    "tests",
    max_examples=40,  # enough to find an error in most runs, few enough for every run
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine is slow
)
hypothesis.settings.load_profile("tests")


def pytest_xdist_auto_num_workers() -> int:
    """Return two more than the cores, as many tests wait; at most 4, as each starts slowly."""
    return min(2 + (os.cpu_count() or 1), 4)


LONG = (
    "tests/journey/",
    "tests/http/test_openapi.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_tail.py",
    "tests/test_mounting.py",
    "tests/test_typescript.py",
)
"""Tests that take many seconds, mostly waiting."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Let one worker compile the tests while the others wait: each would do all of it."""
    with Path(__file__).open(encoding="utf-8") as lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            flock(lock, LOCK_SH)
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the long tests first, so that none of them starts last."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Make garbage collection rare, and exclude modules and tests: it took a third of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def network() -> Network:
    return Network()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests marked `both_engines` on each engine, except those with SQLite's fixtures."""
    names = set(metafunc.fixturenames)
    on_both = any(mark.name == "both_engines" for mark in metafunc.definition.iter_markers())
    if "start" in names and on_both and not names & {"disk", "on_sqlite"}:
        metafunc.parametrize("start", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def stops_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time for which a stopping receiver waits for the answer to a submit."""
    monkeypatch.setattr(submitter, "_STOP_WAIT", 0.05)


@pytest.fixture
def on_sqlite() -> None:
    """Mark a test of SQLite only, or one that moves the clock, which PgQueuer's does not follow."""


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path, network: Network) -> Start:
    """Return a function that runs a receiver, always on the same database and network."""
    database: Path | Database = tmp_path / "receiver.db"
    if getattr(request, "param", "sqlite") == "postgres":
        database = request.getfixturevalue("database")

    def start(*handlers: Callable[..., Any], **given: Any) -> AbstractAsyncContextManager[Station]:
        return receiving(database, network, handlers, **given)

    return start


def log_plainly() -> None:
    """Print log lines unformatted: formatting for a terminal takes longer than the tests."""
    structlog.reset_defaults()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["level", "event"]),
        ]
    )


log_plainly()


@pytest.fixture
def logged() -> Iterator[Logged]:
    """Collect the log lines, whatever an earlier test configured."""
    log_plainly()
    for name, module in list(sys.modules.items()):
        if name.startswith("receiver") and isinstance(
            log := vars(module).get("log"), BoundLoggerLazyProxy
        ):
            vars(log).pop("bind", None)  # structlog's cache
    with capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        yield lines


class Disk:
    """A simulated disk below SQLite, which can be slow or full."""

    def __init__(self) -> None:
        self.may_commit = threading.Event()
        self.may_commit.set()
        self.commits_waiting = threading.Event()
        self.full = False

    def before(self, sql: str) -> None:
        if self.full and sql.startswith(("BEGIN", "COMMIT")):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        if sql == "COMMIT" and not self.may_commit.is_set():
            self.commits_waiting.set()
            assert self.may_commit.wait(PATIENCE)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Put every SQLite connection on a disk that the test controls."""
    disk = Disk()

    class Connection(sqlite3.Connection):
        def execute(self, sql: str, *params: Any) -> sqlite3.Cursor:
            disk.before(sql)
            return super().execute(sql, *params)

    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3, "connect", lambda *args, **more: connect(*args, factory=Connection, **more)
    )
    yield disk
    disk.may_commit.set()
