from __future__ import annotations

import pytest

from receiver.deliveries import fetch


@pytest.fixture(autouse=True)
def asks_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses between fetches of a result that is not available yet."""
    monkeypatch.setattr(fetch, "_PAUSES", (0.01,) * len(fetch._PAUSES))  # noqa: SLF001
