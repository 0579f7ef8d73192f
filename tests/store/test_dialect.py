"""One text for two engines: what each of them is told, and that both understand the same."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from receiver.store import queries
from receiver.store.facade import Store
from receiver.store.postgres.engine import SCHEMA, PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.sqlite.engine import SQLiteStore
from receiver.store.statement import Row, Run, Steps, Write, together
from tests.postgres import Database

ALL: Final = [value for value in vars(queries).values() if isinstance(value, Query)]


# --- texts ---


def test_values_are_numbered_and_of_one_type_wherever_they_are_named() -> None:
    query = Query("SELECT :id, :now, :most, :everyone, :id, :now FROM x WHERE a = :reason")
    assert query.names == ("id", "now", "most", "everyone", "reason")
    assert query.postgres == (
        "SELECT $1::text, $2::double precision, $3::bigint, $4::boolean, $1::text, "
        "$2::double precision FROM x WHERE a = $5::text"
    )
    assert query.sqlite == query.sqlite_one
    assert query.sqlite.endswith("WHERE a = :reason")


def test_a_cast_is_no_value() -> None:
    query = Query("SELECT :id::bigint, a::text")
    assert query.names == ("id",)
    assert query.postgres == "SELECT $1::text::bigint, a::text"


def test_rows_are_a_table_and_come_after_the_values() -> None:
    query = Query(
        "INSERT INTO t SELECT r.a, r.b FROM {rows:a text, b float,\n c int, d bytes} :now"
    )
    assert (query.columns, query.names, query.blobs) == (("a", "b", "c", "d"), ("now",), (3,))
    assert query.postgres == (
        "INSERT INTO t SELECT r.a, r.b FROM unnest($2::text[], $3::double precision[], "
        "$4::bigint[], $5::bytea[]) AS r(a, b, c, d) $1::double precision"
    )
    cells = ", ".join(f"json_extract(value, '$[{i}]') AS {name}" for i, name in enumerate("abcd"))
    assert f"FROM (SELECT {cells} FROM json_each(:rows)) r" in query.sqlite
    assert "FROM (SELECT :c0 AS a, :c1 AS b, :c2 AS c, :c3 AS d) r" in query.sqlite_one


def test_gathered_rows_are_one_row_of_sqlites() -> None:
    query = Query("SELECT {gather:a, max(b, c)} FROM t")
    assert query.gathers
    assert query.sqlite == "SELECT json_group_array(json_array(a, max(b, c))) FROM t"
    assert query.postgres == "SELECT a, max(b, c) FROM t"
    assert not Query("SELECT a FROM t").gathers


def test_locks_are_for_those_who_share() -> None:
    query = Query("SELECT a FROM t WHERE least(a, b) = 1 {lock}; SELECT 1 {skip}")
    assert query.sqlite == "SELECT a FROM t WHERE min(a, b) = 1 ; SELECT 1 "
    assert query.postgres == (
        "SELECT a FROM t WHERE least(a, b) = 1 FOR UPDATE; SELECT 1 FOR UPDATE SKIP LOCKED"
    )


def test_statements_are_put_together_with_their_places_in_order() -> None:
    first = Query("INSERT INTO t SELECT r.a FROM {rows:a text, b int}")
    second = Query("INSERT INTO u SELECT r.a FROM {rows:a float}")
    assert together((first, second), notify=False) == (
        "WITH w0 AS (INSERT INTO t SELECT r.a FROM unnest($1::text[], $2::bigint[]) AS r(a, b)), "
        "w1 AS (INSERT INTO u SELECT r.a FROM unnest($3::double precision[]) AS r(a)) SELECT 1"
    )
    assert together((second,), notify=True) == (
        "WITH w0 AS (INSERT INTO u SELECT r.a FROM unnest($3::double precision[]) AS r(a)) "
        "SELECT pg_notify($1::text, $2::text)"
    )
    assert together((), notify=True) == "SELECT pg_notify($1::text, $2::text)"


@pytest.mark.parametrize("query", ALL, ids=lambda query: query.sqlite.split("\n")[0][:30])
def test_no_mark_is_left_in_a_query_of_ours(query: Query) -> None:
    for text in (query.sqlite, query.sqlite_one, query.postgres):
        assert "{" not in text
        assert "}" not in text
    assert ":rows" not in query.postgres


# --- both engines understand the same ---

_TABLE: Final = "CREATE TABLE {} (n INTEGER, a TEXT, b {}, c BIGINT, d {})"
EMPTY: Final = Query("DELETE FROM dialect")
FILL: Final = Query("""
INSERT INTO dialect (n, a, b, c, d) SELECT r.n, r.a, r.b, r.c, r.d
FROM {rows:n int, a text, b float, c int, d bytes} WHERE true
""")
JOIN: Final = Query("""
SELECT {gather:t.n, t.a, t.b, t.c} FROM {rows:n int, a text, b float, c int}
JOIN dialect t ON t.n = r.n AND t.a = r.a AND t.b = r.b AND t.c = r.c
""")
READ: Final = Query("SELECT n, a, b, c, d FROM dialect ORDER BY n")
BY_VALUE: Final = Query("SELECT n FROM dialect WHERE n = 0 AND a = :reason AND b = :now")


def write_and_read(items: Sequence[tuple[list[Row], bool]]) -> Steps[list[Any]]:
    results = []
    for rows, is_one_write in items:
        yield Run(EMPTY)
        if is_one_write:
            yield Write([(FILL, rows[:1]), (FILL, rows[1:])])
        else:
            yield Run(FILL, rows=rows)
        kept = yield Run(READ)
        found = yield Run(JOIN, rows=[row[:4] for row in rows])
        by_value = []
        if rows:
            by_value = yield Run(BY_VALUE, {"reason": rows[0][1], "now": rows[0][2]})
        results.append((kept, found, by_value))
    return results


class Engine:
    """A store, driven from outside a loop, and what it makes of a text."""

    def __init__(self, store: Store, without: str) -> None:
        self._store = store
        self._without = without
        self._runner = asyncio.Runner()
        self.run(store.start())

    def run(self, what: Any) -> Any:
        return self._runner.run(what)

    def round_trip(self, rows: list[Row], *, is_one_write: bool) -> Any:
        return self.run(self._store.write(write_and_read, (rows, is_one_write)))

    def text(self, text: str) -> str:
        return text.replace(self._without, "\ufffd") if self._without else text

    def sendable(self, text: str) -> str:
        """Leave out what SQLite is known not to keep; see the test of it."""
        return text if self._without else text.replace("\0", "")

    def close(self) -> None:
        self.run(self._store.stop())
        self._runner.close()


@pytest.fixture(params=["sqlite", "postgres"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        path = tmp_path / "receiver.db"
        made = Engine(SQLiteStore(str(path), print), "")
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute(_TABLE.format("dialect", "REAL", "BLOB"))
        yield made
        made.close()
        return
    database: Database = request.getfixturevalue("database")
    database.execute(_TABLE.format("receiver.dialect", "DOUBLE PRECISION", "BYTEA"))
    made = Engine(PostgresStore(database.url, print, PgQueuerJobs(SCHEMA)), "\0")
    try:
        yield made
    finally:
        made.close()
        database.execute("SET lock_timeout = '5s'", "DROP TABLE receiver.dialect")


TEXTS: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    [
        "",
        "\0",
        "a\0b",
        "'",
        '"',
        "\\",
        "\\u0000",
        "$1",
        ":now",
        "{rows}",
        "%s",
        "\u2028",
        "{}",
        "\\x41",
    ]
)
FLOATS: Final = st.floats(-1e15, 1e15, allow_subnormal=False)
INTS: Final = st.integers(-(2**63), 2**63 - 1)
BYTES: Final = st.binary(max_size=40) | TEXTS.map(str.encode)
ROWS: Final = st.lists(st.tuples(TEXTS, FLOATS, INTS, BYTES), max_size=6)


def _as_bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)


@pytest.mark.parametrize("body", [b"text", b"\xff"])
def test_a_text_with_nul_is_kept_whole(either: Engine, body: bytes) -> None:
    """A stranger's words may have one; what comes after it is no less theirs."""
    kept, _, _ = either.round_trip([(0, "be\0fore", 0.0, 0, body)], is_one_write=False)
    assert [row[1] for row in kept] == [either.text("be\0fore")]


def test_whatever_is_written_is_read_back(either: Engine) -> None:
    @settings(
        max_examples=120,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(rows=ROWS, is_one_write=st.booleans())
    @example(
        rows=[("a\0", -0.0, 2**53 + 1, b"\xff\0"), ("", 1e-300, -(2**63), b"")], is_one_write=True
    )
    @example(rows=[], is_one_write=False)
    def check(rows: list[Any], is_one_write: bool) -> None:
        given_rows: list[Row] = [(n, either.sendable(a), *row) for n, (a, *row) in enumerate(rows)]
        kept, found, by_value = either.round_trip(given_rows, is_one_write=is_one_write)
        expected = [(n, either.text(a), b, c, d) for n, a, b, c, d in given_rows]
        assert [(n, a, b, c, _as_bytes(d)) for n, a, b, c, d in kept] == expected
        # And it is found by what it was written with, whichever way that is given.
        assert sorted((n, a, c) for n, a, _, c in found) == [
            (n, a, c) for n, a, _, c, _ in expected
        ]
        for n, _, b, _ in found:  # SQLite gathers numbers with 15 digits
            assert b == pytest.approx(expected[n][2], rel=1e-14, abs=0.0)
        assert [tuple(row) for row in by_value] == [(0,)] * bool(rows)

    check()


def test_a_batch_may_be_large(either: Engine) -> None:
    rows: list[Row] = [(n, "é" * (n % 50), n / 7, n, bytes([n % 256]) * 50) for n in range(700)]
    kept, found, _ = either.round_trip(rows, is_one_write=False)
    assert len(kept) == len(found) == 700
    assert tuple(kept[699][:4]) == rows[699][:4]
