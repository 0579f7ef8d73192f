from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from receiver.store.facade import Store
from tests.postgres import Database
from tests.store.parts import Engine, Postgres, SQLite, watch

__all__ = ["watch"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Open a fresh store of every engine in turn, where the engine does not matter."""
    names = set(metafunc.fixturenames)
    if "engine" in names and not names & {"watch", "in_one_process"}:
        contract = any(mark.name == "both_engines" for mark in metafunc.definition.iter_markers())
        metafunc.parametrize(
            "engine", ["sqlite", "postgres"] if contract else ["sqlite"], indirect=True
        )


@pytest.fixture
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    if "watch" in request.fixturenames:
        request.getfixturevalue("watch")  # from its opening on
    made: Engine = SQLite(tmp_path / "receiver.db")
    if getattr(request, "param", "sqlite") == "postgres":
        found: Database = request.getfixturevalue("database")
        made = Postgres(found)
    await made.store.start()
    yield made
    await made.store.stop()


@pytest.fixture
def in_one_process() -> None:
    """Mark what holds only where no other process can be at work."""


@pytest.fixture
def store(engine: Engine) -> Store:
    return engine.store
