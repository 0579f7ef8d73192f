"""The store: all stored data, by noun, on either engine."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Final, TypeAlias

import msgspec

from receiver.model.tasks import Wakeups
from receiver.model.values import Shift
from receiver.store.attempts import AttemptNews
from receiver.store.audit import Audit
from receiver.store.backlog import BacklogReader
from receiver.store.breakers import Breakers
from receiver.store.budgets import BudgetStore
from receiver.store.changes import ChangeLog
from receiver.store.costs import CostStore
from receiver.store.deliveries import (
    ClaimRequest,
    Claims,
    DeliveryStore,
    LostAttempt,
    Settlement,
)
from receiver.store.discarded import DiscardedItems
from receiver.store.disposal import Disposal
from receiver.store.due import Due, due_of
from receiver.store.due import sql as due_sql
from receiver.store.engine import Engine, each
from receiver.store.erasure import Erasure
from receiver.store.leases import LeaseStore
from receiver.store.limits import LimitStore
from receiver.store.orders import OrderStore
from receiver.store.predictions import PredictionStore
from receiver.store.private import PrivateContent
from receiver.store.replays import Replays
from receiver.store.search import Search
from receiver.store.statement import Run, Statements, Steps, in_turn

Housekeeping: TypeAlias = Mapping[str, Callable[[], Awaitable[None]]]
"""The work that one process does every few seconds for all processes, by name."""

sql: Final = Statements("facade")


class Store(Engine):
    """A database: the operations on each kind of row, and how deliveries are handed out.

    Deliveries come from the rows themselves, or from a queue beside them.
    """

    def __init__(self, wakeups: Wakeups) -> None:
        """Create a store; `wakeups` are woken by commits of other processes."""
        self._wakeups = wakeups
        self.predictions = PredictionStore(self)
        self.private = PrivateContent(self)
        self.orders = OrderStore(self)
        self.budgets = BudgetStore(self)
        self.costs = CostStore(self)
        self.deliveries = DeliveryStore(self)
        self.limits = LimitStore(self)
        self.leases = LeaseStore(self)
        self.breakers = Breakers(self)
        self.replays = Replays(self)
        self.changes = ChangeLog(self)
        self.attempts = AttemptNews(self, wakeups)
        self.discarded = DiscardedItems(self)
        self.disposal = Disposal(self)
        self.erasure = Erasure(self)
        self.backlog = BacklogReader(self)
        self.search = Search(self)
        self.audit = Audit(self)

    @abstractmethod
    async def start(self) -> None:
        """Connect and migrate, or raise StoreUnusable with what to do."""

    @abstractmethod
    async def migrate(self) -> None:
        """Bring the schema up to date and disconnect, or raise StoreUnusable with what to do."""

    @abstractmethod
    async def keep_house(self, housekeeping: Housekeeping) -> None:
        """Do the housekeeping, in one process for all, for as long as this process runs."""

    async def trim_queue(self) -> None:
        """Delete old rows of a queue's log; for drains, as otherwise housekeeping does it."""

    @abstractmethod
    async def stop(self) -> None:
        """Commit waiting writes, then disconnect."""

    @abstractmethod
    async def recover(self, owner: str, now: float) -> list[LostAttempt]:
        """Make the work of dead processes pending again, or unconfirmed; called at the start."""

    async def try_write(self, now: float) -> None:
        """Write a test row, to check that the database accepts writes."""
        await self.run(sql.try_write, now=now)

    async def due(
        self, owner: str, handlers: Collection[str], providers: Collection[str], now: float
    ) -> Due:
        """Return the due work of these, and when more falls due, by one read-only statement."""
        rows = [(name,) for name in providers]
        found = await self.read(due_sql.select_due, rows, owner=owner)
        return due_of(found, handlers, providers, now, ahead=self.ahead)

    @property
    def ahead(self) -> float:
        """Return how many seconds the server's clock, which leases use, is ahead of ours."""
        return 0.0

    async def should_follow_step(self, now: float, step: Shift) -> bool:  # noqa: ARG002 - for one process
        """Return whether to follow a step of this computer's clock; `now` is without the step."""
        return True

    async def shift(self, step: Shift, owner: str, now: float) -> None:  # noqa: ARG002 - as above
        """Move all stored future times along with the clock."""
        await self.write(_shift, step)

    # --- deliveries, as the engine hands them out ---

    @abstractmethod
    async def claim(self, wanted: ClaimRequest) -> Claims:
        """Claim a handler's due deliveries, as many as it has room for."""

    @abstractmethod
    async def settle(self, settlement: Settlement) -> bool:
        """End an attempt; False if the claim was lost meanwhile, and then nothing changed."""

    @abstractmethod
    async def release(
        self, owner: str, now: float, only: tuple[str, ...] = ()
    ) -> list[LostAttempt]:
        """Give back claims of `owner` as if they had not been made; return attempts that count.

        `only` contains ids of deliveries; empty: all.
        """

    @abstractmethod
    def renew(self, owner: str, delivery_ids: list[str], lease_until: float) -> None:
        """Renew claims of `owner`; callable from any thread, as a blocked loop must keep them."""

    @abstractmethod
    async def reclaim(self, owner: str, now: float) -> list[LostAttempt]:
        """Make claims whose lease has expired pending again."""


_SHIFTED: Final = (
    sql.shift_predictions,
    sql.shift_pending,
    sql.shift_running,
    sql.shift_breakers,
    sql.shift_requests,
    sql.shift_leases,
)


@in_turn  # times that were written before are moved, and those written after are not
@each()
def _shift(item: Shift) -> Steps[None]:
    yield from shift_all(item)


def shift_all(step: Shift) -> Steps[None]:
    """Move all stored future times."""
    params = msgspec.structs.asdict(step)
    for statement in _SHIFTED:
        yield Run(statement, {name: params[name] for name in statement.names})
