"""The store: all that is remembered, on either engine.

What an engine adds is how steps are run, and where the queue is: in the rows, or beside them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from receiver.model.values import Prediction
from receiver.store import operations
from receiver.store import queries as q
from receiver.store import rows as to
from receiver.store.dialect import Operation, Query, Row
from receiver.store.values import (
    AcceptResult,
    Annotation,
    ClaimRequest,
    Claims,
    CreateResult,
    CurrentState,
    Delivery,
    IncomingOutcome,
    Job,
    LeaseRequest,
    LostAttempt,
    NewPrediction,
    Page,
    PredictionFilter,
    Progress,
    Recipients,
    ReplayResult,
    RequestPermit,
    Settlement,
    SubmitBatch,
    SubmitBudget,
)

Chore: TypeAlias = Callable[[], Awaitable[None]]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Store(ABC):
    """Every method that writes returns after its commit.

    Raises StoreUnavailable when the database does not take writes; then nothing was kept.
    """

    def __init__(self) -> None:
        self.on_news: Callable[[Sequence[str] | None, Sequence[str] | None], None] = (
            lambda _handlers, _predictions: None
        )
        """Called with what another process has committed: handlers to whom something is owed, and
        predictions that have ended; None for both means that something may have been missed."""
        self.on_commit: Callable[[int], None] = lambda _size: None
        """Called with the number of writes that a transaction has committed, from any thread."""
        self.on_lost: Callable[[Sequence[LostAttempt]], None] = lambda _lost: None
        """Called with attempts whose process is gone, when they are recorded."""

    # --- what an engine does ---

    @abstractmethod
    async def start(self) -> None:
        """Connect and migrate, or raise StoreUnusable with what to do."""

    @abstractmethod
    async def migrate(self) -> None:
        """Bring the schema up to date and let go, or raise StoreUnusable with what to do."""

    @abstractmethod
    async def sweep(self, chores: Mapping[str, Chore]) -> None:
        """Run chores every few seconds, in one of all processes, for as long as we run."""

    @abstractmethod
    async def stop(self) -> None:
        """Commit what waits, then let go."""

    @abstractmethod
    async def write(self, operation: Operation[Item, Result], item: Item) -> Result:
        """Run an operation for `item`, together with all that wait for it."""

    @abstractmethod
    async def read(
        self, query: Query, rows: Sequence[Row] | None = None, **params: Any
    ) -> list[Row]:
        """Run a query that only reads, beside whatever is written meanwhile."""

    async def scrub(self) -> bool:
        """Leave nothing of what was deleted in files beside the database; False: not yet."""
        return True

    @abstractmethod
    async def journal_end(self) -> int:
        """Give the place up to which the journal is complete: nothing will be put in before it."""

    @abstractmethod
    def _is_taken(self, error: Exception) -> bool:
        """Say whether a write failed because another row has a unique key."""

    @abstractmethod
    async def recover(self, owner: str, now: float) -> None:
        """At start: what dead processes were doing is owed again, or in doubt."""

    # --- predictions ---

    async def create(self, new: NewPrediction) -> CreateResult:
        return await self.write(operations.create, new)

    async def begin_submits(self, slots: SubmitBudget) -> SubmitBatch:
        """Move queued predictions to `submitting`, oldest first, as many as there is room for."""
        return await self.write(operations.begin_submits, slots)

    async def take_turn(self, turn: RequestPermit) -> float:
        """Count one request to a provider, or give the seconds until there is room for it."""
        return await self.write(operations.take_turns, turn)

    async def progress(self, progress: Progress) -> bool:
        """Record a step; False if the provider's id belongs to another prediction."""
        try:
            await self.write(operations.progress, progress)
        except Exception as error:
            if not self._is_taken(error):
                raise
            return False
        return True

    async def claim_due(self, provider: str, now: float, hold_until: float, most: int) -> list[Job]:
        """Take a provider's predictions that are due, and make them due again at `hold_until`."""
        return await self.write(operations.claim_due, (provider, now, hold_until, most))

    async def mark_cancel(self, prediction_id: str) -> None:
        await self.write(operations.mark_cancel, prediction_id)

    async def job(self, prediction_id: str) -> Job | None:
        rows = await self.read(q.SELECT_JOB, id=prediction_id)
        return to.job(rows[0]) if rows else None

    async def prediction(self, prediction_id: str) -> Prediction | None:
        rows = await self.read(q.SELECT_PREDICTION, id=prediction_id)
        return to.prediction(rows[0]) if rows else None

    async def predictions(self, wanted: PredictionFilter) -> Page[Prediction]:
        given = {"status": wanted.status, "provider": wanted.provider, "cursor": wanted.cursor}
        rows = await self._list(q.LIST_PREDICTIONS, given, wanted.limit)
        return to.page([to.prediction(row) for row in rows], wanted.limit)

    async def find(self, provider: str, provider_id: str) -> str | None:
        """Give our id for the provider's."""
        rows = await self.read(
            q.SELECT_ID_BY_PROVIDER_ID, provider=provider, provider_id=provider_id
        )
        return rows[0][0] if rows else None

    async def next_due(self, provider: str) -> float | None:
        """Say when the next prediction at a provider falls due for a look."""
        return (await self.read(q.NEXT_DUE, provider=provider))[0][0]  # type: ignore[no-any-return]

    async def next_queued(self, provider: str) -> float | None:
        """Say when the next prediction may be submitted, as far as it depends on itself."""
        return (await self.read(q.NEXT_QUEUED, provider=provider))[0][0]  # type: ignore[no-any-return]

    async def stale(self, provider: str, before: float, most: int) -> list[str]:
        """Name predictions that have been queued since before then."""
        rows = await self.read(q.SELECT_STALE, provider=provider, before=before, most=most)
        return [row[0] for row in rows]

    async def hasten(self, provider: str, now: float) -> None:
        """Make every prediction that is at the provider due for a look."""
        await self.write(operations.hasten, (provider, now))

    # --- the inbox ---

    async def accept(self, arrival: IncomingOutcome) -> AcceptResult:
        """Take one outcome: evidence, new state, event and deliveries in one transaction."""
        try:
            return await self.write(operations.accept, arrival)
        except Exception as error:
            if not self._is_taken(error):
                raise
            # The one rule a stranger's words can run into: a provider's id has one owner.
            return AcceptResult("mismatch", None, "its id belongs to another prediction")

    # --- deliveries ---

    @abstractmethod
    async def claim(self, wanted: ClaimRequest) -> Claims:
        """Take what a lane has room for of what is due to its handler."""

    @abstractmethod
    async def settle(self, settlement: Settlement) -> bool:
        """End an attempt; False if the claim was lost meanwhile, and then nothing changed."""

    @abstractmethod
    async def release(self, owner: str, now: float) -> None:
        """Give back every claim of `owner`, as if it had not been made."""

    @abstractmethod
    def renew(self, owner: str, delivery_ids: list[str], lease_until: float) -> None:
        """Keep claims of `owner`; from any thread, so that a blocked loop keeps them too."""

    @abstractmethod
    async def reclaim(self, owner: str, now: float) -> list[str]:
        """Owe again what was claimed by somebody whose lease ran out; name the handlers."""

    async def replay(
        self, prediction_id: str, match: Callable[[CurrentState, str], Recipients], now: float
    ) -> ReplayResult:
        """Owe the event of a prediction to its matching handlers again."""
        return await self.write(operations.replay, (prediction_id, match, now))

    async def retry(self, delivery_id: str, now: float) -> str | None:
        """Owe one dead or skipped delivery again (a pending one: at once); name its handler."""
        return await self.write(operations.retry, (delivery_id, now))

    async def deliveries(self, limit: int, **given: str | None) -> Page[Delivery]:
        """List by any of: state, handler, prediction, id, cursor."""
        rows = await self._list(q.LIST_DELIVERIES, given, limit)
        return to.page([to.delivery(row) for row in rows], limit)

    async def owed(self) -> dict[str, int]:
        """Count pending deliveries by handler."""
        return {row[0]: row[1] for row in await self.read(q.COUNT_OWED)}

    async def recall(self, delivery_id: str, key: str) -> str | None:
        """Give the remembered result of a handler's sub-step, as JSON."""
        rows = await self.read(q.SELECT_STEP, delivery_id=delivery_id, key=key)
        return rows[0][0] if rows else None

    async def add(self, addition: Annotation) -> None:
        """Add to a prediction what a handler found or did; saying it twice changes nothing."""
        await self.write(operations.add, addition)

    async def remember(self, delivery_id: str, key: str, result: str) -> None:
        await self.write(operations.remember, (delivery_id, key, result))

    # --- what one process does for all ---

    async def hold_role(self, role: LeaseRequest) -> bool:
        """Become, or remain, the one process that has a role; False while another has it."""
        return await self.write(operations.hold_role, role)

    async def report_role(self, name: str, owner: str, *, at_work: bool) -> None:
        """Say whether the holder of a role is able to do it."""
        await self.write(operations.report_role, (name, owner, at_work))

    async def leave_role(self, name: str, owner: str) -> None:
        await self.write(operations.leave_role, (name, owner))

    async def role_at_work(self, name: str, now: float) -> bool:
        """Say whether some process has a role and is able to do it."""
        rows = await self.read(q.SELECT_ROLE, name=name, now=now)
        return bool(rows and rows[0][0])

    async def try_write(self, now: float) -> None:
        """Write one row for nothing, to know that it can be done."""
        await self.write(operations.try_write, now)

    async def _list(
        self, listing: q.Listing, given: Mapping[str, str | None], limit: int
    ) -> list[Row]:
        params = {name: value for name, value in given.items() if value is not None}
        return await self.read(listing.by(params), **params, limit=limit + 1)
