from pathlib import Path

import pytest

from tests.postgres import Database


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test of `place` on both engines, unless it is marked `on_sqlite`."""
    names = set(metafunc.fixturenames)
    if "place" in names and "on_sqlite" not in names:
        metafunc.parametrize("place", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | Database:
    """Return where the rows are: a SQLite file or a PostgreSQL database."""
    if getattr(request, "param", "sqlite") == "postgres":
        database: Database = request.getfixturevalue("database")
        return database
    return tmp_path / "receiver.db"


@pytest.fixture(autouse=True)
def _quiet(logged: object) -> None:
    """Collect log lines instead of printing them, which would take longer than the tests."""
