"""Constraints of the database reject invalid rows, whatever the code above does."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest

from receiver.model.ids import delivery_id
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.group_commit import Connection
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.schema import EngineName, migrations
from tests.postgres import Database
from tests.store.parts import NOW, SQLite, pred

PREDICTION: dict[str, Any] = {
    "id": pred(1),
    "provider": "fal",
    "model": "m",
    "mode": "queue",
    "status": "queued",
    "input": "{}",
    "metadata": "{}",
    "created_at": NOW,
    "due_at": NOW,
}
END: dict[str, Any] = {"due_at": None, "completed_at": NOW}
SUCCESS: dict[str, Any] = {**END, "status": "succeeded", "output": "[]"}
DELIVERY: dict[str, Any] = {
    "id": delivery_id(pred(1), "greet"),
    "prediction_id": pred(1),
    "handler": "greet",
    "state": "pending",
    "due_at": NOW,
    "created_at": NOW,
}
EVENT: dict[str, Any] = {
    "prediction_id": pred(1),
    "type": "prediction.succeeded",
    "time": NOW,
}
CALLBACK: dict[str, Any] = {
    "prediction_id": pred(1),
    "channel": "webhook",
    "digest": "d1",
    "received_at": NOW,
    "headers": "[]",
    "body": b"",
    "verdict": "accepted",
    "reason": "",
}
ATTEMPT: dict[str, Any] = {
    "delivery_id": delivery_id(pred(1), "greet"),
    "number": 1,
    "started_at": NOW,
    "ended_at": NOW,
    "result": "done",
    "reason": "",
}
STEP: dict[str, Any] = {"delivery_id": delivery_id(pred(1), "greet"), "key": "k", "result": "1"}
FIRST: dict[str, dict[str, Any]] = {
    "predictions": {**PREDICTION, **SUCCESS, "idempotency_key": "k1", "provider_id": "r1"},
    "events": EVENT,
    "deliveries": DELIVERY,
    "callbacks": CALLBACK,
    "attempts": ATTEMPT,
    "steps": STEP,
}


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Yield a plain connection to a database with one row in each main table."""
    path = tmp_path / "receiver.db"
    engine = SQLite(path)
    engine.store.open()
    engine.store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = ON")
        for table, row in FIRST.items():
            insert(connection, table, row)
        yield connection


def insert(connection: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    names, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", row)


def prediction(**given: Any) -> tuple[str, dict[str, Any]]:
    return "predictions", {**PREDICTION, "id": pred(2), **given}


def delivery(**given: Any) -> tuple[str, dict[str, Any]]:
    named = {"id": delivery_id(pred(1), "other"), "handler": "other"}
    return "deliveries", {**DELIVERY, **named, **given}


CLAIMED: dict[str, Any] = {"state": "running", "due_at": None, "owner": "me", "lease_until": NOW}

FORBIDDEN = {
    "a prediction twice": (prediction(id=pred(1)), "predictions.id"),
    "an unknown status": (prediction(status="lost"), "status"),
    "an unknown mode": (prediction(mode="fast"), "mode"),
    "an unknown channel": (prediction(channel="pigeon"), "channel"),
    "a living row that nobody will look at": (prediction(due_at=None), "a_living_row_is_due"),
    "an end that is due": (prediction(**{**SUCCESS, "due_at": NOW}), "a_living_row_is_due"),
    "an end without a time": (
        prediction(**{**SUCCESS, "completed_at": None}),
        "an_end_has_a_time",
    ),
    "a living row with an end's time": (prediction(completed_at=NOW), "an_end_has_a_time"),
    "a success without output": (
        prediction(**{**SUCCESS, "output": None}),
        "success_has_an_output",
    ),
    "an output before the end": (prediction(output="[]"), "success_has_an_output"),
    "a failure without an error": (
        prediction(**END, status="failed"),
        "other_ends_have_an_error",
    ),
    "a success with an error": (
        prediction(**SUCCESS, error_code="timeout"),
        "other_ends_have_an_error",
    ),
    "a provider's id with two owners": (
        prediction(provider_id="r1"),
        "predictions.provider_id",
    ),
    "an idempotency key with two rows": (
        prediction(idempotency_key="k1"),
        "predictions.idempotency_key",
    ),
    "a second event of a prediction": (
        ("events", EVENT),
        "events.prediction_id",
    ),
    "an event of nothing": (
        ("events", {**EVENT, "prediction_id": pred(3)}),
        "FOREIGN KEY",
    ),
    "an event that is no end": (
        ("events", {**EVENT, "type": "prediction.processing"}),
        "type",
    ),
    "a second delivery of an event to a handler": (
        ("deliveries", DELIVERY),
        "deliveries.id",
    ),
    "a delivery under another's name": (
        delivery(id=delivery_id(pred(3), "greet")),
        "a_name_is_of_its_event",
    ),
    "an unknown state": (delivery(state="lost", due_at=None), "state"),
    "a pending delivery that is never due": (
        delivery(due_at=None),
        "a_pending_delivery_is_due",
    ),
    "a running delivery that is due": (
        delivery(**{**CLAIMED, "due_at": NOW}),
        "a_pending_delivery_is_due",
    ),
    "a running delivery of nobody": (
        delivery(**{**CLAIMED, "owner": None, "lease_until": None}),
        "a_running_delivery_is_claimed",
    ),
    "a pending delivery of somebody": (
        delivery(owner="me", lease_until=NOW),
        "a_running_delivery_is_claimed",
    ),
    "a claim for ever": (delivery(**{**CLAIMED, "lease_until": None}), "a_claim_expires"),
    "a lease of nobody": (delivery(lease_until=NOW), "a_claim_expires"),
    "an end of a delivery without a time": (
        delivery(state="done", due_at=None),
        "an_ended_delivery_has_a_time",
    ),
    "a pending delivery with an end's time": (
        delivery(ended_at=NOW),
        "an_ended_delivery_has_a_time",
    ),
    "the same callback twice": (
        ("callbacks", {**CALLBACK, "verdict": "late"}),
        "callbacks.digest",
    ),
    "the same attempt twice": (("attempts", ATTEMPT), "attempts.number"),
    "an attempt of nothing": (("attempts", {**ATTEMPT, "delivery_id": "x"}), "FOREIGN KEY"),
    "the same step twice": (("steps", STEP), "steps.key"),
    "a step of nothing": (("steps", {**STEP, "delivery_id": "x"}), "FOREIGN KEY"),
    "a second probe": (("probe", {"one": 2, "at": NOW}), "one"),
}

ALLOWED = {
    "another prediction": prediction(),
    "the same provider id elsewhere": prediction(provider="oxen", provider_id="r1"),
    "a claimed delivery": delivery(**CLAIMED),
    "a finished delivery": delivery(state="done", due_at=None, ended_at=NOW),
    "the same bytes on another channel": (
        "callbacks",
        {**CALLBACK, "channel": "poll", "verdict": "duplicate"},
    ),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_database_rejects_invalid_row(rows: sqlite3.Connection, name: str) -> None:
    (table, row), words = FORBIDDEN[name]
    with pytest.raises(sqlite3.IntegrityError, match=words):
        insert(rows, table, row)


@pytest.mark.parametrize("name", ALLOWED)
def test_database_accepts_valid_row(rows: sqlite3.Connection, name: str) -> None:
    insert(rows, *ALLOWED[name])


@pytest.mark.anyio
async def test_postgresql_rejects_and_accepts_the_same_rows(database: Database) -> None:
    """All on one connection and in one transaction: a database for each row takes too long."""
    connection = await asyncpg.connect(database.url, server_settings={"search_path": "receiver"})
    try:
        await connection.transaction().start()  # and the end of the connection rolls it back
        for table, row in FIRST.items():
            await insert_there(connection, table, row)
        for name, ((table, row), words) in FORBIDDEN.items():
            with pytest.raises(asyncpg.IntegrityConstraintViolationError) as refused:
                await insert_there(connection, table, row)
            assert words in violated(refused.value), name
        for table, row in ALLOWED.values():
            savepoint = connection.transaction()
            await savepoint.start()
            await insert_there(connection, table, row)
            await savepoint.rollback()
    finally:
        await connection.close()


async def insert_there(connection: Connection, table: str, row: dict[str, Any]) -> None:
    marks = ", ".join(f"${number}" for number in range(1, len(row) + 1))
    async with connection.transaction():  # an inner one, which can fail alone
        await connection.execute(
            f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", *row.values()
        )


def violated(error: asyncpg.IntegrityConstraintViolationError) -> set[str]:
    """Return what an error of PostgreSQL says, in SQLite's words."""
    if isinstance(error, asyncpg.ForeignKeyViolationError):
        return {"FOREIGN KEY"}
    table = error.table_name
    if isinstance(error, asyncpg.UniqueViolationError):
        columns = str(error.detail).partition("(")[2].partition(")")[0].split(", ")
        return {f"{table}.{column}" for column in columns}
    return {str(error.constraint_name).removeprefix(f"{table}_").removesuffix("_check")}


@pytest.mark.parametrize("name", ["sqlite", "postgres"])
def test_every_named_constraint_is_tested(name: EngineName) -> None:
    words = " ".join(migrations(name)).split()
    named = {rule for word, rule in pairwise(words) if word == "CONSTRAINT"}
    assert named
    assert named <= {words for _, words in FORBIDDEN.values()}


PUBLISHED: Final[dict[EngineName, tuple[str, ...]]] = {
    "sqlite": (
        "5d151339854e4ea4",
        "c0869e244e27bd81",
        "c7aa29f57e076a53",
        "fef826bf9d89cb22",
        "5f93fb37e59524f7",
        "fc8f73859a4d30e9",
        "4780307326ac04d5",
    ),
    "postgres": (
        "44a8a9ac5b6a6cd4",
        "1ff4796649735dc1",
        "88db0eade34d6490",
        "df0abb9e80f53e3e",
        "bd8f8f8b2cb0e6c7",
        "fc8f73859a4d30e9",
        "c73084b0ac861490",
    ),
}
"""The beginning of each migration's SHA-256."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_migrations_are_unchanged(name: EngineName) -> None:
    """A database runs each migration once, so that a change needs a new migration."""
    found = tuple(sha256(script.encode()).hexdigest()[:16] for script in migrations(name))
    assert found == PUBLISHED[name]


@pytest.mark.anyio
async def test_both_engines_have_the_same_tables_and_columns(
    rows: sqlite3.Connection, database: Database
) -> None:
    store = PostgresStore(database.url, lambda _: None, PgQueuerJobs())
    await store.migrate()
    there = database.rows(
        "SELECT table_name, column_name, data_type, is_nullable = 'NO' "
        "FROM information_schema.columns WHERE table_schema = 'receiver' "
        "AND table_name <> 'migrations' AND table_name NOT LIKE 'pgqueuer%'"
    )
    here = rows.execute(
        'SELECT t.name, c.name, c.type, c.pk > 0 OR c."notnull" '
        "FROM pragma_table_list t, pragma_table_xinfo(t.name) c "
        "WHERE t.schema = 'main' AND t.name NOT LIKE 'sqlite%'"
    )
    expected = {(*names, TYPES[kind], bool(needed)) for *names, kind, needed in here}
    assert {tuple(column) for column in there} == expected


TYPES: Final = {
    "INTEGER": "bigint",
    "TEXT": "text",
    "REAL": "double precision",
    "BLOB": "bytea",
}
"""PostgreSQL's name of each SQLite type."""
