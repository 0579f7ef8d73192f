"""Choose the store that the settings name, before anything is opened."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.model.tasks import Wakeups
from receiver.settings import Settings
from receiver.store.facade import Store
from receiver.store.sqlite.engine import SQLiteStore

StoreMaker: TypeAlias = Callable[
    [Callable[[StoreUnavailable | None], None], Callable[[int], None], Wakeups], Store
]
"""Makes a store of `report`, `committed` and `wakeups`: see Store."""


def store_maker(settings: Settings) -> StoreMaker:
    """Return what makes the store; raise StoreUnusable where its extra is not installed."""
    if settings.sqlite_path is not None:
        return partial(SQLiteStore, settings.sqlite_path)
    try:
        from receiver.store.postgres.engine import SCHEMA, PostgresStore  # noqa: PLC0415
        from receiver.store.postgres.queue import PgQueuerJobs  # noqa: PLC0415 - paid for when used
    except ModuleNotFoundError as error:
        raise StoreUnusable(
            f"PostgreSQL needs more than is installed here ({error.name} is missing): "
            "pip install 'prediction-receiver[postgres]'"
        ) from error
    url = settings.database_url
    return lambda report, committed, wakeups: PostgresStore(
        url, report, PgQueuerJobs(SCHEMA), committed, wakeups
    )
