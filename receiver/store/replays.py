"""Bulk replays: their selections, counts and progress.

A replay walks a range of events, and each step is one transaction: it redelivers some, counts them
and records where the next step begins. A step that begins elsewhere changes nothing, so that any
process can continue after another has died.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from receiver.model.answers import Page, Replay, Selection
from receiver.store.deliveries import Choose, redeliver
from receiver.store.engine import Repository, each
from receiver.store.inbox import CurrentState
from receiver.store.paging import listed, page_of, rfc3339
from receiver.store.statement import Row, Run, Statements, Steps, text

sql: Final = Statements("replays")

MOST_KEPT: Final = 1000
"""Replays that are kept, besides those under way."""
_WINDOW: Final = 20_000
"""The most events that one read scans: it must be short even if few events match."""


class CountedReplay(msgspec.Struct, frozen=True, kw_only=True):
    """A replay to be stored: how many events it found, and the range of `seq` they are in."""

    id: str
    wanted: Selection
    events: int
    matched: int
    next: int
    """The `seq` after which the walk begins."""
    last: int
    now: float


class RunningReplay(msgspec.Struct, frozen=True):
    """A replay under way."""

    id: str
    wanted: Selection
    next: int
    last: int


class Candidate(msgspec.Struct, frozen=True):
    """An event that may match, with the states of its deliveries by handler."""

    seq: int
    type: str
    known: CurrentState
    states: dict[str, str]


class CandidatePage(msgspec.Struct, frozen=True):
    """Candidates in order, and the `seq` up to which there are no others."""

    candidates: list[Candidate]
    end: int


class ReplayStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step of a replay's walk."""

    replay_id: str
    begin: int
    end: int
    predictions: Sequence[str]
    choose: Choose
    now: float


class ReplayStepResult(msgspec.Struct, frozen=True):
    """The result of a step: handlers with new pending deliveries, and the replay's state."""

    handlers: tuple[str, ...]
    state: str


@each()
def create(item: CountedReplay) -> Steps[None]:
    row = msgspec.structs.asdict(item) | {"wanted": text(item.wanted)}
    yield Run(sql.insert, row)
    yield Run(sql.forget, {"most": MOST_KEPT})


@each()
def take_step(step: ReplayStep) -> Steps[ReplayStepResult]:
    found = yield Run(sql.hold, {"id": step.replay_id})
    if not found:
        return ReplayStepResult((), "canceled")
    [row] = found
    if (row["state"], row["next"]) != ("running", step.begin):
        return ReplayStepResult((), row["state"])
    pending: list[tuple[str, str]] = []
    if step.predictions:
        pending = yield from redeliver(step.predictions, step.choose, step.now, step.replay_id)
    move = {"id": step.replay_id, "next": step.end, "pending": len(pending), "now": step.now}
    [moved] = yield Run(sql.move, move)
    return ReplayStepResult(tuple({handler for _, handler in pending}), moved["state"])


class Replays(Repository):
    """The replays of one store."""

    async def create(self, counted: CountedReplay) -> None:
        await self._store.write(create, counted)

    async def start(self, replay_id: str) -> bool:
        """Start a replay; False unless it was counted and not started."""
        return bool(await self._store.run(sql.start, id=replay_id))

    async def cancel(self, replay_id: str, now: float) -> bool:
        """Cancel a replay; False if it has ended or does not exist."""
        return bool(await self._store.run(sql.cancel, id=replay_id, now=now))

    async def take_step(self, step: ReplayStep) -> ReplayStepResult:
        return await self._store.write(take_step, step)

    async def find(self, replay_id: str) -> Replay | None:
        rows = await self._store.read(sql.lists["list"].by(["id"]), id=replay_id, limit=1)
        return _replay(rows[0]) if rows else None

    async def page(self, limit: int, cursor: str | None) -> Page[Replay]:
        """Return a page of replays, newest first."""
        rows = await listed(self._store, sql.lists["list"], {"cursor": cursor}, limit)
        return page_of([_replay(row) for row in rows], limit)

    async def running(self) -> list[RunningReplay]:
        """Return the replays under way, oldest first."""
        return [
            RunningReplay(**{**row, "wanted": msgspec.json.decode(row["wanted"], type=Selection)})
            for row in await self._store.read(sql.select_running)
        ]

    async def bounds(self) -> tuple[int, int]:
        """Return the `seq` before the first event, and that of the last."""
        [row] = await self._store.read(sql.select_bounds)
        return row["first"], row["last"]

    async def candidates(
        self, wanted: Selection, begin: int, last: int, most: int
    ) -> CandidatePage:
        """Return the next `most` events that may match."""
        end = min(begin + _WINDOW, last)
        filters = {
            "since": wanted.since and wanted.since.timestamp(),
            "until": wanted.until and wanted.until.timestamp(),
            "provider": wanted.provider,
            "in_state": wanted.state,
        }
        given: dict[str, Any] = {k: v for k, v in filters.items() if v is not None}
        statement = sql.lists["select_candidates"].by(["stretch", *given])
        found: dict[int, Candidate] = {}
        for row in await self._store.read(statement, **given, next=begin, last=end, most=most):
            seq = row["seq"]
            if seq not in found:
                found[seq] = Candidate(seq, row["type"], _known(row), {})
            if row["handler"] is not None:
                found[seq].states[row["handler"]] = row["state"]
        candidates = [found[seq] for seq in sorted(found)]
        return CandidatePage(candidates, end if len(found) < most else candidates[-1].seq)

    async def due(self, replay_id: str, now: float, most: int) -> int:
        """Count the replay's deliveries that are due and not begun, up to `most`."""
        rows = await self._store.read(sql.count_due, id=replay_id, now=now, most=most)
        return int(rows[0]["number"])


def _known(row: Row) -> CurrentState:
    return CurrentState(
        id=row["prediction_id"],
        provider=row["provider"],
        model=row["model"],
        status=row["status"],
        provider_id=None,
        metadata=row["metadata"],
        reply_to=row["reply_to"],
    )


def _replay(row: Row) -> Replay:
    return Replay(
        **{
            **row,
            "wanted": msgspec.json.decode(row["wanted"]),
            "created_at": rfc3339(row["created_at"]),
            "ended_at": rfc3339(row["ended_at"]),
        }
    )
