"""A database that is taken away under a running receiver is noticed, not written into the void."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from receiver.model.errors import StoreUnavailable
from receiver.store.sqlite.engine import SQLiteStore

pytestmark = pytest.mark.anyio


async def test_writes_are_refused_until_the_file_is_back(tmp_path: Path) -> None:
    reports: list[StoreUnavailable | None] = []
    path = tmp_path / "receiver.db"
    store = SQLiteStore(str(path), reports.append)
    store.open()
    try:
        await store.try_write(1.0)
        away = path.rename(tmp_path / "away.db")
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            await _probe_until_refused(store)
        assert not path.exists()  # nobody made a new one
        away.rename(path)
        await store.try_write(3.0)
        assert [report is None for report in reports] == [False, True]
    finally:
        store.close()


async def _probe_until_refused(store: SQLiteStore) -> None:
    """Write on: the checkpointer looks after a commit, ten times a second."""
    async with asyncio.timeout(10):
        while True:
            await store.try_write(2.0)
            await asyncio.sleep(0.01)
