"""Erasure of the content of one prediction; its existence and its end stay known.

These stay: ids, provider, model, status, times, the error's code, the channel, the states of its
deliveries, and the time, digest and verdict of each callback. The idempotency key stays too, so
that nothing is submitted twice, but not the digest of the request: it would confirm a guess of the
prompt.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Final, Literal, TypeAlias

import msgspec

from receiver.model.costs import Account
from receiver.model.states import TERMINAL
from receiver.model.values import Status
from receiver.store.costs import move
from receiver.store.costs import sql as costs_sql
from receiver.store.deliveries import sql as deliveries_sql
from receiver.store.disposal import sql as disposal_sql
from receiver.store.engine import Repository, each
from receiver.store.orders import sql as orders_sql
from receiver.store.statement import News, Run, Statements, Steps, Write

sql: Final = Statements("erasure")

Erased: TypeAlias = Literal["erased", "already", "missing", "living", "running"]
"""The result; `running`: a handler is running for it."""


class Erasure(Repository):
    """Erases predictions, also from the files beside the database."""

    async def erase(self, prediction_id: str, now: float) -> Erased:
        """Erase a prediction's content, all of it or nothing; repeating it changes nothing."""
        erased = await self._store.write(erase, (prediction_id, now))
        if erased in {"erased", "already"}:
            await self._store.scrub()
        return erased


@each(itemgetter(0))
def erase(item: tuple[str, float]) -> Steps[Erased]:
    prediction_id, now = item
    params = {"id": prediction_id, "now": now}
    found = yield Run(sql.hold_prediction, params)
    if not found:
        return "missing"
    [row] = found
    if Status(row["status"]) not in TERMINAL:
        return "living"
    if row["erased_at"] is not None:
        return "already"
    held = yield Run(disposal_sql.hold_deliveries, rows=[(prediction_id,)])
    deliveries = [(row["id"],) for row in held]
    if (yield Run(sql.select_running, rows=deliveries)):
        return "running"
    # First, as it finds the breakers by the reasons of the attempts.
    yield Run(sql.blank_breakers, rows=deliveries)
    yield Write(
        [
            (statement, deliveries)
            for statement in (sql.blank_deliveries, sql.blank_attempts, deliveries_sql.forget_steps)
        ]
    )
    skipped = yield Run(sql.skip_deliveries, params, deliveries)
    yield Write([], News([], dropped=[row["id"] for row in skipped]))
    yield Run(sql.blank_callbacks, params)
    yield Write([(orders_sql.blank_options, [(prediction_id,)])])
    yield from _forget_metadata(prediction_id)
    yield Run(sql.blank_prediction, params)
    return "erased"


def _forget_metadata(prediction_id: str) -> Steps[None]:
    """Keep a cost in the sums, but remove the metadata that it was added up by."""
    [row] = yield Run(costs_sql.hold_costs, rows=[(prediction_id,)])
    account = Account.read(row["account"])
    if account.metadata:
        yield from move(row, msgspec.structs.replace(account, metadata={}).text())
