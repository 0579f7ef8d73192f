"""The store on SQLite: WAL, synchronous=FULL, one writing thread, a few reading ones."""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from receiver.errors import StoreUnavailable, StoreUnusable
from receiver.model import (
    Error,
    Event,
    Output,
    Prediction,
    Status,
    Ticket,
    new_id,
    utc,
)
from receiver.store import queries as q
from receiver.store.schema import MIGRATIONS
from receiver.store.values import (
    Arrival,
    Claim,
    Claims,
    Created,
    Delivery,
    Filter,
    Found,
    Job,
    Known,
    NewPrediction,
    Progress,
    Replayed,
    Ruling,
    Settlement,
    Slots,
    Taken,
    Wanted,
)
from receiver.store.writer import Writer

T = TypeVar("T")

_READERS: Final = 2
_LARGEST_INLINE_BODY: Final = 32 * 1024
"""Bytes up to which a body travels inside the batch's JSON; larger ones are bound one by one."""


class SQLiteStore:
    """All that is remembered. Every method that writes returns after its commit.

    Raises StoreUnavailable when the disk does not take writes; then nothing was kept.
    """

    def __init__(self, path: str, report: Callable[[StoreUnavailable | None], None]) -> None:
        self._path = path
        self._lock = _FileLock(path)
        self._writer = Writer(partial(_connect, path), report)
        self._local = threading.local()
        self._reading: list[sqlite3.Connection] = []
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="receiver-reader")

    def open(self) -> None:
        """Lock, open and migrate the file, or raise StoreUnusable with what to do."""
        try:
            self._lock.acquire()
            self._writer.start()
        except (OSError, sqlite3.Error) as error:
            raise StoreUnusable(
                f"cannot open the database {self._path}: {error}; "
                "set RECEIVER_DATABASE_URL to a file in a folder that can be written"
            ) from error

    def close(self) -> None:
        """Commit what waits and give the file free."""
        self._writer.close()
        self._readers.shutdown()
        for connection in self._reading:
            connection.close()
        self._lock.release()

    # --- predictions ---

    async def create(self, new: NewPrediction) -> Created:
        return await self._writer.write(_create, new)

    async def begin_submits(self, slots: Slots) -> list[Job]:
        """Move queued predictions to `submitting`, oldest first, as many as there is room for."""
        return await self._writer.write(_begin_submits, slots)

    async def progress(self, progress: Progress) -> None:
        await self._writer.write(_progress, progress)

    async def claim_due(self, now: float, hold_until: float, most: int) -> list[Job]:
        """Take the living predictions that are due, and make them due again at `hold_until`."""
        return await self._writer.write(_claim_due, (now, hold_until, most))

    async def mark_cancel(self, prediction_id: str) -> None:
        await self._writer.write(_mark_cancel, prediction_id)

    async def recover(self, owner: str, now: float) -> None:
        """At start: what dead processes were doing is owed again, or in doubt."""
        await self._writer.write(_recover, (owner, now))

    async def job(self, prediction_id: str) -> Job | None:
        rows = await self._read(q.SELECT_JOB, (prediction_id,))
        return _job(rows[0]) if rows else None

    async def prediction(self, prediction_id: str) -> Prediction | None:
        rows = await self._read(q.SELECT_PREDICTION, (prediction_id,))
        return _prediction(rows[0]) if rows else None

    async def predictions(self, wanted: Filter) -> Found:
        given = {"status": wanted.status, "provider": wanted.provider, "cursor": wanted.cursor}
        rows = await self._list(q.LIST_PREDICTIONS, q.PREDICTION_CLAUSES, given, wanted.limit)
        return _page([_prediction(row) for row in rows], wanted.limit)

    async def find(self, provider: str, provider_id: str) -> str | None:
        """Give our id for the provider's."""
        rows = await self._read(q.SELECT_ID_BY_PROVIDER_ID, (provider, provider_id))
        return rows[0][0] if rows else None

    async def next_due(self) -> float | None:
        return (await self._read(q.NEXT_DUE))[0][0]  # type: ignore[no-any-return]

    async def stale(self, provider: str, before: float, most: int) -> list[str]:
        """Name predictions that have been queued since before then."""
        return [row[0] for row in await self._read(q.SELECT_STALE, (provider, before, most))]

    async def hasten(self, provider: str, now: float) -> None:
        """Make every prediction that is at the provider due for a look."""
        await self._writer.write(_hasten, (provider, now))

    async def next_queued(self, provider: str) -> float | None:
        return (await self._read(q.NEXT_QUEUED, (provider,)))[0][0]  # type: ignore[no-any-return]

    async def submit_times(self, provider: str, since: float) -> list[float]:
        """Give when submits were begun since then, for limits that outlive a restart."""
        oldest = new_id("pred", max(since - 86400.0, 0.0))
        rows = await self._read(q.SELECT_SUBMIT_TIMES, (provider, oldest, since))
        return [row[0] for row in rows]

    # --- the inbox ---

    async def accept(self, arrival: Arrival) -> Taken:
        """Take one outcome: evidence, new state, event and deliveries in one transaction."""
        try:
            return await self._writer.write(_accept, arrival)
        except sqlite3.IntegrityError:
            # The one rule a stranger's words can run into: a provider's id has one owner.
            return Taken("mismatch", None, "its id belongs to another prediction")

    # --- deliveries ---

    async def claim(self, wanted: Wanted) -> Claims:
        return await self._writer.write(_claim, wanted)

    async def settle(self, settlement: Settlement) -> bool:
        """End an attempt; False if the claim was lost meanwhile, and then nothing changed."""
        return await self._writer.write(_settle, settlement)

    async def release(self, owner: str, now: float) -> None:
        """Give back every claim of `owner`, as if it had not been made."""
        await self._writer.write(_release, (owner, now))

    def renew(self, owner: str, lease_until: float) -> None:
        """Keep the claims of `owner`; from any thread, so that a blocked loop keeps them too."""
        self._writer.post(_renew, (owner, lease_until))

    async def reclaim(self, owner: str, now: float) -> list[str]:
        """Owe again what was claimed by somebody whose lease ran out; name the handlers."""
        return await self._writer.write(_reclaim, (owner, now, False))

    async def replay(
        self, prediction_id: str, match: Callable[[Known, str], Sequence[str]], now: float
    ) -> Replayed:
        """Owe the event of a prediction to its matching handlers again."""
        return await self._writer.write(_replay, (prediction_id, match, now))

    async def retry(self, delivery_id: str, now: float) -> str | None:
        """Owe one dead or skipped delivery again (a pending one: at once); name its handler."""
        return await self._writer.write(_retry, (delivery_id, now))

    async def deliveries(self, limit: int, **given: str | None) -> Found:
        """List by any of: state, handler, prediction, id, cursor."""
        rows = await self._list(q.LIST_DELIVERIES, q.DELIVERY_CLAUSES, given, limit)
        return _page([_delivery(row) for row in rows], limit)

    async def owed(self) -> dict[str, int]:
        """Count pending deliveries by handler."""
        return dict(await self._read(q.COUNT_OWED))

    async def recall(self, delivery_id: str, key: str) -> str | None:
        """Give the remembered result of a handler's sub-step, as JSON."""
        rows = await self._read(q.SELECT_STEP, (delivery_id, key))
        return rows[0][0] if rows else None

    async def remember(self, delivery_id: str, key: str, result: str) -> None:
        await self._writer.write(_remember, (delivery_id, key, result))

    async def probe(self, now: float) -> None:
        """Write one row for nothing, to know that it can be done."""
        await self._writer.write(_probe, now)

    # --- reading ---

    async def _read(self, sql: str, params: Sequence[Any] | Mapping[str, Any] = ()) -> list[Any]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, self._read_now, sql, params)

    async def _list(
        self, sql: str, clauses: Mapping[str, str], given: Mapping[str, Any], limit: int
    ) -> list[Any]:
        params = {name: value for name, value in given.items() if value is not None}
        terms = " AND ".join(clauses[name] for name in params)
        where = f"WHERE {terms}" if terms else ""
        return await self._read(sql.format(where=where), {**params, "limit": limit + 1})

    def _read_now(self, sql: str, params: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
        try:
            connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = _open(self._path)
                self._reading.append(connection)
                connection.execute("PRAGMA query_only = ON")
            return connection.execute(sql, params).fetchall()
        except sqlite3.OperationalError as error:
            self._local.connection = None
            raise StoreUnavailable(f"the database cannot be read: {error}") from error


class _FileLock:
    """A lock on `<path>.lock` that dies with its process, however that ends."""

    def __init__(self, path: str) -> None:
        self._path = f"{path}.lock"
        self._fd: int | None = None

    def acquire(self) -> None:
        Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 20).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise StoreUnusable(
                f"the database {self._path.removesuffix('.lock')} is in use by another receiver "
                f"(process {holder}): stop that one first, or give this one its own file by "
                "RECEIVER_DATABASE_URL=sqlite:///other.db"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._fd = fd

    def release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _open(path: str) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)


def _connect(path: str) -> sqlite3.Connection:
    connection = _open(path)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: str) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StoreUnusable(
            f"the database {path} was written by a newer receiver (schema {version}, this one "
            f"knows {len(MIGRATIONS)}): upgrade this receiver, or use another file"
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        # executescript commits what is open, so the transaction is in the script itself.
        connection.executescript(f"BEGIN;{script};PRAGMA user_version = {number};COMMIT;")


# --- operations: functions of a connection and all the items that wait -----------------------------


def _text(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _create(cx: sqlite3.Connection, items: Sequence[NewPrediction]) -> list[Created]:
    return [_create_one(cx, new) for new in items]


def _create_one(cx: sqlite3.Connection, new: NewPrediction) -> Created:
    row = msgspec.structs.asdict(new) | {"input": _text(new.input), "metadata": _text(new.metadata)}
    if cx.execute(q.INSERT_PREDICTION, row).rowcount:
        return Created(new.id, is_new=True, fingerprint=new.fingerprint)
    first = cx.execute(q.SELECT_BY_IDEMPOTENCY_KEY, (new.idempotency_key,)).fetchone()
    return Created(first[0], is_new=False, fingerprint=first[1])


def _begin_submits(cx: sqlite3.Connection, items: Sequence[Slots]) -> list[list[Job]]:
    return [_begin_some(cx, slots) for slots in items]


def _begin_some(cx: sqlite3.Connection, slots: Slots) -> list[Job]:
    most = slots.most
    if slots.max_in_flight is not None:
        in_flight = cx.execute(q.COUNT_IN_FLIGHT, (slots.provider,)).fetchone()[0]
        most = min(most, slots.max_in_flight - in_flight)
    if most <= 0:
        return []
    row = msgspec.structs.asdict(slots) | {"most": most}
    rows = cx.execute(q.BEGIN_SUBMITS, row).fetchall()
    return sorted((_job(row) for row in rows), key=lambda job: job.ticket.id)


_PROGRESS: Final = {
    "accepted": q.ACCEPT_SUBMIT,
    "postponed": q.POSTPONE_SUBMIT,
    "ambiguous": q.DOUBT_SUBMIT,
    "looked": q.LOOKED,
}


def _progress(cx: sqlite3.Connection, items: Sequence[Progress]) -> list[None]:
    for item in items:
        row = msgspec.structs.asdict(item) | {"links": _text(item.links)}
        cx.execute(_PROGRESS[item.cause], row)
    return [None] * len(items)


def _claim_due(
    cx: sqlite3.Connection, items: Sequence[tuple[float, float, int]]
) -> list[list[Job]]:
    return [
        [
            _job(row)
            for row in cx.execute(
                q.CLAIM_DUE, {"now": now, "hold_until": hold_until, "most": most}
            ).fetchall()
        ]
        for now, hold_until, most in items
    ]


def _hasten(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[None]:
    for provider, now in items:
        cx.execute(q.HASTEN_LOOKS, {"provider": provider, "now": now})
    return [None] * len(items)


def _mark_cancel(cx: sqlite3.Connection, items: Sequence[str]) -> list[None]:
    cx.executemany(q.MARK_CANCEL, [(item,) for item in items])
    return [None] * len(items)


def _recover(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[None]:
    for owner, now in items:
        cx.execute(q.DOUBT_ABANDONED_SUBMITS, {"now": now})
        params = {"owner": owner, "now": now, "everyone": True, "reason": "its process died"}
        cx.execute(q.RECLAIM, params).fetchall()
    return [None] * len(items)


def _accept(cx: sqlite3.Connection, items: Sequence[Arrival]) -> list[Taken]:
    """Rule on every arrival in order, then write all their consequences in four statements."""
    known = _known(cx, (item.prediction_id for item in items))
    batch = _Batch()
    taken = [_rule(known, item, batch) for item in items]
    batch.write(cx)
    return taken


def _known(cx: sqlite3.Connection, ids: Iterable[str]) -> dict[str, Known]:
    text = cx.execute(q.SELECT_KNOWN, {"rows": _text(list(ids))}).fetchone()[0]
    return {row.id: row for row in msgspec.json.decode(text, type=list[Known])}


def _rule(known: dict[str, Known], arrival: Arrival, batch: _Batch) -> Taken:
    before = known.get(arrival.prediction_id)
    if before is None:
        batch.keep(arrival, "unknown", "no such prediction")
        return Taken("unknown", None, "no such prediction")
    if arrival.only_from is not None and before.status not in arrival.only_from:
        return Taken("late", before.status, f"already {before.status}")
    ruling = arrival.judge(before, arrival)
    if ruling.verdict != "mismatch":
        batch.add(arrival, ruling)
        provider_id = before.provider_id or arrival.outcome.provider_id
        known[before.id] = msgspec.structs.replace(
            before, status=ruling.status, provider_id=provider_id
        )
    handlers = tuple(handler for _, handler in ruling.deliveries)
    return Taken(ruling.verdict, ruling.status, ruling.reason, ruling.event_id, handlers)


class _Batch:
    """Rows to be written together."""

    def __init__(self) -> None:
        self._callbacks: list[tuple[Any, ...]] = []
        self._large_callbacks: list[tuple[Any, ...]] = []
        self._ends: list[tuple[Any, ...]] = []
        self._events: list[tuple[Any, ...]] = []
        self._deliveries: list[tuple[Any, ...]] = []
        self._notes: list[dict[str, Any]] = []

    def add(self, arrival: Arrival, ruling: Ruling) -> None:
        # "Still running", as a poll says it again and again, is not evidence of anything.
        if arrival.channel is not None and (ruling.verdict != "noted" or arrival.headers != "[]"):
            self.keep(arrival, ruling.verdict, ruling.reason)
        if ruling.verdict == "accepted":
            self._end(arrival, ruling)
        elif ruling.verdict in {"ask", "noted"}:
            self._notes.append(
                {
                    "id": arrival.prediction_id,
                    "status": ruling.status,
                    "provider_id": arrival.outcome.provider_id,
                    "due_at": arrival.at if ruling.verdict == "ask" else 1e12,
                }
            )

    def keep(self, arrival: Arrival, verdict: str, reason: str) -> None:
        body = arrival.body if verdict != "duplicate" else b""
        digest = blake2b(arrival.body, digest_size=16).hexdigest()
        try:
            text = body.decode() if b"\0" not in body else None
        except UnicodeDecodeError:
            text = None
        head = (arrival.prediction_id, arrival.channel, digest, arrival.at, arrival.headers)
        if text is None or len(body) > _LARGEST_INLINE_BODY:
            value = body if text is None else text
            self._large_callbacks.append((*head, value, verdict, reason))
        else:
            self._callbacks.append((*head, text, verdict, reason))

    def _end(self, arrival: Arrival, ruling: Ruling) -> None:
        outcome = arrival.outcome
        error = outcome.error
        self._ends.append(
            (
                arrival.prediction_id,
                ruling.status,
                outcome.provider_id,
                _text(outcome.output) if ruling.status is Status.SUCCEEDED else None,
                error.code if error else None,
                error.message if error else None,
                arrival.channel,
                arrival.at,
            )
        )
        self._events.append(
            (ruling.event_id, arrival.prediction_id, ruling.event_type, arrival.at, arrival.channel)
        )
        self._deliveries.extend(
            (delivery_id, ruling.event_id, handler, arrival.at)
            for delivery_id, handler in ruling.deliveries
        )

    def write(self, cx: sqlite3.Connection) -> None:
        for sql, rows in (
            (q.INSERT_CALLBACKS, self._callbacks),
            (q.END_PREDICTIONS, self._ends),
            (q.INSERT_EVENTS, self._events),
            (q.INSERT_DELIVERIES, self._deliveries),
        ):
            if rows:
                cx.execute(sql, {"rows": _text(rows)})
        if self._large_callbacks:
            cx.executemany(q.INSERT_CALLBACK, self._large_callbacks)
        if self._notes:
            cx.executemany(q.NOTE_PREDICTION, self._notes)


def _claim(cx: sqlite3.Connection, items: Sequence[Wanted]) -> list[Claims]:
    return [_claim_for(cx, wanted) for wanted in items]


def _claim_for(cx: sqlite3.Connection, wanted: Wanted) -> Claims:
    params = msgspec.structs.asdict(wanted)
    text = cx.execute(q.SELECT_WANTED, params).fetchone()[0]
    claims = [_claimed(row, wanted.handler) for row in msgspec.json.decode(text)]
    if claims:
        params["rows"] = _text([claim.id for claim in claims])
        cx.execute(q.CLAIM_DELIVERIES, params)
    next_due = None
    if len(claims) < wanted.most:
        next_due = cx.execute(q.NEXT_PENDING, (wanted.handler,)).fetchone()[0]
    return Claims(claims, next_due)


def _claimed(row: list[Any], handler: str) -> Claim:
    delivery_id, attempts, rounds, claims, event_id, kind, time, channel, *rest, raw = row
    return Claim(
        id=delivery_id,
        handler=handler,
        attempt=attempts + 1,
        round=rounds,
        number=claims + 1,
        event=Event(
            id=event_id,
            type=kind,
            time=utc(time),
            channel=channel,
            prediction=_prediction(rest),
            raw=None if raw is None else msgspec.json.decode(raw),
        ),
    )


def _settle(cx: sqlite3.Connection, items: Sequence[Settlement]) -> list[bool]:
    params = {"rows": _text([_settlement_row(item) for item in items])}
    held = msgspec.json.decode(cx.execute(q.SELECT_HELD, params).fetchone()[0])
    cx.execute(q.INSERT_ATTEMPTS, params)
    cx.execute(q.SETTLE_DELIVERIES, params)
    mine = {(delivery_id, number) for delivery_id, number in held}
    return [(item.id, item.number) in mine for item in items]


def _settlement_row(item: Settlement) -> tuple[Any, ...]:
    pending = item.decision.state == "pending"
    return (
        item.id,
        item.owner,
        item.number,
        item.started_at,
        item.ended_at,
        item.result,
        item.decision.reason,
        item.decision.state,
        item.ended_at + item.decision.delay if pending else None,
        None if pending else item.ended_at,
    )


def _release(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[None]:
    for owner, now in items:
        cx.execute(q.RELEASE_DELIVERIES, {"owner": owner, "now": now})
    return [None] * len(items)


def _renew(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[None]:
    for owner, lease_until in items:
        cx.execute(q.RENEW_LEASES, {"owner": owner, "lease_until": lease_until})
    return [None] * len(items)


def _reclaim(cx: sqlite3.Connection, items: Sequence[tuple[str, float, bool]]) -> list[list[str]]:
    found = []
    for owner, now, everyone in items:
        params = {"owner": owner, "now": now, "everyone": everyone, "reason": "its lease ran out"}
        found.append([row[0] for row in cx.execute(q.RECLAIM, params).fetchall()])
    return found


_Replay = tuple[str, Callable[[Known, str], Sequence[str]], float]


def _replay(cx: sqlite3.Connection, items: Sequence[_Replay]) -> list[Replayed]:
    return [_replay_one(cx, *item) for item in items]


def _replay_one(
    cx: sqlite3.Connection,
    prediction_id: str,
    match: Callable[[Known, str], Sequence[str]],
    now: float,
) -> Replayed:
    event = cx.execute(q.SELECT_EVENT, (prediction_id,)).fetchone()
    if event is None:
        return Replayed(None)
    event_id, event_type = event
    known = _known(cx, [prediction_id])[prediction_id]
    rows = [(new_id("dlv", now), event_id, name, now) for name in match(known, event_type)]
    owed = cx.execute(q.REPLAY_DELIVERIES, {"rows": _text(rows)}).fetchall()
    cx.execute(q.FORGET_STEPS, {"rows": _text([delivery_id for delivery_id, _ in owed])})
    return Replayed(len(owed), tuple(handler for _, handler in owed))


def _retry(cx: sqlite3.Connection, items: Sequence[tuple[str, float]]) -> list[str | None]:
    return [_retry_one(cx, {"id": delivery_id, "now": now}) for delivery_id, now in items]


def _retry_one(cx: sqlite3.Connection, params: dict[str, Any]) -> str | None:
    for sql in (q.RETRY_DELIVERY, q.HASTEN_DELIVERY):
        rows = cx.execute(sql, params).fetchall()
        if rows:
            return str(rows[0][0])
    return None


def _remember(cx: sqlite3.Connection, items: Sequence[tuple[str, str, str]]) -> list[None]:
    cx.executemany(q.INSERT_STEP, items)
    return [None] * len(items)


def _probe(cx: sqlite3.Connection, items: Sequence[float]) -> list[None]:
    cx.execute(q.PROBE, (items[-1], items[-1]))
    return [None] * len(items)


# --- rows to values --------------------------------------------------------------------------------


def _job(row: Sequence[Any]) -> Job:
    (
        prediction_id,
        provider,
        model,
        mode,
        status,
        input_text,
        provider_id,
        links,
        submitted_at,
        cancel_requested,
        submits,
        polls,
        created_at,
        deadline_at,
    ) = row
    return Job(
        ticket=Ticket(
            id=prediction_id,
            model=model,
            mode=mode,
            input=msgspec.json.decode(input_text),
            provider_id=provider_id,
            links=msgspec.json.decode(links),
            submitted_at=submitted_at,
            cancel_requested=bool(cancel_requested),
        ),
        provider=provider,
        status=Status(status),
        submits=submits,
        polls=polls,
        created_at=created_at,
        deadline_at=deadline_at,
    )


def _prediction(row: Sequence[Any]) -> Prediction:
    (
        prediction_id,
        provider,
        model,
        status,
        mode,
        input_text,
        metadata,
        provider_id,
        output,
        error_code,
        error_message,
        channel,
        parent_id,
        created_at,
        submitted_at,
        completed_at,
    ) = row
    return Prediction(
        id=prediction_id,
        provider=provider,
        model=model,
        status=Status(status),
        mode=mode,
        input=msgspec.json.decode(input_text),
        metadata=msgspec.json.decode(metadata),
        provider_id=provider_id,
        output=None if output is None else msgspec.json.decode(output, type=list[Output]),
        error=Error(code=error_code, message=error_message) if error_code else None,
        channel=channel,
        parent_id=parent_id,
        created_at=utc(created_at),
        submitted_at=None if submitted_at is None else utc(submitted_at),
        completed_at=None if completed_at is None else utc(completed_at),
    )


def _delivery(row: Sequence[Any]) -> Delivery:
    *head, created_at, due_at, ended_at, history = row
    names = ("id", "event_id", "prediction_id", "handler", "state", "attempts", "reason")
    return Delivery(
        **dict(zip(names, head, strict=True)),
        created_at=_rfc3339(created_at),
        due_at=None if due_at is None else _rfc3339(due_at),
        ended_at=None if ended_at is None else _rfc3339(ended_at),
        history=[
            {
                **attempt,
                "started_at": _rfc3339(attempt["started_at"]),
                "ended_at": _rfc3339(attempt["ended_at"]),
            }
            for attempt in msgspec.json.decode(history)
        ],
    )


def _rfc3339(seconds: float) -> str:
    return utc(seconds).isoformat().replace("+00:00", "Z")


def _page(rows: list[Any], limit: int) -> Found:
    more = len(rows) > limit
    data = rows[:limit]
    return Found(data=data, next_cursor=data[-1].id if more else None)
