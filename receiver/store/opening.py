"""The choice of the store by the settings; nothing is opened yet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.model.tasks import Wakeups
from receiver.settings import Settings
from receiver.store.facade import Store
from receiver.store.sqlite.engine import SQLiteStore

StoreMaker: TypeAlias = Callable[
    [Callable[[StoreUnavailable | None], None], Callable[[int], None], Wakeups], Store
]
"""Creates a store from three values, the first two of which may be called from any thread.

`report` is called when it stops accepting writes, and with None when it resumes, `committed` with
the number of writes of each transaction, and `wakeups` are woken by commits of other processes.
"""


def store_maker(settings: Settings, clock: Callable[[], float] = time.time) -> StoreMaker:
    """Return the function that creates the store; `clock` makes the times that are stored.

    Raises StoreUnusable: its extra is not installed, or its file would be lost with a function.
    """
    if settings.sqlite_path is not None:
        if settings.platform is not None and not _is_mounted(Path(settings.sqlite_path)):
            raise StoreUnusable(_GOES.format(settings.platform))
        return partial(SQLiteStore, settings.sqlite_path)
    try:
        from receiver.store.postgres.engine import PostgresStore  # noqa: PLC0415
        from receiver.store.postgres.queue import PgQueuerJobs  # noqa: PLC0415 - imported if used
        from receiver.store.postgres.sessions import Access  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise StoreUnusable(
            f"PostgreSQL support is not installed ({error.name} is missing): "
            "pip install 'prediction-receiver[postgres]'"
        ) from error
    url = settings.database_url
    access = Access(
        pooled=settings.database_pooled,
        migrate_url=settings.migrate_url,
        serverless=settings.mode == "serverless",
        connections=settings.connections,
    )
    return lambda report, committed, wakeups: PostgresStore(
        url, report, PgQueuerJobs(), committed, wakeups, access, clock
    )


_GOES: Final = (
    "{} says that this is a function, whose disk goes with its process, and all that SQLite keeps "
    "there: set RECEIVER_DATABASE_URL to a PostgreSQL server (postgresql://user:password@host/name)"
    ", or to a file on a disk that is mounted"
)


def _is_mounted(path: Path) -> bool:
    """Return whether a file is below a mount point that is not for temporary files."""
    above = path.absolute().parents
    is_temporary = any(folder in above for folder in _TEMPORARY)
    return not is_temporary and any(os.path.ismount(folder) for folder in [*above][:-1])


_TEMPORARY: Final = tuple(map(Path, ("/tmp", "/var/tmp", "/dev", "/run")))  # noqa: S108 - to refuse
