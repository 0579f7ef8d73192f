"""`supabase/cron.sql` on PostgreSQL: the drain job calls the receiver only if something is due."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.postgres import Database

FILE: Final = Path(__file__).parent.parent.parent / "deploy" / "supabase" / "cron.sql"
STAND_INS: Final = """
CREATE SCHEMA cron; CREATE SCHEMA net; CREATE SCHEMA vault;
CREATE TABLE cron.job (name TEXT, schedule TEXT, command TEXT);
CREATE FUNCTION cron.schedule(TEXT, TEXT, TEXT) RETURNS void LANGUAGE sql
    AS 'INSERT INTO cron.job VALUES ($1, $2, $3)';
CREATE TABLE net.calls (url TEXT, body JSONB);
CREATE FUNCTION net.http_post(url TEXT, body JSONB, timeout_milliseconds INTEGER) RETURNS BIGINT
    LANGUAGE sql AS 'INSERT INTO net.calls VALUES ($1, $2) RETURNING 1';
CREATE TABLE vault.decrypted_secrets (name TEXT, decrypted_secret TEXT);
CREATE FUNCTION vault.create_secret(TEXT, TEXT) RETURNS void LANGUAGE sql
    AS 'INSERT INTO vault.decrypted_secrets VALUES ($2, $1)';
"""
"""Substitutes for pg_cron, pg_net and Supabase's vault; a call of the receiver is a row."""
PREDICTION: Final = """
INSERT INTO receiver.predictions
    (id, provider, model, mode, status, input, metadata, created_at, due_at)
VALUES ('pred_{0:032d}', 'fal', 'm', 'queue', 'processing', '{{}}', '{{}}', 1, {1})
"""
DELIVERY: Final = """
INSERT INTO receiver.deliveries
    (id, prediction_id, handler, state, due_at, owner, lease_until, created_at)
VALUES ('dlv_{0:032d}_save', 'pred_{0:032d}', 'save', {1}, 1)
"""


@pytest.fixture
def scheduled(database: Database) -> Iterator[Database]:
    """Run the file without its extensions, which are not installed here."""
    text, extensions = re.subn(r"^CREATE EXTENSION .*;$", "", FILE.read_text(), flags=re.MULTILINE)
    assert extensions == 2
    database.execute(STAND_INS, text)
    yield database
    database.execute("DROP SCHEMA cron, net, vault CASCADE")


def calls(database: Database, name: str) -> int:
    """Run the scheduled job of a name, and return how often it called the receiver."""
    ((command,),) = database.rows("SELECT command FROM cron.job WHERE name = $1", name)
    database.execute("DELETE FROM net.calls", command)
    found = database.rows("SELECT url FROM net.calls")
    assert {url for (url,) in found} <= {"https://hooks.example.org/wake/TOKEN"}
    return len(found)


def test_drain_job_makes_no_call_while_nothing_is_due(scheduled: Database) -> None:
    assert calls(scheduled, "receiver-drain") == 0
    later = time.time() + 3600
    scheduled.execute(
        PREDICTION.format(1, later),
        DELIVERY.format(1, f"'pending', {later}, NULL, NULL"),
        DELIVERY.format(2, f"'running', NULL, 'somebody', {later}"),
    )
    assert calls(scheduled, "receiver-drain") == 0
    assert calls(scheduled, "receiver-housekeeping") == 1


@pytest.mark.parametrize(
    "row",
    [
        PREDICTION.format(1, 5),
        DELIVERY.format(1, "'pending', 5, NULL, NULL"),
        DELIVERY.format(1, "'running', NULL, 'lost', 5"),
    ],
    ids=["a prediction", "a delivery", "a lost claim"],
)
def test_drain_job_makes_one_call_for_due_work_or_an_expired_lease(
    scheduled: Database, row: str
) -> None:
    scheduled.execute(row)
    assert calls(scheduled, "receiver-drain") == 1
    assert calls(scheduled, "receiver-drain") == 1


@pytest.mark.parametrize("held", ["paused_at", "open_until", "probe_until"])
def test_drain_job_makes_no_call_for_a_paused_or_open_circuit_handler(
    scheduled: Database, held: str
) -> None:
    scheduled.execute(
        DELIVERY.format(1, "'pending', 5, NULL, NULL"),
        f"INSERT INTO receiver.handlers (name, {held}) VALUES ('save', {time.time() + 60})",
    )
    assert calls(scheduled, "receiver-drain") == 0
    scheduled.execute("DELETE FROM receiver.handlers")
    assert calls(scheduled, "receiver-drain") == 1
