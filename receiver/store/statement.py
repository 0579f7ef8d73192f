"""SQL statements: loaded by name from the files in `sql/`, one text for both engines.

A file holds the statements of one module. `-- name: x` begins a statement, and the next line
describes it. `-- filter y: …` is an optional clause of a list. `-- fragment: z` is a text, or a set
of filters, that statements include as `{z}`; the fragments of `shared.sql` and `predictions.sql`
are available in all files. Besides plain SQL that both engines understand, there are marks:

- `:name` is a value of type text; `:name::float`, `::int` and `::bool` are values of other types.
- `{rows:id text, at float}` is a table `r` of the rows that the statement is given: the whole batch
  in one step. Python's sqlite3 releases the interpreter lock around every step, and getting it back
  while the event loop is busy costs far more than the step itself; for PostgreSQL a step is a round
  trip.
- `{gather:a, b + 1 AS c}` is the select list. SQLite packs all rows into one, for the reason above.
- `{lock}` and `{skip}` lock the selected rows if other processes write too; `{lock}` waits for rows
  that are locked, `{skip}` skips them.
- `{shard}` is a small number that differs between most of PostgreSQL's connections.
- `{clock}` is the time of the database's clock, where the clock of one process must not decide.
- A table's name after `FROM`, `JOIN`, `INTO` or `UPDATE` gets its schema for PostgreSQL, as poolers
  keep no `search_path`.
- `{terminal}`, `{in_flight}` and `{from_…}` are lists of statuses, from the state machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from importlib.resources import files
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec

from receiver.model.states import IN_FLIGHT, TERMINAL, Cause, sources
from receiver.store.schema import tables

T = TypeVar("T")

Row: TypeAlias = Mapping[str, Any]
"""A row that was read: its values by column name."""
Cells: TypeAlias = Sequence[Any]
"""A row that a statement is given: its values in the order of `{rows:…}`."""

_ARRAYS: Final = {
    "text": "text[]",
    "float": "double precision[]",
    "int": "bigint[]",
    "bytes": "bytea[]",
}
_VALUES: Final = {"float": "double precision", "int": "bigint", "bool": "boolean", None: "text"}
_SQLITE_WORDS: Final = {
    "least(": "min(",
    "greatest(": "max(",
    "{lock}": "",
    "{skip}": "",
    "{shard}": "0",
    "{clock}": "CAST(strftime('%s', 'now') AS REAL)",
}
_POSTGRES_WORDS: Final = {
    "json_group_array(": "json_agg(",
    "json_object(": "json_build_object(",
    "instr(": "strpos(",
    "{lock}": "FOR UPDATE",
    "{skip}": "FOR UPDATE SKIP LOCKED",
    "{shard}": "pg_backend_pid() % 16",
    "{clock}": "extract(epoch FROM now())::float",
}
_ROWS: Final = re.compile(r"\{rows:([^}]*)\}")
_GATHER: Final = re.compile(r"\{gather:([^}]*)\}")
_ALIAS: Final = re.compile(r"\s+AS\s+(?=\w+$)")
_VALUE: Final = re.compile(r"(?<!:):([a-z_]+)(?:::(float|int|bool)\b)?")
_OF_A_TABLE: Final = re.compile(r"\b((?:FROM|JOIN|INTO|UPDATE)\s+)(\w+)\b")
_PLACE: Final = re.compile(r"\$(\d+)")


class Statement:
    """One statement, in the SQL of each engine."""

    def __init__(self, text: str, *, is_list: bool = False) -> None:
        self.is_list = is_list
        """Whether PostgreSQL plans it at each run, as the best plan depends on its values."""
        found = _ROWS.search(text)
        columns = [column.split() for column in found[1].split(",")] if found else []
        self.columns = tuple(name for name, _ in columns)
        """The column names of the rows that it is given."""
        self.blobs = tuple(index for index, (_, kind) in enumerate(columns) if kind == "bytes")
        """The indexes of the columns that contain bytes."""
        gathered = _GATHER.search(text)
        self.gathers = tuple(name for _, name in _selected(gathered[1])) if gathered else ()
        """The names of the selected columns, if SQLite packs its rows into one."""
        bare = _GATHER.sub(lambda found: found[1], _ROWS.sub("{rows}", text))
        kinds = {name: kind or None for name, kind in _VALUE.findall(bare)}
        self.names = tuple(kinds)
        """The names of PostgreSQL's values, in order; the columns follow them."""
        cell = "json_extract(value, '$[{}]') AS {}"
        self.sqlite = self._for_sqlite(text, "SELECT {} FROM json_each(:rows)", cell)
        self.sqlite_one = self._for_sqlite(text, "SELECT {}", ":c{} AS {}")
        """The same for a single row, whose columns are the values `c0`, `c1`, …"""
        self.postgres = self._for_postgres(bare, kinds, [kind for _, kind in columns])

    def _for_sqlite(self, text: str, source: str, cell: str) -> str:
        cells = ", ".join(cell.format(index, name) for index, name in enumerate(self.columns))
        text = _ROWS.sub(lambda _: f"({source.format(cells)}) r", text)
        text = _GATHER.sub(lambda found: _packed(found[1]), text)
        text = _VALUE.sub(r":\1", text)
        return _replace(text, _SQLITE_WORDS)

    def _for_postgres(
        self, text: str, values: Mapping[str, str | None], kinds: Sequence[str]
    ) -> str:
        first = len(self.names) + 1
        arrays = ", ".join(f"${first + i}::{_ARRAYS[kind]}" for i, kind in enumerate(kinds))
        marks = {
            name: f"${number}::{_VALUES[kind]}"
            for number, (name, kind) in enumerate(values.items(), 1)
        }
        text = _VALUE.sub(lambda found: marks[found[1]], text)
        text = text.replace("{rows}", f"unnest({arrays}) AS r({', '.join(self.columns)})")
        return _replace(_OF_A_TABLE.sub(_qualified, text), _POSTGRES_WORDS)


def _qualified(found: re.Match[str]) -> str:
    return f"{found[1]}receiver.{found[2]}" if found[2] in tables() else found[0]


def _packed(selected: str) -> str:
    expressions = ", ".join(expression for expression, _ in _selected(selected))
    return f"json_group_array(json_array({expressions}))"


def _selected(text: str) -> Iterator[tuple[str, str]]:
    """Split a select list: yield each expression and the name of its column."""
    depth = start = 0
    for at, char in enumerate(f"{text},"):
        depth += (char == "(") - (char == ")")
        if char == "," and not depth:
            parts = _ALIAS.split(text[start:at].strip())
            yield parts[0], parts[-1].rpartition(".")[2]
            start = at + 1


@cache
def together(statements: tuple[Statement, ...], *, notify: bool) -> str:
    """Join statements that only write batches into one statement for PostgreSQL.

    With `notify` its first two values are a channel and a notice to send to it.
    """
    parts = []
    first = 2 if notify else 0
    for number, statement in enumerate(statements):
        parts.append(f"w{number} AS ({_PLACE.sub(partial(_moved, first), statement.postgres)})")
        first += len(statement.columns)
    notice = "SELECT pg_notify($1::text, $2::text)" if notify else "SELECT 1"
    return f"WITH {', '.join(parts)} {notice}" if parts else notice


def _moved(by: int, place: re.Match[str]) -> str:
    return f"${int(place[1]) + by}"


def _replace(text: str, words: Mapping[str, str]) -> str:
    for word, other in words.items():
        text = text.replace(word, other)
    return text


class Listing:
    """A list query that can be filtered by any of its clauses."""

    def __init__(self, text: str, clauses: Mapping[str, str]) -> None:
        self._text = text
        self._clauses = clauses
        self.names = clauses.keys()
        """The names of its filters."""
        self._by = cache(self._make)

    def by(self, filters: Iterable[str]) -> Statement:
        """Return the statement with exactly these filters."""
        return self._by(tuple(sorted(filters)))

    def _make(self, filters: tuple[str, ...]) -> Statement:
        terms = " AND ".join(self._clauses[name] for name in filters)
        where = f"WHERE {terms}" if terms else ""
        return Statement(self._text.replace("{where}", where), is_list=True)


class Statements:
    """The statements of one file, by name: `sql.insert` or, for lists, `sql.lists["x"]`.

    Each is created at its first use, as a start needs few of them.
    """

    def __init__(self, noun: str) -> None:
        self._noun = noun

    @cached_property
    def _bodies(self) -> Mapping[str, str]:
        return dict(_NAMED.findall(_read(self._noun)))

    @cached_property
    def lists(self) -> Mapping[str, Listing]:
        return {name: self._listing(body) for name, body in self._bodies.items() if _is_list(body)}

    def __getattr__(self, name: str) -> Statement:
        """Return a statement and store it as an attribute."""
        body = self._bodies.get(name)
        if body is None or _is_list(body):
            raise AttributeError(name)
        made = Statement(_bare(self._filled(body)))
        setattr(self, name, made)
        return made

    def __iter__(self) -> Iterator[str]:
        return (name for name, body in self._bodies.items() if not _is_list(body))

    def _listing(self, body: str) -> Listing:
        body = self._filled(body)
        return Listing(_bare(body), dict(_FILTER.findall(body)))

    def _filled(self, text: str) -> str:
        """Replace the marks of fragments by their texts; a fragment may include others."""
        fragments = _fragments(self._noun)
        for _ in range(3):
            text = _MARK.sub(lambda found: fragments.get(found[1], found[0]).strip(), text)
        return text


def _bare(body: str) -> str:
    return _COMMENT.sub("", body).strip()


def _is_list(body: str) -> bool:
    return _WHERE in body


_WHERE: Final = "{where}"
_BLOCK: Final = r"\n(.*?)(?=\n-- (?:name|fragment): |\Z)"
_NAMED: Final = re.compile(r"^-- name: (\w+)" + _BLOCK, re.MULTILINE | re.DOTALL)
_FRAGMENT: Final = re.compile(r"^-- fragment: (\w+)" + _BLOCK, re.MULTILINE | re.DOTALL)
_FILTER: Final = re.compile(r"^-- filter (\w+): (.*)$", re.MULTILINE)
_COMMENT: Final = re.compile(r"^--.*\n?", re.MULTILINE)


_MARK: Final = re.compile(r"\{(\w+)\}")


@cache
def _read(noun: str) -> str:
    return files("receiver.store.sql").joinpath(f"{noun}.sql").read_text("utf-8")


@cache
def _fragments(noun: str) -> Mapping[str, str]:
    found = dict(_words())
    for each in ("shared", "predictions", noun):
        found |= _FRAGMENT.findall(_read(each))
    return found


@cache
def _words() -> dict[str, str]:
    """Return the statuses that statements name, as lists for `IN`."""
    statuses = {
        "terminal": TERMINAL,
        "in_flight": IN_FLIGHT,
        **{f"from_{cause}": sources(cause) for cause in Cause},
    }
    return {
        name: ", ".join(f"'{status}'" for status in sorted(found))
        for name, found in statuses.items()
    }


class Run(NamedTuple):
    """A step that runs one statement and gets its rows."""

    statement: Statement
    params: Mapping[str, Any] = {}
    rows: Sequence[Cells] | None = None


class News(NamedTuple):
    """Changes that other processes wait for; they are notified at the commit."""

    pending: Sequence[tuple[str, str]]
    """Deliveries that are now due: id and handler."""
    ended: Sequence[str] = ()
    """Predictions that have ended."""
    dropped: Sequence[str] = ()
    """Deliveries that are no longer pending and did not run."""


class Write(NamedTuple):
    """A step that writes batches of rows, independent of each other; it gets no rows.

    For PostgreSQL this is one statement, and so one round trip.
    """

    parts: Sequence[tuple[Statement, Sequence[Cells]]]
    news: News | None = None


Step: TypeAlias = Run | Write
Steps: TypeAlias = Generator[Step, list[Any], T]
"""A running operation: it yields steps, is sent the rows of each, and returns its results."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Transaction: TypeAlias = Callable[[Sequence[Item]], Steps[Sequence[Result]]]
"""Handles all waiting items in one transaction, and returns one result per item."""


_SIZES: Final[dict[Any, Callable[[Any], int]]] = {}
_LARGEST_SHORT: Final = 8 * 1024


def short(
    size: Callable[[Any], int] = lambda _item: 0,
) -> Callable[[Transaction[Item, Result]], Transaction[Item, Result]]:
    """Mark a transaction whose statements take at most tens of microseconds per item.

    `size` returns the bytes that are written for an item: an item with many is not short.
    """

    def mark(transaction: Transaction[Item, Result]) -> Transaction[Item, Result]:
        _SIZES[transaction] = size
        return transaction

    return mark


def is_short(transaction: Transaction[Item, Any], item: Item) -> bool:
    """Return whether the event loop itself may run a transaction for an item."""
    size = _SIZES.get(transaction)
    return size is not None and size(item) <= _LARGEST_SHORT


_IN_TURN: Final[set[Any]] = set()


def in_turn(transaction: Transaction[Item, Result]) -> Transaction[Item, Result]:
    """Mark a transaction that must run after all writes before it, and before all after it."""
    _IN_TURN.add(transaction)
    return transaction


def is_in_turn(transaction: Transaction[Any, Any]) -> bool:
    return transaction in _IN_TURN


def in_order(
    items: Sequence[Item], key: Callable[[Item], Any], do: Callable[[Item], Steps[Result]]
) -> Steps[list[Result]]:
    """Run `do` for each item in the order of their keys, so that transactions cannot deadlock."""
    results: dict[int, Result] = {}
    for place in sorted(range(len(items)), key=lambda place: key(items[place])):
        results[place] = yield from do(items[place])
    return [results[place] for place in range(len(items))]


def text(value: Any) -> str:
    """Return a value as JSON text, as columns store it."""
    return msgspec.json.encode(value).decode()
