"""The database interface: transactions, committed in groups, and read-only statements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, TypeAlias, TypeVar

from receiver.store.statement import Cells, Row, Run, Statement, Steps, Transaction, in_order

Item = TypeVar("Item")
Result = TypeVar("Result")

AttemptName: TypeAlias = tuple[str, int]
"""The id of a delivery, and the number of one of its attempts."""
_Given: TypeAlias = tuple[dict[str, Any], Sequence[Cells] | None]
"""The values and the rows that a statement is given."""


class Engine(ABC):
    """A database. Raises StoreUnavailable if it accepts no writes; then nothing was stored."""

    @abstractmethod
    async def write(self, transaction: Transaction[Item, Result], item: Item) -> Result:
        """Run a transaction for `item`, together with all items that wait for it."""

    @abstractmethod
    async def read(
        self, statement: Statement, rows: Sequence[Cells] | None = None, **params: Any
    ) -> list[Row]:
        """Run a read-only statement and return its rows; writes continue meanwhile."""

    async def run(
        self, statement: Statement, rows: Sequence[Cells] | None = None, **params: Any
    ) -> list[Row]:
        """Run a statement that writes, as a transaction of its own, and return its rows."""
        return await self.write(_alone(statement), (params, rows))

    async def scrub(self) -> bool:
        """Remove deleted content from the files beside the database too; False: not done yet."""
        return True

    @abstractmethod
    async def change_log_end(self) -> int:
        """Return the position up to which the change log is complete: no change will precede it."""

    @abstractmethod
    async def notify(self, ended: list[AttemptName]) -> None:
        """Notify other processes of ended attempts; if there are none, subscribe to theirs."""

    @abstractmethod
    def is_taken(self, error: Exception) -> bool:
        """Return whether a write failed because another row has its unique key."""


def each(
    key: Callable[[Any], Any] = lambda _item: 0,
) -> Callable[[Callable[[Item], Steps[Result]]], Transaction[Item, Result]]:
    """Make a transaction of a function that handles one item; the items keep their order.

    With a `key` they are sorted by it, so that transactions which lock their rows cannot deadlock.
    """

    def make(do: Callable[[Item], Steps[Result]]) -> Transaction[Item, Result]:
        @wraps(do)
        def transaction(items: Sequence[Item]) -> Steps[Sequence[Result]]:
            return (yield from in_order(items, key, do))

        return transaction

    return make


@cache
def _alone(statement: Statement) -> Transaction[_Given, list[Row]]:
    """Return the transaction that runs one statement alone, for items in order of their values.

    So it holds no lock while it waits for one of another statement.
    """

    @each(repr)
    def run(given: _Given) -> Steps[list[Row]]:
        return (yield Run(statement, *given))

    return run


class Repository:
    """The operations on one kind of row in a store."""

    def __init__(self, store: Engine) -> None:
        self._store = store
