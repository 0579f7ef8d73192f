import os
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from receiver.store.facade import Store
from tests.pgbouncer import pgbouncer, variants
from tests.postgres import Database
from tests.store.parts import WITH_CLOCK, Engine, Postgres, SQLite, watch

__all__ = ["watch"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of any engine once for each of its engines, with a fresh store each time."""
    names = set(metafunc.fixturenames)
    if "engine" in names and not names & {"watch", "in_one_process"}:
        marks = {mark.name for mark in metafunc.definition.iter_markers()}
        found = engines(marks)
        if "on_postgres" in names:
            found = [name for name in found if name != "sqlite"]
        metafunc.parametrize("engine", found, indirect=True)


def engines(marks: set[str]) -> list[str]:
    """Return the engines of a test; TEST_POOLER=1 runs all tests of both through a pooler."""
    if "both_engines" not in marks:
        return ["sqlite"]
    if os.environ.get("TEST_POOLER"):
        return POOLED
    return ["sqlite", "postgres", *(POOLED if "pooled" in marks else ())]


POOLED = [f"pooled-{number}" for number in range(len(variants()))]
"""PostgreSQL through PgBouncer in transaction mode, one for each variant of its settings."""


@pytest.fixture(scope="session")
def poolers(
    lasting_database: Database, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Yield the URL of the lasting database through each pooler."""
    query = f"SET search_path = {WITH_CLOCK}"
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                pgbouncer(
                    tmp_path_factory.mktemp("pooler"),
                    lasting_database,
                    more=more,
                    connect_query=query,
                )
            )
            for name, more in zip(POOLED, variants(), strict=True)
        }


@pytest.fixture
async def engine(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Engine]:
    if "watch" in request.fixturenames:
        request.getfixturevalue("watch")  # it must exist before the store opens
    made: Engine = SQLite(tmp_path / "receiver.db")
    kind = getattr(request, "param", "sqlite")
    if kind != "sqlite":
        found: Database = request.getfixturevalue("database")
        pooler = request.getfixturevalue("poolers")[kind] if kind in POOLED else None
        made = Postgres(found, pooler)
    await made.store.start()
    yield made
    await made.store.stop()


@pytest.fixture
def in_one_process() -> None:
    """Mark a test that holds only if no other process can use the database."""


@pytest.fixture
def on_postgres() -> None:
    """Mark a test of PostgreSQL only, in a file of tests of both engines."""


@pytest.fixture
def store(engine: Engine) -> Store:
    return engine.store
