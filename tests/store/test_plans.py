"""Frequent statements find their rows by an index, however many predictions there are."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest

from receiver.store import (
    attempts,
    budgets,
    changes,
    costs,
    deliveries,
    discarded,
    disposal,
    due,
    erasure,
    inbox,
    limits,
    orders,
    predictions,
    private,
    search,
)
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.group_commit import Connection
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.statement import Listing, Statement
from tests.postgres import Database
from tests.store.parts import SQLite, pred

BIG: Final = {
    *("predictions", "callbacks", "events", "deliveries", "attempts", "changes"),
    *("order_counts", "ledger", "cost_sums", "cost_questions"),
}
MOST: Final = 5000
"""Most steps of SQLite's virtual machine: a scan of 20,000 rows, or 100,000, takes many more."""

# Predictions of fal: 2,000 ended, 100,000 in flight, 20,000 queued.
_FILL: Final = (
    """INSERT INTO predictions (id, provider, model, mode, status, input, metadata, provider_id,
            output, channel, created_at, submitted_at, completed_at, due_at, deadline_at)
        SELECT 'pred_' || {id}, 'fal', 'm', 'queue',
            CASE WHEN n <= 2000 THEN 'succeeded' WHEN n <= 102000 THEN 'processing'
                 ELSE 'queued' END, '{{}}', '{{}}', 'theirs-' || n,
            CASE WHEN n <= 2000 THEN '[]' END, 'webhook', n, n,
            CASE WHEN n <= 2000 THEN n END, CASE WHEN n > 2000 THEN n END, 1000000
        FROM {numbers:122000}""",
    """INSERT INTO callbacks
            (prediction_id, channel, digest, received_at, headers, body, verdict, reason)
        SELECT 'pred_' || {id}, 'webhook', CAST(n AS TEXT), n, '[]', '{{}}', 'accepted', ''
        FROM {numbers:2000}""",
    """INSERT INTO events (prediction_id, type, time, channel)
        SELECT 'pred_' || {id}, 'prediction.succeeded', n, 'webhook' FROM {numbers:2000}""",
    """INSERT INTO deliveries (id, prediction_id, handler, state, attempts, claims, due_at, owner,
            lease_until, created_at, ended_at, after)
        SELECT 'dlv_' || {id} || '00000000', 'pred_' || {id}, 'greet',
            CASE WHEN n % 4 = 0 THEN 'pending' WHEN n % 100 = 1 THEN 'running' ELSE 'done' END,
            1, 1, CASE WHEN n % 4 = 0 THEN n END, CASE WHEN n % 100 = 1 THEN 'me' END,
            CASE WHEN n % 100 = 1 THEN n END, n,
            CASE WHEN n % 4 <> 0 AND n % 100 <> 1 THEN n END,
            CASE WHEN n % 16 = 0 THEN '["save"]' ELSE '[]' END
        FROM {numbers:2000}""",
    """INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason)
        SELECT 'dlv_' || {id} || '00000000', 1, n, n, 'done', ''
        FROM {numbers:2000} WHERE n % 4 <> 0 AND n % 100 <> 1""",
    """INSERT INTO order_counts (subject, until, orders, spent)
        SELECT CAST(n AS TEXT), CASE WHEN n % 100 = 0 THEN 2000000 ELSE n END, 1, 1
        FROM {numbers:5000}""",
    """INSERT INTO ledger (prediction_id, entry, amount, at)
        SELECT 'pred_' || {id}, 'reserved', 1, n FROM {numbers:5000}""",
    """INSERT INTO cost_sums (day, provider, model, account, shard, predictions, amount, unknown)
        SELECT n, 'fal', 'm', '', 0, 1, 1, 0 FROM {numbers:20000}""",
    """INSERT INTO cost_questions (prediction_id, provider, due_at)
        SELECT 'pred_' || {id}, 'fal', n FROM {numbers:2000}""",
    """INSERT INTO requests (provider, at, requests) SELECT 'fal', n, 1 FROM {numbers:2000}""",
)
_SQLITE_NUMBERS: Final = (
    r"(WITH RECURSIVE s (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM s WHERE n < \1)"
    r" SELECT n FROM s) s"
)


def filling(numbers: str, id_of_n: str) -> Iterator[str]:
    for text in _FILL:
        with_ids = text.replace("{id}", id_of_n).replace("{{}}", "{}")
        yield re.sub(r"\{numbers:(\d+)\}", numbers, with_ids)


def _delivery(number: int) -> str:
    return f"dlv_{number:032d}00000000"


_LIVING: Final = [(pred(number),) for number in (2001, 9000, 110_000)]
_ENDED: Final = [(pred(number),) for number in (4, 8, 12)]
_PENDING: Final = [(_delivery(number),) for number in (4, 8, 12)]
_RUNNING: Final = [(_delivery(number),) for number in (101, 201, 301)]
_CALLBACKS: Final = [
    (name, "poll", "4", 1.0, "[]", b"{}", "late", "", 0, None) for (name,) in _LIVING
]
_ENDS: Final = [
    (name, "succeeded", None, "[]", None, None, "webhook", 1.0, 40_000, "recipe")
    for (name,) in _LIVING
]
_EVENTS: Final = [(name, "prediction.succeeded", 1.0, "webhook", 0) for (name,) in _LIVING]
_NEW: Final = [
    (_delivery(number), pred(number), "greet", 1.0, 2.0, "[]", "") for number in (2001, 9000)
]
_SETTLED: Final = [
    (name, "me", 1, 1.0, 2.0, "done", "", "", "done", None, 2.0) for (name,) in _RUNNING
]
_PARAMS: Final[dict[str, Any]] = {
    "provider": "fal",
    "now": 1_000_000.0,
    "before": 3000.0,
    "age": 1.0,
    **dict.fromkeys(("hour", "day", "month"), 3000.0),
    "since": 1990.0,
    "most": 10,
    "limit": 51,
    "largest": 1000,
    "max_in_flight": 10,
    "hold_until": 4000.0,
    "held_until": 4000.0,
    "submits": 1,
    "lease_until": 4000.0,
    "deadline": 9000.0,
    "due_at": 5000.0,
    "created_at": 1.0,
    "owner": "me",
    "id": pred(9000),
    "prediction_id": pred(4),
    "provider_id": "theirs-9000",
    "idempotency_key": "k",
    "model": "m",
    "mode": "queue",
    "input": "{}",
    "metadata": "{}",
    "parent_id": pred(4),
    "fingerprint": None,
    "trace": None,
    "reply_to": None,
    "private": None,
    "ordered": None,
    "latest_at": None,
    "price": None,
    "cost": None,
    "price_source": None,
    "reserved": None,
    "account": "",
    "day": 20_000,
    "first": 19_990,
    "status": "processing",
    "cursor": pred(21_000),
    "state": "dead",
    "handler": "greet",
    "prediction": pred(4),
    "links": "{}",
    "key": "k",
    "delivery_id": _delivery(4),
    "everyone": False,
    "everything": True,
    "reason": "",
    "succeeded_before": 3000.0,
    "failed_before": 3000.0,
    "canceled_before": 3000.0,
    "dead_before": 3000.0,
    "horizon": pred(122_000),
    "young": 3000.0,
    "kept": 10,
    "requests": 1,
    "result": "1",
    "after": 10,
    "end": 100,
    "below": 1000,
    "recipe": "imagine",
    "person": "slack:T/U",
    "until": pred(30_000),
    "bound": pred(40_000),
    "text": "boat",
    "needle": "boat",
    "models": "%m%",
}


def by(listing: Listing, *filters: str) -> Statement:
    return listing.by(filters)


_LIST: Final = predictions.sql.lists["list_predictions"]
_SCAN: Final = predictions.sql.lists["scan_predictions"]
_DELIVERIES: Final = deliveries.sql.lists["list_deliveries"]
HOT: Final[dict[str, tuple[Statement, Sequence[Sequence[Any]] | None]]] = {
    **{
        name: (getattr(predictions.sql, name), None)
        for name in (
            "insert_prediction",
            "select_by_idempotency_key",
            "begin_submits",
            "mark_sent",
            "count_in_flight",
            "next_queued",
            "select_late",
            "accept_submit",
            "postpone_submit",
            "mark_unconfirmed",
            "record_poll",
            "claim_due",
            "next_due",
            "select_stale",
            "select_job",
            "mark_cancel",
            "select_id_by_provider_id",
            "select_prediction",
            "select_account",
            "select_result",
        )
    },
    "select_known": (inbox.sql.select_known, _LIVING),
    "insert_callbacks": (inbox.sql.insert_callbacks, _CALLBACKS),
    "end_predictions": (predictions.sql.end_predictions, _ENDS),
    "note_prediction": (inbox.sql.note_prediction, None),
    "insert_events": (inbox.sql.insert_events, _EVENTS),
    "insert_deliveries": (inbox.sql.insert_deliveries, _NEW),
    "select_wanted": (deliveries.sql.select_wanted, None),
    "claim_deliveries": (deliveries.sql.claim_deliveries, _PENDING),
    "select_these": (deliveries.sql.select_these, _PENDING),
    "take_deliveries": (deliveries.sql.take_deliveries, _PENDING),
    "select_leases": (deliveries.sql.select_leases, _PENDING),
    "next_pending": (deliveries.sql.next_pending, None),
    "select_held": (deliveries.sql.select_held, _SETTLED),
    "insert_attempts": (deliveries.sql.insert_attempts, _SETTLED),
    "settle_deliveries": (deliveries.sql.settle_deliveries, _SETTLED),
    "select_waiting": (deliveries.sql.select_waiting, _ENDED),
    "select_unended": (deliveries.sql.select_unended, _PENDING),
    "stop_waiting": (deliveries.sql.stop_waiting, _PENDING),
    "renew_leases": (deliveries.sql.renew_leases, _RUNNING),
    "reclaim_these": (deliveries.sql.reclaim_these, _RUNNING),
    "reclaim": (deliveries.sql.reclaim, None),
    "release_deliveries": (deliveries.sql.release_deliveries, _PENDING),
    "reclaim_own": (deliveries.sql.reclaim_own, _PENDING),
    "select_replayable": (deliveries.sql.select_replayable, _ENDED),
    "mark_matched": (deliveries.sql.mark_matched, _ENDED),
    "select_step": (deliveries.sql.select_step, None),
    "insert_step": (deliveries.sql.insert_step, None),
    "select_erased": (deliveries.sql.select_erased, None),
    "retry_delivery": (deliveries.sql.retry_delivery, None),
    "hasten_delivery": (deliveries.sql.hasten_delivery, None),
    "count_requests": (limits.sql.count_requests, None),
    "select_changes": (changes.sql.select_changes, None),
    "select_events_below": (changes.sql.select_events_below, None),
    "select_events": (changes.sql.select_events, _ENDED),
    "select_attempts": (attempts.sql.select_attempts, [(_delivery(n), 1) for n in (2, 3, 5)]),
    "select_old": (disposal.sql.select_old, None),
    "hold_predictions": (disposal.sql.hold_predictions, _ENDED),
    "hold_deliveries": (disposal.sql.hold_deliveries, _ENDED),
    "select_free": (disposal.sql.select_free, _ENDED),
    "select_cut": (disposal.sql.select_cut, None),
    "select_unneeded": (disposal.sql.select_unneeded, None),
    "select_orphans": (disposal.sql.select_orphans, None),
    "delete_callbacks": (disposal.sql.delete_callbacks, [(pred(4), "webhook", "4")]),
    "blank_callbacks": (erasure.sql.blank_callbacks, None),
    "blank_attempts": (erasure.sql.blank_attempts, _PENDING),
    "select_due": (due.sql.select_due, [("fal",)]),
    "select_order": (orders.sql.select_order, None),
    "blank_options": (orders.sql.blank_options, _ENDED),
    "forget_counts": (budgets.sql.forget_counts, None),
    "fullest": (budgets.sql.fullest, None),
    "hold_spent": (budgets.sql.hold_spent, [("7",), ("8",)]),
    "correct_spent": (budgets.sql.correct_spent, [("7", 7.0, -1), ("8", 8.0, 2)]),
    "delete_ledger": (budgets.sql.delete_ledger, _ENDED),
    "add_sums": (costs.sql.add_sums, [(20_000, "fal", "m", "", 1, 40_000, 0)]),
    "select_sums": (costs.sql.select_sums, None),
    "select_totals": (costs.sql.select_totals, None),
    "hold_sums": (costs.sql.hold_sums, None),
    "delete_sums": (costs.sql.delete_sums, [(0,)]),
    "insert_questions": (costs.sql.insert_questions, [(pred(3), "fal", 1.0, None)]),
    "select_questions": (costs.sql.select_questions, None),
    "postpone_questions": (costs.sql.postpone_questions, [(name, 1.0) for (name,) in _ENDED]),
    "delete_questions": (costs.sql.delete_questions, _ENDED),
    "hold_costs": (costs.sql.hold_costs, _ENDED),
    "set_costs": (costs.sql.set_costs, [(name, 1, "provider") for (name,) in _ENDED]),
    "select_spent": (private.sql.select_spent, None),
    "empty_spent": (private.sql.empty_spent, _ENDED),
    "unmatched": (by(discarded.sql.lists["list_unmatched"], "base", "cursor"), None),
    "callbacks": (by(discarded.sql.lists["list_callbacks"], "base", "cursor"), None),
    **{
        f"list by {', '.join(names)}": (by(_LIST, *names), None)
        for names in (
            [],
            ["living"],
            ["living", "provider"],
            ["living", "provider", "cursor"],
            ["unsuccessful"],
            ["provider"],
            ["cursor"],
            ["since"],
            ["living", "provider", "since", "cursor"],
        )
    },
    **{
        f"scan by {', '.join(names)}": (by(_SCAN, *names), None)
        for names in (["living", "provider", "cursor"], ["unsuccessful", "since"], ["since"])
    },
    "select_predictions": (predictions.sql.select_predictions, _LIVING),
    **{
        f"search by {', '.join(names)}": (by(search.sql.lists["search"], *names), None)
        for names in (
            ["cursor"],
            ["person"],
            ["person", "recipe", "since", "until"],
            ["recipe"],
            ["recipe", "cursor"],
            ["unsuccessful", "until"],
            ["unsuccessful", "text", "bound"],
            ["provider"],
            ["provider", "cursor"],
            ["model"],
            ["model", "provider", "until", "bound"],
            ["models", "bound"],
            ["status", "needle", "cursor", "bound"],
        )
    },
    **{
        f"bound by {', '.join(names)}": (by(search.sql.lists["bound"], *names), None)
        for names in (
            ["person", "cursor"],
            ["recipe"],
            ["unsuccessful", "since"],
            ["provider"],
            ["model"],
            ["cursor"],
        )
    },
    "select_parents": (search.sql.select_parents, None),
    "select_children": (search.sql.select_children, None),
    "select_callbacks": (search.sql.select_callbacks, None),
    "select_whole": (search.sql.select_whole, _LIVING),
    "count_recent": (search.sql.count_recent, None),
    "pending": (by(deliveries.sql.lists["list_pending"], "base"), None),
    "pending of a handler": (by(deliveries.sql.lists["list_pending"], "base", "handler"), None),
    "bound_failed": (by(deliveries.sql.lists["bound_failed"], "failed", "cursor"), None),
    "failed of a handler": (by(_DELIVERIES, "failed", "handler", "cursor", "bound"), None),
    **{
        f"deliveries by {', '.join(names)}": (by(_DELIVERIES, *names), None)
        for names in ([], ["failed"], ["running"], ["prediction"], ["cursor"], ["cursor", "failed"])
    },
}
INDEXES: Final = {
    "select_by_idempotency_key": "predictions_idempotency_key",
    "begin_submits": "predictions_living",
    "count_in_flight": "predictions_polled",
    "next_queued": "predictions_queued",
    "select_late": "predictions_late",
    "select_order": "orders_prediction",
    "blank_options": "orders_prediction",
    "forget_counts": "order_counts_over",
    "delete_ledger": "ledger_prediction",
    "select_questions": "cost_questions_due",
    "claim_due": "predictions_polled",
    "next_due": "predictions_polled",
    "select_stale": "predictions_queued",
    "select_id_by_provider_id": "predictions_provider_id",
    "select_wanted": "deliveries_pending",
    "next_pending": "deliveries_pending",
    "reclaim": "deliveries_running",
    "release_deliveries": "deliveries_running",
    "reclaim_own": "deliveries_running",
    "select_waiting": "deliveries_waiting",
    "unmatched": "events_unmatched",
    "callbacks": "callbacks_discarded",
    "list by living": "predictions_living",
    "list by living, provider": "predictions_living",
    "list by unsuccessful": "predictions_unsuccessful",
    "scan by living, provider, cursor": "predictions_living",
    "scan by unsuccessful, since": "predictions_unsuccessful",
    "search by person": "predictions_person",
    "search by recipe": "predictions_recipe",
    "search by recipe, cursor": "predictions_recipe",
    "search by unsuccessful, until": "predictions_unsuccessful",
    "search by provider": "predictions_provider",
    "search by provider, cursor": "predictions_provider",
    "search by model": "predictions_model",
    "search by model, provider, until, bound": "predictions_model",
    "bound by provider": "predictions_provider",
    "bound by model": "predictions_model",
    "bound by person, cursor": "predictions_person",
    "bound by recipe": "predictions_recipe",
    "bound by unsuccessful, since": "predictions_unsuccessful",
    "select_children": "predictions_children",
    "pending of a handler": "deliveries_pending",
    "bound_failed": "deliveries_failed",
    "deliveries by failed": "deliveries_failed",
    "deliveries by running": "deliveries_running",
}
"""The index that a statement must begin with on SQLite, which has no table statistics here."""
PAGES: Final = {
    *("list by ", "list by provider", "list by cursor"),
    *("deliveries by ", "deliveries by cursor"),
    *("search by cursor", "bound by cursor", "pending"),
    *("select_cut", "select_spent"),
}
"""Statements that walk an index from its end until a page is full."""
SORTED: Final = "list by living"
"""It sorts the ids of one status: to read them in order would take an index per provider."""
ONLY_SQLITE: Final = {"select_wanted", "select_these"}
ONLY_POSTGRES: Final = "take_deliveries"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sqlite3.Connection]:
    path: Path = tmp_path_factory.mktemp("plans") / "receiver.db"
    engine = SQLite(path)
    engine.store.open()
    engine.store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        zeros = "0" * 32
        for text in filling(_SQLITE_NUMBERS, f"substr('{zeros}' || n, -32)"):
            connection.execute(text)
        connection.execute("COMMIT")
        yield connection


@pytest.mark.parametrize("name", sorted(HOT.keys() - {ONLY_POSTGRES}))
def test_sqlite_statement_uses_its_index_and_reads_few_rows(
    many: sqlite3.Connection, name: str
) -> None:
    statement, rows = HOT[name]
    params = _params(name)
    if rows is not None:
        cells = [[c.decode() if isinstance(c, bytes) else c for c in row] for row in rows]
        params["rows"] = json.dumps(cells)
    text = statement.sqlite
    plan = [row[3] for row in many.execute(f"EXPLAIN QUERY PLAN {text}", params)]
    if name in INDEXES:
        assert any(f"INDEX {INDEXES[name]} (" in step for step in plan), plan
    made = {step.split()[1] for step in plan if step.startswith(("MATERIALIZE", "CO-ROUTINE"))}
    small = {"r", "json_each", "constant", "CONSTANT", *made}
    scans = [step for step in plan if step.startswith("SCAN") and step.split()[1] not in small]
    assert name in PAGES or not scans, plan
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    many.execute("BEGIN")
    try:
        many.set_progress_handler(count, 1)
        many.execute(text, params).fetchall()
    finally:
        many.set_progress_handler(None, 1)
        many.execute("ROLLBACK")
    assert name == SORTED or steps < MOST, plan


def _params(name: str) -> dict[str, Any]:
    given = _PARAMS | ({"id": pred(0)} if name == "insert_prediction" else {})
    by_id = name.startswith(("list by", "scan by", "search by", "bound by", "count_recent"))
    given |= {"since": pred(20_000)} if by_id else {}
    return {value: given[value] for value in HOT[name][0].names}


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


WALKS: Final = PAGES | {
    *("release_deliveries", "reclaim", "select_old", "select_free", SORTED),
    *("select_waiting", "mark_matched", "delete_callbacks", "select_due", "empty_spent"),
    # Nearly all rows here have one provider and one model, as the statistics show.
    *("search by provider", "search by provider, cursor", "bound by provider"),
    *("search by model", "bound by model"),
}
"""Statements that may walk an index: its `WHERE` leaves few rows, or a page is soon full."""


@pytest.mark.anyio
async def test_postgresql_finds_rows_by_an_index(bare_database: Database) -> None:
    """Checks the generic plan too, which a statement may get after a few runs."""
    store = PostgresStore(bare_database.url, lambda _: None, PgQueuerJobs())
    await store.migrate()
    bare_database.execute(
        "SET search_path = receiver",
        "SET session_replication_role = replica",
        *(f"ALTER TABLE {name} SET (autovacuum_enabled = false)" for name in BIG),
        *filling(r"generate_series(1, \1) n", f"right('{'0' * 32}' || n, 32)"),
    )
    connection = await store.connect()
    try:
        wrong = [
            (when, how, name)
            for when in ("never analyzed", "analyzed")
            for how in ("custom", "generic")
            for name in await _unindexed(connection, when, how)
        ]
    finally:
        await connection.close()
    assert wrong == []


async def _unindexed(connection: Connection, when: str, how: str) -> list[str]:
    if (when, how) == ("analyzed", "custom"):
        await connection.execute("ANALYZE")
    names = [name for name in HOT.keys() - ONLY_SQLITE if how == "custom" or not _is_list(name)]
    return [name for name in names if not await _is_indexed(connection, name, how)]


def _is_list(name: str) -> bool:
    """Return whether a statement is planned for each run, and so never has a generic plan."""
    return HOT[name][0].is_list


async def _is_indexed(connection: Connection, name: str, how: str) -> bool:
    """Return whether a statement reads big tables only by conditions on their indexes."""
    statement, rows = HOT[name]
    arguments = list(_params(name).values())
    arguments += [list(column) for column in zip(*(rows or ()), strict=True)]
    options = "GENERIC_PLAN true, FORMAT JSON" if how == "generic" else "FORMAT JSON"
    text = await connection.fetchval(f"EXPLAIN ({options}) {statement.postgres}", *arguments)
    found = [
        node
        for node in nodes(json.loads(text)[0]["Plan"])
        if node.get("Relation Name") in BIG and "Scan" in node["Node Type"]
    ]
    return all(
        "Seq" not in node["Node Type"]
        and (name in WALKS or "Index Cond" in node or "Recheck Cond" in node)
        for node in found
    )
