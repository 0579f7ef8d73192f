"""Helpers of the delivery tests: real workers on a real store, with the test's own clock."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx

from receiver.deliveries.breaker import BreakerPolicy
from receiver.deliveries.context import Tools
from receiver.deliveries.heartbeat import Timing
from receiver.deliveries.registry import Registry, handlers_of
from receiver.deliveries.worker import BREAKER, Worker
from receiver.model.answers import Delivery
from receiver.model.requests import SubmitRequest
from receiver.model.retry import Policy
from receiver.model.sealing import Seals
from receiver.model.tasks import Wakeups
from receiver.model.values import Outcome, Output, Prediction, Recipients, Status, utc
from receiver.observability.runtime import Runtime
from receiver.store.facade import Store
from receiver.store.inbox import IncomingOutcome, Transition, accept_outcome
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.predictions import NewPrediction
from receiver.store.sqlite.engine import SQLiteStore
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.sqlite import lay_out

T = TypeVar("T")

SEALS: Final = Seals(["the-secret-key-of-a-test"])
POLICY: Final = Policy(attempts=3, base=0.0, cap=0.0)
BRISK: Final = Timing(lease=30.0, beat=0.05, nap=0.2, drain=2.0)


class Clock:
    """A clock that is `ahead` seconds ahead of the real one, or stopped."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._stands: float | None = None

    def __call__(self) -> float:
        return (time.time() if self._stands is None else self._stands) + self.ahead

    def stand(self) -> None:
        """Stop the clock, except for `ahead`, so that no lease expires on a slow machine."""
        self._stands = time.time()


@dataclass
class Submits:
    """A fake submitter: the same idempotency key returns the same prediction."""

    asked: list[SubmitRequest] = field(default_factory=list)
    made: dict[str, Prediction] = field(default_factory=dict)

    async def __call__(self, request: SubmitRequest) -> Prediction:
        self.asked.append(request)
        prediction = Prediction(
            id=f"pred_next_{len(self.made)}",
            provider=request.provider,
            model=request.model,
            status=Status.QUEUED,
            mode=request.mode,
            input=request.input,
            metadata=dict(request.metadata),
            parent_id=request.parent_id,
            created_at=utc(0),
        )
        return self.made.setdefault(request.key or "", prediction)


class Dispatching:
    """One receiver's store, handlers and worker, with methods that create deliveries."""

    def __init__(
        self,
        place: Path | Database,
        functions: Sequence[Callable[..., Any]],
        pace: Timing,
        breaker: BreakerPolicy | None = None,
    ) -> None:
        self.reports: list[object] = []
        self.store: Store
        if isinstance(place, Database):
            jobs = PgQueuerJobs()
            self.store = PostgresStore(place.url, self.reports.append, jobs, access=place.made)
        else:
            lay_out(place)
            self.store = SQLiteStore(str(place), self.reports.append)
        self.registry = Registry()
        for function in functions:
            for handler in handlers_of(function):
                self.registry.add(handler)
        self.clock = Clock()
        self.submits = Submits()
        self.http = httpx.AsyncClient(verify=False)  # sends nothing; reading certificates is slow
        self.pace = pace
        self.breakers = self.store.breakers
        self.wakeups = Wakeups()
        self.breaker = BREAKER if breaker is None else breaker
        self.dispatch = self.another("me")
        self._count = 0

    def another(self, owner: str, pace: Timing | None = None, store: Any = None) -> Worker:
        """Return a worker of another owner on the same rows."""
        return Worker(
            store or self.store,
            self.registry,
            Tools(self.store.deliveries, self.submits, self.http, self.http, SEALS),
            Runtime(
                owner=owner,
                clock=self.clock,
                monotonic=self.clock,
                random=lambda: 0.5,
                wakeups=self.wakeups if owner == "me" else Wakeups(),
            ),
            policy=POLICY,
            pace=pace or self.pace,
            breaker=self.breaker,
        )

    async def enqueue(self, *handlers: str, metadata: dict[str, Any] | None = None) -> str:
        """Create a succeeded prediction, wake the handlers of its event, and return its id."""
        self._count += 1
        prediction_id = f"pred_{self._count:032d}"
        names = handlers or tuple(self.registry.handlers)
        after = self.registry.waiting([name for name in names if name in self.registry.handlers])
        await self.store.predictions.create(
            NewPrediction(
                id=prediction_id,
                provider="fal",
                model="fal-ai/flux",
                mode="queue",
                input={},
                metadata=metadata or {},
                created_at=self.clock(),
            )
        )
        await accept_outcome(
            self.store,
            IncomingOutcome(
                prediction_id=prediction_id,
                provider="fal",
                channel="webhook",
                outcome=Outcome(kind="succeeded", output=[Output(url="https://x.example/1.png")]),
                at=self.clock(),
                judge=lambda _known, _arrival: _succeeded(names, after),
                body=b'{"status": "OK"}',
            ),
        )
        self.wakeups.wake("handler", *names)
        return prediction_id

    async def delivery(self, prediction_id: str, handler: str) -> Delivery:
        found = await self.store.deliveries.page(10, prediction=prediction_id, handler=handler)
        delivery: Delivery = found.data[0]
        return delivery

    async def ends(self, prediction_id: str, handler: str, *states: str) -> Delivery:
        """Wait until a delivery is in one of `states`, by default an end state; return it."""
        wanted = states or ("done", "skipped", "dead")

        async def at_its_end() -> bool:
            return (await self.delivery(prediction_id, handler)).state in wanted

        await eventually(at_its_end)
        return await self.delivery(prediction_id, handler)

    async def replay(self, prediction_id: str) -> None:
        names = list(self.registry.handlers)
        recipients = Recipients(tuple(names), self.registry.waiting(names))
        replayed = await self.store.deliveries.replay(
            prediction_id, lambda *_: recipients, self.clock()
        )
        self.wakeups.wake("handler", *replayed.handlers)


def _succeeded(handlers: Sequence[str], after: Mapping[str, tuple[str, ...]]) -> Transition:
    return Transition(
        verdict="accepted",
        status=Status.SUCCEEDED,
        reason="",
        event_type="prediction.succeeded",
        recipients=Recipients(tuple(handlers), after),
    )


@asynccontextmanager
async def dispatching(
    place: Path | Database,
    *functions: Callable[..., Any],
    pace: Timing = BRISK,
    breaker: BreakerPolicy | None = None,
    start: bool = True,
) -> AsyncIterator[Dispatching]:
    """Run the handlers of `functions` until the block is left."""
    running = Dispatching(place, functions, pace, breaker)
    await running.store.start()
    try:
        if start:
            await running.dispatch.start()
        yield running
        if start:
            await running.dispatch.stop()
    finally:
        await running.http.aclose()
        await running.store.stop()


class FailingStore:
    """A proxy of the store; a method first raises each of the errors given for it."""

    def __init__(self, store: Any, **troubles: list[Exception]) -> None:
        self._store = store
        self._troubles = troubles

    def __getattr__(self, name: str) -> Any:
        troubles = self._troubles.get(name)
        if troubles:
            raise troubles.pop()
        return getattr(self._store, name)


async def eventually(condition: Callable[[], Any]) -> None:
    """Wait until a condition holds; raise TimeoutError after PATIENCE seconds."""
    async with asyncio.timeout(PATIENCE):
        while True:
            found = condition()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.01)
