"""The parts of PgQueuer that are used here, without all that its root imports.

The root has its command line, its dashboard and its stores in memory: more than all the rest of a
cold start. So it is run when something of its own is asked for, by whoever does.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


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
    """Let the modules of a package be imported without its root, unless that is there already."""
    spec = importlib.util.find_spec(name)
    if spec is None or name in sys.modules:
        return  # it is not installed, as the imports below will say
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

__all__ = [
    "JOB_STATUS",
    "AsyncpgDriver",
    "Channel",
    "DBSettings",
    "Durability",
    "EntrypointExecutionParameter",
    "Job",
    "Queries",
    "QueryBuilderEnvironment",
    "QueryQueueBuilder",
    "QuerySchedulerBuilder",
    "QueueEntrypoint",
    "QueueManagerId",
    "TracebackRecord",
]
