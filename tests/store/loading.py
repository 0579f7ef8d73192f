"""Write into a database until killed; print each id once it is committed.

Usage: loading.py FILE. Every third prediction has ended, with a pending delivery for `greet`; the
others are processing.
"""

import asyncio
import itertools
import sys

from receiver.model.values import Outcome, Output, Recipients, Status
from receiver.store.inbox import CurrentState, IncomingOutcome, Transition, accept_outcome
from receiver.store.predictions import NewPrediction, Progress, SubmitBudget
from receiver.store.sqlite.engine import SQLiteStore

NOW = 1_750_000_000.0


def rule(_known: CurrentState, _arrival: IncomingOutcome) -> Transition:
    return Transition(
        verdict="accepted",
        status=Status.SUCCEEDED,
        reason="",
        event_type="prediction.succeeded",
        recipients=Recipients(("greet",)),
    )


async def one(store: SQLiteStore, number: int) -> None:
    name = f"pred_{number:032d}"
    ends = number % 3 == 0
    await store.predictions.create(
        NewPrediction(
            id=name,
            provider="eachlabs",
            model="m",
            mode="queue",
            input={"prompt": "a lighthouse" * 100},
            metadata={},
            created_at=NOW,
        )
    )
    if ends:
        output = [Output(url="https://cdn.test/a.png")]
        await accept_outcome(
            store,
            IncomingOutcome(
                prediction_id=name,
                provider="eachlabs",
                channel="webhook",
                outcome=Outcome(kind="succeeded", output=output),
                at=NOW,
                judge=rule,
                body=b'{"status": "succeeded"}' * 50,
            ),
        )
    else:
        wish = SubmitBudget(
            provider="eachlabs",
            now=NOW,
            most=9,
            max_in_flight=None,
            per_minute=None,
            hold_until=NOW + 60,
            timeout=1e9,
        )
        await store.predictions.begin_submits(wish)
        await store.predictions.progress(
            Progress(id=name, cause="accepted", due_at=NOW + 60, provider_id=f"theirs-{number}")
        )
    sys.stdout.write(f"{name}\n")
    sys.stdout.flush()


async def main(path: str) -> None:
    store = SQLiteStore(path, lambda _: None)
    store.open()
    numbers = itertools.count(1)

    async def line() -> None:
        while True:
            await one(store, next(numbers))
            await asyncio.sleep(0.02)  # a moderate load, as the test reads every row

    await asyncio.gather(*(line() for _ in range(4)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
