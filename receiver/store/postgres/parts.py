"""The parts of PgQueuer that are used here, imported without its root package.

The root imports its command line, its dashboard and its stores in memory: more than all the rest of
a cold start. So it runs only when one of its own names is first used.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from receiver.store.postgres.group_commit import Connection


class _Later(ModuleType):
    """A package whose own code has not run yet; its modules can be imported all the same."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        if name.startswith("__") or spec is None or spec.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment] # as it is from now on
        spec.loader.exec_module(self)
        return getattr(self, name)


def _without_root(name: str) -> None:
    """Let the modules of a package be imported without its root, unless that is loaded already."""
    spec = importlib.util.find_spec(name)
    if spec is None or name in sys.modules:
        return  # it is loaded, or not installed: then the imports below raise
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Later
    sys.modules[name] = module


_without_root("pgqueuer")

from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver  # noqa: E402 - see above
from pgqueuer.adapters.persistence.qb import (  # noqa: E402
    QueryBuilderEnvironment,
    QueryQueueBuilder,
    QuerySchedulerBuilder,
)
from pgqueuer.adapters.persistence.queries import Queries  # noqa: E402
from pgqueuer.domain.models import Job, TracebackRecord  # noqa: E402
from pgqueuer.domain.settings import DBSettings, Durability  # noqa: E402
from pgqueuer.domain.types import (  # noqa: E402
    JOB_STATUS,
    Channel,
    QueueEntrypoint,
    QueueManagerId,
)
from pgqueuer.ports.repository import EntrypointExecutionParameter  # noqa: E402

if TYPE_CHECKING:
    from pgqueuer import SchedulerManager

__all__ = ["JOB_STATUS", "Job", "Queries", "QueueEntrypoint", "QueueManagerId", "TracebackRecord"]

UNLIMITED: Final = EntrypointExecutionParameter(concurrency_limit=0)
# All of its names are given, as it would otherwise read them from the environment. The log and the
# statistics may be lost in a crash of the server: they are for monitoring.
_NAMES: Final[dict[str, Any]] = {
    "db_schema": "receiver",
    "prefix": "",
    "channel": Channel("receiver_jobs"),
    "function": "fn_pgqueuer_changed",
    "statistics_table": "pgqueuer_statistics",
    "queue_status_type": "pgqueuer_status",
    "queue_table": "pgqueuer",
    "queue_table_log": "pgqueuer_log",
    "trigger": "tg_pgqueuer_changed",
    "schedules_table": "pgqueuer_schedules",
    "durability": Durability.balanced,
}


def maker() -> Callable[[Connection], Queries]:
    """Return a function that makes PgQueuer's own queries, with our names of its tables."""
    settings = DBSettings(**_NAMES)
    environment = QueryBuilderEnvironment(settings)
    builder, schedules = QueryQueueBuilder(settings), QuerySchedulerBuilder(settings)
    return lambda connection: Queries(AsyncpgDriver(connection), environment, builder, schedules)


def scheduler() -> type[SchedulerManager]:
    """Return the class that runs schedules; this imports the root."""
    from pgqueuer import SchedulerManager  # noqa: PLC0415 - see above

    return SchedulerManager
