from collections.abc import Iterator
from pathlib import Path

import pytest

from .parts import SQLite, Store, watch

__all__ = ["watch"]

ENGINES = {"sqlite": SQLite}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SQLite]:
    """Open a fresh store of every engine in turn."""
    engine = ENGINES[request.param](tmp_path / "receiver.db")
    engine.store.open()
    yield engine
    engine.store.close()


@pytest.fixture
def store(engine: SQLite) -> Store:
    return engine.store
