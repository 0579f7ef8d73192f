"""Run one operation in child after child, each killed one statement later than the one before.

Usage: dying.py {accept,begin_submits,settle} FOLDER. Leaves FOLDER/0.db and so on, the last of them
by the child that survived, and prints how many were killed.
"""

import asyncio
import os
import sqlite3
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from receiver.model.ids import delivery_id
from receiver.model.retry import DONE
from receiver.model.values import Outcome, Output, Recipients, Status
from receiver.store.deliveries import ClaimRequest, Settlement
from receiver.store.inbox import CurrentState, IncomingOutcome, Transition, accept_outcome
from receiver.store.predictions import NewPrediction, SubmitBudget
from receiver.store.sqlite.engine import SQLiteStore

NOW = 1_750_000_000.0
ID = f"pred_{1:032d}"


def rule(_known: CurrentState, _arrival: IncomingOutcome) -> Transition:
    return Transition(
        verdict="accepted",
        status=Status.SUCCEEDED,
        reason="",
        event_type="prediction.succeeded",
        recipients=Recipients(("greet",)),
    )


async def create(store: SQLiteStore) -> None:
    new = NewPrediction(
        id=ID,
        provider="fal",
        model="m",
        mode="queue",
        input={},
        metadata={},
        created_at=NOW,
    )
    await store.predictions.create(new)


async def begin_submits(store: SQLiteStore) -> None:
    wish = SubmitBudget(
        provider="fal",
        now=NOW,
        most=1,
        max_in_flight=2,
        per_minute=None,
        hold_until=NOW + 60,
        timeout=60,
    )
    await store.predictions.begin_submits(wish)


async def accept(store: SQLiteStore) -> None:
    arrival = IncomingOutcome(
        prediction_id=ID,
        provider="fal",
        channel="webhook",
        outcome=Outcome(kind="succeeded", output=[Output(url="https://x.example/1")]),
        at=NOW,
        judge=rule,
        body=b"\xff" * 50_000,
    )
    await accept_outcome(store, arrival)


async def claim(store: SQLiteStore) -> None:
    wish = ClaimRequest(handler="greet", owner="me", most=1, now=NOW, lease_until=NOW + 30)
    await store.claim(wish)


async def settle(store: SQLiteStore) -> None:
    settlement = Settlement(
        id=delivery_id(ID, "greet"),
        owner="me",
        number=1,
        decision=DONE,
        result="done",
        started_at=NOW,
        ended_at=NOW,
    )
    assert await store.settle(settlement)


BEFORE = {"begin_submits": [create], "accept": [create], "settle": [create, accept, claim]}
ACTS = {"begin_submits": begin_submits, "accept": accept, "settle": settle}


class Counted(sqlite3.Connection):
    """Calls `before` with each statement in a transaction.

    Statements outside are not the writer's: a checkpoint may come at any time.
    """

    before: Callable[[], None] = staticmethod(lambda: None)

    def execute(self, sql: str, params: Any = (), /) -> sqlite3.Cursor:
        if self.in_transaction or sql == "BEGIN IMMEDIATE":
            self.before()
        return super().execute(sql, params)

    def executemany(self, sql: str, params: Any, /) -> sqlite3.Cursor:
        if self.in_transaction:
            self.before()
        return super().executemany(sql, params)


def live_or_die(name: str, path: Path, statements: int) -> None:
    """Run in a child: prepare, then act, and die after `statements` statements."""
    left = 10_000

    def spend() -> None:
        nonlocal left
        if left == 0:
            os._exit(9)
        left -= 1

    Counted.before = staticmethod(spend)
    sqlite3.connect = partial(sqlite3.connect, factory=Counted)  # type: ignore[assignment]
    store = SQLiteStore(str(path), lambda _: None)
    store.open()

    async def run() -> None:
        nonlocal left
        for step in BEFORE[name]:
            await step(store)
        left = statements
        await ACTS[name](store)

    asyncio.run(run())
    store.close()
    os._exit(0)


def main(name: str, folder: Path) -> int:
    deaths = 0
    while True:
        child = os.fork()
        if child == 0:
            live_or_die(name, folder / f"{deaths}.db", deaths)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return deaths
        assert code == 9, code
        deaths += 1


if __name__ == "__main__":
    sys.stdout.write(str(main(sys.argv[1], Path(sys.argv[2]))))
