from __future__ import annotations

import gc
import os
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractAsyncContextManager
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
    max_examples=40,  # enough to find a slip on most runs, few enough to run always
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # as a busy machine is
)
hypothesis.settings.load_profile("tests")


def pytest_xdist_auto_num_workers() -> int:
    """Run two more than there are cores, as many tests wait; but each costs seconds to start."""
    return min(2 + (os.cpu_count() or 1), 4)


LONG = (
    "tests/journey/",
    "tests/http/test_openapi.py",
    "tests/cli/test_cli.py",
    "tests/cli/test_tail.py",
    "tests/test_mounting.py",
    "tests/test_typescript.py",
)
"""Where tests take many seconds, most of which they wait."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long ones, in whatever order they are: they must not come last of all."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Let no garbage collection look at modules and tests: it was a third of what tests cost."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def network() -> Network:
    return Network()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run receivers on each engine in turn, where the engine does not matter."""
    names = set(metafunc.fixturenames)
    on_both = any(mark.name == "both_engines" for mark in metafunc.definition.iter_markers())
    if "start" in names and on_both and not names & {"disk", "on_sqlite"}:
        metafunc.parametrize("start", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def stops_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a submit that hangs a shorter moment to be answered when its receiver stops."""
    monkeypatch.setattr(submitter, "_LAST_WORD", 0.05)


@pytest.fixture
def on_sqlite() -> None:
    """Mark what is about SQLite, or moves the clock, which PgQueuer's on the server would not."""


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: Path, network: Network) -> Start:
    """Run receivers, one after another, on one database and one network."""
    database: Path | Database = tmp_path / "receiver.db"
    if getattr(request, "param", "sqlite") == "postgres":
        database = request.getfixturevalue("database")

    def start(*handlers: Callable[..., Any], **given: Any) -> AbstractAsyncContextManager[Station]:
        return receiving(database, network, handlers, **given)

    return start


def log_plainly() -> None:
    """Print log lines as they are: to lay them out for a terminal takes longer than the tests."""
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
    """Collect what is logged, whatever an earlier test configured."""
    log_plainly()
    for module in list(sys.modules.values()):
        if isinstance(log := vars(module).get("log"), BoundLoggerLazyProxy):
            vars(log).pop("bind", None)  # where structlog keeps what it caches
    with capture_logs([structlog.contextvars.merge_contextvars]) as lines:
        yield lines


class Disk:
    """What stands below the store: it can be slow, and it can be full."""

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
    """Put a disk that obeys the test under every connection."""
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
