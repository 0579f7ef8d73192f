from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "receiver.db"


@pytest.fixture(autouse=True)
def _quiet(logged: object) -> None:
    """Collect log lines instead of printing them, which would take longer than the tests."""
