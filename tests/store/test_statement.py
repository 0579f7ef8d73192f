"""One SQL text for both engines: what each engine runs, and that both store the same values."""

from __future__ import annotations

import ast
import asyncio
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import receiver
from receiver.store.facade import Store
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.sqlite.engine import SQLiteStore
from receiver.store.statement import Cells, Run, Statement, Statements, Steps, Write, together
from tests.postgres import Database

PACKAGE: Final = Path(receiver.__file__).parent
NOUNS: Final = sorted(path.stem for path in (PACKAGE / "store" / "sql").glob("*.sql"))


# --- the text for each engine ---


def test_named_values_become_numbered_and_typed_parameters() -> None:
    statement = Statement(
        "SELECT :id, :now::float, :most::int, :all::bool, :id, :now::float FROM x WHERE a = :reason"
    )
    assert statement.names == ("id", "now", "most", "all", "reason")
    assert statement.postgres == (
        "SELECT $1::text, $2::double precision, $3::bigint, $4::boolean, $1::text, "
        "$2::double precision FROM x WHERE a = $5::text"
    )
    assert statement.sqlite == "SELECT :id, :now, :most, :all, :id, :now FROM x WHERE a = :reason"
    assert statement.sqlite == statement.sqlite_one


def test_cast_is_not_a_parameter() -> None:
    statement = Statement("SELECT :id::bigint, a::text")
    assert statement.names == ("id",)
    assert statement.postgres == "SELECT $1::text::bigint, a::text"


def test_rows_become_a_table_after_the_parameters() -> None:
    statement = Statement(
        "INSERT INTO t SELECT r.a, r.b FROM {rows:a text, b float,\n c int, d bytes} :now::float"
    )
    assert (statement.columns, statement.names, statement.blobs) == (
        ("a", "b", "c", "d"),
        ("now",),
        (3,),
    )
    assert statement.postgres == (
        "INSERT INTO t SELECT r.a, r.b FROM unnest($2::text[], $3::double precision[], "
        "$4::bigint[], $5::bytea[]) AS r(a, b, c, d) $1::double precision"
    )
    cells = ", ".join(f"json_extract(value, '$[{i}]') AS {name}" for i, name in enumerate("abcd"))
    assert f"FROM (SELECT {cells} FROM json_each(:rows)) r" in statement.sqlite
    assert "FROM (SELECT :c0 AS a, :c1 AS b, :c2 AS c, :c3 AS d) r" in statement.sqlite_one


def test_gathered_rows_are_one_json_row_on_sqlite() -> None:
    statement = Statement("SELECT {gather:t.a, CAST(max(b, c) AS text)\n  AS most} FROM t")
    assert statement.gathers == ("a", "most")
    assert statement.sqlite == (
        "SELECT json_group_array(json_array(t.a, CAST(max(b, c) AS text))) FROM t"
    )
    assert statement.postgres == "SELECT t.a, CAST(max(b, c) AS text)\n  AS most FROM t"
    assert not Statement("SELECT a FROM t").gathers


def test_row_locks_are_only_in_the_postgresql_text() -> None:
    statement = Statement("SELECT a FROM t WHERE least(a, b) = 1 {lock}; SELECT 1 {skip}")
    assert statement.sqlite == "SELECT a FROM t WHERE min(a, b) = 1 ; SELECT 1 "
    assert statement.postgres == (
        "SELECT a FROM t WHERE least(a, b) = 1 FOR UPDATE; SELECT 1 FOR UPDATE SKIP LOCKED"
    )


def test_combined_statements_number_their_parameters_in_order() -> None:
    first = Statement("INSERT INTO t SELECT r.a FROM {rows:a text, b int}")
    second = Statement("INSERT INTO u SELECT r.a FROM {rows:a float}")
    assert together((first, second), notify=False) == (
        "WITH w0 AS (INSERT INTO t SELECT r.a FROM unnest($1::text[], $2::bigint[]) AS r(a, b)), "
        "w1 AS (INSERT INTO u SELECT r.a FROM unnest($3::double precision[]) AS r(a)) SELECT 1"
    )
    assert together((second,), notify=True) == (
        "WITH w0 AS (INSERT INTO u SELECT r.a FROM unnest($3::double precision[]) AS r(a)) "
        "SELECT pg_notify($1::text, $2::text)"
    )
    assert together((), notify=True) == "SELECT pg_notify($1::text, $2::text)"


# --- the files ---


def statements(noun: str) -> Iterator[tuple[str, Statement]]:
    """Yield every statement of a file; a list with all its filters."""
    found = Statements(noun)
    yield from ((name, getattr(found, name)) for name in found)
    yield from ((name, listing.by(listing.names)) for name, listing in found.lists.items())


@pytest.mark.parametrize("noun", NOUNS)
def test_no_placeholder_is_left_in_any_statement(noun: str) -> None:
    left = re.compile(r"\{\w")
    for name, statement in statements(noun):
        for text in (statement.sqlite, statement.sqlite_one, statement.postgres):
            assert not left.search(text), name
        assert ":rows" not in statement.postgres


@pytest.mark.parametrize("noun", NOUNS)
def test_parameter_has_one_type_throughout_a_statement(noun: str) -> None:
    """A mention without a type means text, which would contradict the typed mentions."""
    text = (PACKAGE / "store" / "sql" / f"{noun}.sql").read_text()
    for part in text.split("\n-- name: "):
        types: dict[str, set[str]] = {}
        for name, kind in re.findall(r"(?<!:):([a-z_]+)(?:::(\w+))?", part):
            types.setdefault(name, set()).add(kind)
        assert all(len(kinds) == 1 for kinds in types.values()), part


@pytest.mark.parametrize("noun", NOUNS)
def test_every_statement_has_a_comment_and_every_file_a_module(noun: str) -> None:
    text = (PACKAGE / "store" / "sql" / f"{noun}.sql").read_text()
    for part in f"\n{text}".split("\n-- name: ")[1:]:
        name, line, *_ = part.split("\n")
        assert re.fullmatch(r"-- [A-Z].*[.:,a-z]", line), name
    assert noun == "shared" or (PACKAGE / "store" / f"{noun}.py").is_file()


def test_every_statement_is_used_and_every_used_statement_exists() -> None:
    kept = {(noun, name) for noun in NOUNS for name, _ in statements(noun)}
    modules = {
        f"receiver.{'.'.join(path.relative_to(PACKAGE).with_suffix('').parts)}": ast.parse(
            path.read_text()
        )
        for path in PACKAGE.rglob("*.py")
    }
    own = {module: dict(_loaded(tree)) for module, tree in modules.items()}
    used = {
        found
        for module, tree in modules.items()
        for found in _used(tree, own[module] | dict(_imported(tree, own)))
    }
    assert used == kept


def _loaded(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Find the variables that hold a file's statements: (variable, noun)."""
    for node in tree.body:
        match node:
            case ast.AnnAssign(
                target=ast.Name(id=variable),
                value=ast.Call(
                    func=ast.Name(id="Statements"), args=[ast.Constant(value=str(noun))]
                ),
            ):
                yield variable, noun


def _imported(tree: ast.Module, own: dict[str, dict[str, str]]) -> Iterator[tuple[str, str]]:
    """Find such variables that come from another module, also as `module.sql`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                here = name.asname or name.name
                if noun := own.get(node.module or "", {}).get(name.name):
                    yield here, noun
                for variable, noun in own.get(f"{node.module}.{name.name}", {}).items():
                    yield f"{here}.{variable}", noun


def _used(tree: ast.Module, held: dict[str, str]) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(
                value=ast.Attribute(value=holder, attr="lists"), slice=ast.Constant(value=str(name))
            ):
                pass
            case ast.Attribute(value=holder, attr=name) if name != "lists":
                pass
            case _:
                continue
        if noun := held.get(_dotted(holder)):
            yield noun, name


def _dotted(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=module), attr=name):
            return f"{module}.{name}"
    return ""


# --- both engines store the same values ---

_TABLE: Final = "CREATE TABLE {} (n INTEGER, a TEXT, b {}, c BIGINT, d {})"
EMPTY: Final = Statement("DELETE FROM dialect")
FILL: Final = Statement("""
INSERT INTO dialect (n, a, b, c, d) SELECT r.n, r.a, r.b, r.c, r.d
FROM {rows:n int, a text, b float, c int, d bytes} WHERE true
""")
JOIN: Final = Statement("""
SELECT {gather:t.n, t.a, t.b, t.c} FROM {rows:n int, a text, b float, c int}
JOIN dialect t ON t.n = r.n AND t.a = r.a AND t.b = r.b AND t.c = r.c
""")
READ: Final = Statement("SELECT n, a, b, c, d FROM dialect ORDER BY n")
BY_VALUE: Final = Statement("SELECT n FROM dialect WHERE n = 0 AND a = :reason AND b = :now::float")


def write_and_read(items: Sequence[tuple[list[Cells], bool]]) -> Steps[list[Any]]:
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
    """A store that is driven from outside an event loop, and how it stores a text."""

    def __init__(self, store: Store, without: str) -> None:
        self._store = store
        self._without = without
        self._runner = asyncio.Runner()
        self.run(store.start())

    def run(self, what: Any) -> Any:
        return self._runner.run(what)

    def round_trip(self, rows: list[Cells], *, is_one_write: bool) -> Any:
        return self.run(self._store.write(write_and_read, (rows, is_one_write)))

    def text(self, text: str) -> str:
        return text.replace(self._without, "\ufffd") if self._without else text

    def sendable(self, text: str) -> str:
        """Leave out NUL on SQLite, whose JSON functions cut a text there; another test has it."""
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
    made = Engine(PostgresStore(database.url, print, PgQueuerJobs()), "\0")
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
def test_text_with_nul_is_stored_whole(either: Engine, body: bytes) -> None:
    """Text from outside may contain NUL, and must not be truncated there."""
    kept, _, _ = either.round_trip([(0, "be\0fore", 0.0, 0, body)], is_one_write=False)
    assert [row["a"] for row in kept] == [either.text("be\0fore")]


def test_written_values_are_read_back_unchanged(either: Engine) -> None:
    @settings(max_examples=120)
    @given(rows=ROWS, is_one_write=st.booleans())
    @example(
        rows=[("a\0", -0.0, 2**53 + 1, b"\xff\0"), ("", 1e-300, -(2**63), b"")], is_one_write=True
    )
    @example(rows=[], is_one_write=False)
    def check(rows: list[Any], is_one_write: bool) -> None:
        given_rows: list[Cells] = [
            (n, either.sendable(a), *row) for n, (a, *row) in enumerate(rows)
        ]
        kept, found, by_value = either.round_trip(given_rows, is_one_write=is_one_write)
        expected = [(n, either.text(a), b, c, d) for n, a, b, c, d in given_rows]
        assert [
            (row["n"], row["a"], row["b"], row["c"], _as_bytes(row["d"])) for row in kept
        ] == expected
        # Rows are also found by their values, given as rows or as parameters.
        assert sorted((row["n"], row["a"], row["c"]) for row in found) == [
            (n, a, c) for n, a, _, c, _ in expected
        ]
        for row in found:  # SQLite gathers numbers with 15 digits
            assert row["b"] == pytest.approx(expected[row["n"]][2], rel=1e-14, abs=0.0)
        assert [row["n"] for row in by_value] == [0] * bool(rows)

    check()


def test_large_batch_is_written_and_read_back(either: Engine) -> None:
    rows: list[Cells] = [(n, "é" * (n % 50), n / 7, n, bytes([n % 256]) * 50) for n in range(700)]
    kept, found, _ = either.round_trip(rows, is_one_write=False)
    assert len(kept) == len(found) == 700
    assert tuple(kept[699][name] for name in "nabc") == rows[699][:4]
