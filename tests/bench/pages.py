"""Time each page of the dashboard at 1,000,000 predictions: python -m tests.bench.pages.

The app runs in this process, so that only the page is measured: statements and rendering. Each is
requested eight times, as PostgreSQL may switch to a generic plan for a repeated statement. The
shortest of the last five times counts, as the machine may have other work; the median is printed,
too.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from receiver.model.ids import oldest_id
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from tests.dashboard.people import ON, Person, person
from tests.postgres import Database, start_server
from tests.receiving import Network, receiving
from tests.sqlite import lay_out

MOST = 0.050
"""Seconds that a page may take."""
_SQLITE = {
    "{id}": "'pred_' || printf('%014x', ({at} + n) * 1000000) || '000000000000000000'",
    "{parent}": "'pred_' || printf('%014x', ({at} + n - 1) * 1000000) || '000000000000000000'",
    "{body}": """CAST('{"status":"OK"}' AS BLOB)""",
}
_POSTGRES = {
    "{id}": "'pred_' || lpad(to_hex(({at} + n)::bigint * 1000000), 14, '0') || repeat('0', 18)",
    "{parent}": "'pred_' || lpad(to_hex(({at} + n - 1)::bigint * 1000000), 14, '0') "
    "|| repeat('0', 18)",
    "{body}": """'{"status":"OK"}'::bytea""",
}
_FILL = (
    """INSERT INTO predictions (id, provider, model, mode, status, input, metadata, provider_id,
            output, error_code, error_message, channel, created_at, submitted_at, completed_at,
            ordered, parent_id)
        SELECT {id},
            CASE WHEN n % 1000 = 0 THEN 'oxen' WHEN n % 3 = 0 THEN 'eachlabs' ELSE 'fal' END,
            CASE WHEN n % 5000 = 7 THEN 'fal-ai/rare' ELSE 'fal-ai/nano-banana' END, 'queue',
            CASE WHEN n % 50 = 1 THEN 'failed' ELSE 'succeeded' END,
            '{"prompt":"a lighthouse number ' || n || ', oil on canvas, thick strokes, at dusk",'
                || '"seed":' || n || '}',
            '{"channel":"#art","number":"' || n || '"}', 'theirs-' || n,
            CASE WHEN n % 50 = 1 THEN NULL ELSE
                '[{"url":"https://cdn.example/' || n || '.png","content_type":"image/png"}]' END,
            CASE WHEN n % 50 = 1 THEN 'provider_error' END,
            CASE WHEN n % 50 = 1 THEN 'the model failed' END, 'webhook',
            {at} + n, {at} + n, {at} + n,
            CASE WHEN n % 4 = 0 THEN '{"recipe":"'
                || CASE WHEN n % 40000 = 0 THEN 'rare' ELSE 'imagine' END
                || '","person":"slack:T/U' || (n % 5000) || '","place":null,"via":"slack"}' END,
            CASE WHEN n % 10 = 0 THEN {parent} END
        FROM {numbers}""",
    """INSERT INTO events (prediction_id, type, time, channel, unmatched)
        SELECT {id}, CASE WHEN n % 50 = 1 THEN 'prediction.failed' ELSE 'prediction.succeeded' END,
            {at} + n, 'webhook', CASE WHEN n % 100 = 3 THEN 1 ELSE 0 END FROM {numbers}""",
    """INSERT INTO callbacks
            (prediction_id, channel, digest, received_at, headers, body, verdict, reason, repeats)
        SELECT {id}, 'webhook', CAST(n AS TEXT), {at} + n, '[]', {body}, 'accepted', '',
            CASE WHEN n % 100 = 0 THEN 1 ELSE 0 END FROM {numbers}""",
    """INSERT INTO deliveries (id, prediction_id, handler, state, attempts, claims, due_at,
            created_at, ended_at, reason)
        SELECT 'dlv_' || substr({id}, 6) || '00000000', {id},
            CASE WHEN n % 10000 = 5 THEN 'rare' ELSE 'tell' END,
            CASE WHEN n % 50 = 5 THEN 'dead' WHEN n % 200 = 6 THEN 'pending' ELSE 'done' END, 1, 1,
            CASE WHEN n % 200 = 6 AND n % 50 <> 5 THEN 4e9 END, {at} + n,
            CASE WHEN n % 200 = 6 AND n % 50 <> 5 THEN NULL ELSE {at} + n END,
            CASE WHEN n % 50 = 5 THEN 'it failed' ELSE '' END
        FROM {numbers}""",
    """INSERT INTO attempts (delivery_id, number, started_at, ended_at, result, reason)
        SELECT 'dlv_' || substr({id}, 6) || '00000000', 1, {at} + n, {at} + n, 'dead', 'it failed'
        FROM {numbers} WHERE n % 50 = 5""",
)


def filling(began: int, numbers: str, words: Mapping[str, str]) -> Iterator[str]:
    for text in _FILL:
        for mark, word in {**words, "{at}": str(began), "{numbers}": numbers}.items():
            text = text.replace(mark, word)  # noqa: PLW2901 - word by word
        yield text


def fill_sqlite(path: Path, began: int, rows: int) -> None:
    lay_out(path)
    numbers = (
        f"(WITH RECURSIVE s (n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM s WHERE n < {rows})"
        " SELECT n FROM s) s"
    )
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -400000")
        connection.execute("BEGIN")
        for text in filling(began, numbers, _SQLITE):
            connection.execute(text)
        connection.execute("COMMIT")


def fill_postgres(database: Database, began: int, rows: int) -> None:
    asyncio.run(_migrate(database))
    alone = ("SET search_path = receiver", "SET session_replication_role = replica")
    for text in filling(began, f"generate_series(1, {rows}) n", _POSTGRES):
        database.execute(*alone, text)
    database.execute("VACUUM ANALYZE")


async def _migrate(database: Database) -> None:
    store = PostgresStore(database.url, lambda _: None, PgQueuerJobs())
    await store.migrate()


PAGES = (
    "",
    "/predictions",
    "/predictions?view=grid",
    "/predictions?status=failed",
    "/predictions?status=succeeded",
    "/predictions?status=queued",
    "/predictions?status=failed&text=nothing+like+it",
    "/predictions?provider=oxen",
    "/predictions?provider=oxen&status=failed",
    "/predictions?provider=oxen&text=nothing+like+it",
    "/predictions?provider=eachlabs&text=nothing+like+it",
    "/predictions?model=fal-ai/rare",
    "/predictions?model=fal-ai/none",
    "/predictions?model=*rare",
    "/predictions?recipe=imagine",
    "/predictions?recipe=rare",
    "/predictions?recipe=imagine&text=nothing+like+it",
    "/predictions?person=slack:T/U4",
    "/predictions?person=nobody",
    "/predictions?text=nothing+like+it",
    "/predictions?metadata.number=500000",
    "/predictions?metadata.channel=%23art",
    "/predictions?since=2020-01-01&until=2020-02-01",
    "/predictions?until=2020-02-01&text=x",
    "/predictions/{one}",
    "/deliveries",
    "/deliveries?handler=rare",
    "/deliveries?state=running",
    "/deliveries?state=pending",
    "/deliveries?state=skipped",
    "/handlers",
    "/replays",
    "/discarded",
    "/discarded?kind=duplicate",
    "/discarded?kind=unmatched",
    "/recipes",
    "/costs",
    "/costs?by=model",
    "/audit",
)


async def measure(database: Path | Database, name: str, one: str) -> bool:
    """Request every page; return whether none took longer than MOST."""
    fine = True
    env: dict[str, Any] = {**ON, "RECEIVER_LOG_LEVEL": "error"}
    async with receiving(database, Network(), **env) as station:
        someone = person(station)
        await someone.sign_in()
        await someone.see("")
        for path in PAGES:
            best, usual = await _took(someone, path.format(one=one))
            late = " LATE" if best > MOST else ""
            fine &= not late
            print(f"{name:9}{best * 1000:6.1f}{usual * 1000:7.1f} ms{late}  /ui{path}", flush=True)
    return fine


async def _took(someone: Person, path: str) -> tuple[float, float]:
    """Return the shortest and the median time of a page; raise if it is not found."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        await someone.see(path)
        times.append(time.perf_counter() - began)
    return min(times[3:]), statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pages", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--engine", choices=("sqlite", "postgres"), action="append")
    asked = parser.parse_args()
    began = int(time.time()) - asked.rows - 10
    one = oldest_id("pred", began + asked.rows // 2 + 5) + "0" * 18
    fine = True
    for engine in asked.engine or ("sqlite", "postgres"):
        with tempfile.TemporaryDirectory() as folder:
            home: Path | Database = Path(folder) / "receiver.db"
            if engine == "sqlite":
                fill_sqlite(Path(folder) / "receiver.db", began, asked.rows)
            else:
                home = start_server(Path(folder) / "postgres")
                fill_postgres(home, began, asked.rows)
            fine &= asyncio.run(measure(home, engine, one))
            if isinstance(home, Database):
                home.close()
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
