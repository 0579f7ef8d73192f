"""The database interface: transactions, in groups, and statements that only read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from receiver.store.statement import Cells, Row, Statement, Transaction

Item = TypeVar("Item")
Result = TypeVar("Result")

AttemptName: TypeAlias = tuple[str, int]
"""A delivery, and which of its attempts."""


class Engine(ABC):
    """A database. Raises StoreUnavailable when it takes no writes; then nothing was kept."""

    @abstractmethod
    async def write(self, transaction: Transaction[Item, Result], item: Item) -> Result:
        """Run a transaction for `item`, together with all that wait for it."""

    @abstractmethod
    async def read(
        self, statement: Statement, rows: Sequence[Cells] | None = None, **params: Any
    ) -> list[Row]:
        """Run a statement that only reads; writes go on meanwhile."""

    async def scrub(self) -> bool:
        """Remove what was deleted from the files beside the database too; False: not yet."""
        return True

    @abstractmethod
    async def change_log_end(self) -> int:
        """Return the place up to which the change log is complete: none will come before it."""

    @abstractmethod
    async def notify(self, ended: list[AttemptName]) -> None:
        """Notify other processes of attempts that ended; or, naming none, subscribe to theirs."""

    @abstractmethod
    def is_taken(self, error: Exception) -> bool:
        """Return whether a write failed because another row has a unique key."""
