"""One SQL text for two engines, how an operation asks for it to be run, and by whom.

A text is written in the words both understand; what differs is a mark in it:

- `:name` is a value that the statement is given.
- `{rows:id text, at float}` is a table `r` made of the rows that the statement is given: the whole
  batch in one step. Python's sqlite3 gives up the interpreter lock around every step, and getting
  it back while the event loop is busy costs far more than the step itself; for PostgreSQL a step
  is a round trip.
- `{gather:a, b}` is the list of what is selected. SQLite packs all rows into one, for the reason
  above.
- `{lock}` and `{skip}` lock the selected rows where other processes write too: waiting for whoever
  has them, or passing them over.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cache, partial
from typing import Any, Final, NamedTuple, Protocol, TypeAlias, TypeVar

T = TypeVar("T")

Row: TypeAlias = Sequence[Any]

_ARRAYS: Final = {
    "text": "text[]",
    "float": "double precision[]",
    "int": "bigint[]",
    "bytes": "bytea[]",
}
# A value means the same wherever it is named. PostgreSQL would guess, and guess text.
_VALUE_TYPES: Final = {
    **dict.fromkeys(
        (
            "before",
            "canceled_before",
            "created_at",
            "dead_before",
            "deadline",
            "due_at",
            "failed_before",
            "hold_sync_until",
            "hold_until",
            "lease_until",
            "now",
            "since",
            "succeeded_before",
            "until",
            "young",
        ),
        "double precision",
    ),
    **dict.fromkeys(
        (
            "after",
            "at_work",
            "below",
            "end",
            "events",
            "kept",
            "largest",
            "last",
            "limit",
            "matched",
            "most",
            "next",
            "owed",
            "requests",
            "value",
        ),
        "bigint",
    ),
    "everyone": "boolean",
}
_SQLITE_WORDS: Final = {"least(": "min(", "{lock}": "", "{skip}": ""}
_POSTGRES_WORDS: Final = {
    "json_group_array(": "json_agg(",
    "json_object(": "json_build_object(",
    "{lock}": "FOR UPDATE",
    "{skip}": "FOR UPDATE SKIP LOCKED",
}
_ROWS: Final = re.compile(r"\{rows:([^}]*)\}")
_GATHER: Final = re.compile(r"\{gather:([^}]*)\}")
_VALUE: Final = re.compile(r"(?<!:):([a-z_]+)")
_PLACE: Final = re.compile(r"\$(\d+)")


class Query:
    """One statement, as each engine wants to hear it."""

    def __init__(self, text: str) -> None:
        found = _ROWS.search(text)
        columns = [column.split() for column in found[1].split(",")] if found else []
        self.columns = tuple(name for name, _ in columns)
        """Of the rows it is given."""
        self.blobs = tuple(index for index, (_, kind) in enumerate(columns) if kind == "bytes")
        """Which of them hold bytes."""
        self.gathers = bool(_GATHER.search(text))
        bare = _GATHER.sub(lambda found: found[1], _ROWS.sub("{rows}", text))
        self.names = tuple(dict.fromkeys(_VALUE.findall(bare)))
        """The values of PostgreSQL's statement, in order; the columns follow them."""
        cell = "json_extract(value, '$[{}]') AS {}"
        self.sqlite = self._for_sqlite(text, "SELECT {} FROM json_each(:rows)", cell)
        self.sqlite_one = self._for_sqlite(text, "SELECT {}", ":c{} AS {}")
        """The same for one row, whose columns are the values `c0`, `c1`, …"""
        self.postgres = self._for_postgres(bare, [kind for _, kind in columns])

    def _for_sqlite(self, text: str, source: str, cell: str) -> str:
        cells = ", ".join(cell.format(index, name) for index, name in enumerate(self.columns))
        text = _ROWS.sub(lambda _: f"({source.format(cells)}) r", text)
        text = _GATHER.sub(lambda found: f"json_group_array(json_array({found[1]}))", text)
        return _replace(text, _SQLITE_WORDS)

    def _for_postgres(self, text: str, kinds: Sequence[str]) -> str:
        first = len(self.names) + 1
        arrays = ", ".join(f"${first + i}::{_ARRAYS[kind]}" for i, kind in enumerate(kinds))
        marks = {
            name: f"${number}::{_VALUE_TYPES.get(name, 'text')}"
            for number, name in enumerate(self.names, 1)
        }
        text = _VALUE.sub(lambda found: marks[found[1]], text)
        text = text.replace("{rows}", f"unnest({arrays}) AS r({', '.join(self.columns)})")
        return _replace(text, _POSTGRES_WORDS)


@cache
def together(queries: tuple[Query, ...], *, notify: bool) -> str:
    """Make one statement of PostgreSQL's out of several that only write batches.

    With `notify` its first two values are a channel and what is to be said there.
    """
    parts = []
    first = 2 if notify else 0
    for number, query in enumerate(queries):
        parts.append(f"w{number} AS ({_PLACE.sub(partial(_moved, first), query.postgres)})")
        first += len(query.columns)
    told = "SELECT pg_notify($1::text, $2::text)" if notify else "SELECT 1"
    return f"WITH {', '.join(parts)} {told}" if parts else told


def _moved(by: int, place: re.Match[str]) -> str:
    return f"${int(place[1]) + by}"


def _replace(text: str, words: Mapping[str, str]) -> str:
    for word, other in words.items():
        text = text.replace(word, other)
    return text


class Run(NamedTuple):
    """Run a statement; what it selects or returns is the answer."""

    query: Query
    params: Mapping[str, Any] = {}
    rows: Sequence[Row] | None = None


class News(NamedTuple):
    """What others wait for; it is told with the commit, if there is anybody to be told."""

    owed: Sequence[tuple[str, str]]
    """Deliveries that are due from now on: id and handler."""
    ended: Sequence[str] = ()
    """Predictions that have come to their end."""
    over: Sequence[str] = ()
    """Deliveries that are owed no more, though nobody has run them."""


class Write(NamedTuple):
    """Write batches of rows, of which none looks at what another writes; there is no answer.

    For PostgreSQL this is one statement, and so one round trip.
    """

    parts: Sequence[tuple[Query, Sequence[Row]]]
    news: News | None = None


Step: TypeAlias = Run | Write
Steps: TypeAlias = Generator[Step, list[Any], T]
"""An operation under way: it yields steps, is sent the rows of each, and returns its results."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Operation: TypeAlias = Callable[[Sequence[Item]], Steps[Sequence[Result]]]
"""What is done for all the items that wait for it, in one transaction; one result an item."""


def run_each(items: Sequence[Run]) -> Steps[list[list[Row]]]:
    """Run one statement for each item: the operation of whoever needs no more; its rows result."""
    results = []
    for item in items:
        results.append((yield item))  # noqa: PERF401 - a generator yields for it
    return results


class Reads(Protocol):
    """A store, as whatever only reads it needs it."""

    async def read(
        self, query: Query, rows: Sequence[Row] | None = None, **params: Any
    ) -> list[Row]: ...


class Writes(Protocol):
    """A store, as whatever only writes to it needs it."""

    async def write(self, operation: Operation[Item, Result], item: Item) -> Result: ...


class Tables(Reads, Writes, Protocol):
    """A store, as whatever keeps rows of its own there needs it."""
