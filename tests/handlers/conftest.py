from __future__ import annotations

import pytest

from receiver.deliveries import fetch


@pytest.fixture(autouse=True)
def asks_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask for a result that is not there as often as ever, and without the pauses in between."""
    monkeypatch.setattr(fetch, "_PAUSES", (0.01,) * len(fetch._PAUSES))  # noqa: SLF001
