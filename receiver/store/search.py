"""Search for predictions, for people: by many filters, by family, and with their arrivals.

Status, recipe, person, provider, the name of a model and time have indexes. For any other filter,
such as the text of an input, a page searches a bounded number of predictions, and its cursor is
where the next page continues.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from receiver.model.answers import Delivery, Page
from receiver.model.ids import made_at, oldest_id
from receiver.model.values import Output, Status, utc
from receiver.store.deliveries import delivery_of
from receiver.store.deliveries import sql as deliveries_sql
from receiver.store.engine import Repository
from receiver.store.paging import listed, narrowed, page_of
from receiver.store.predictions import PredictionFilter, database_filters, metadata_test
from receiver.store.statement import Row, Statements

T = TypeVar("T")

sql: Final = Statements("search")

_LOOKED_THROUGH: Final = 3000
"""Predictions that one page searches by a filter without an index."""
_INDEXED: Final = ("person", "recipe", "unsuccessful", "model", "provider")
"""Filters that have an index, the narrowest first."""
_FREE: Final = {"cursor", "since", "until"}
_PROMPT: Final = re.compile(r'"prompt":("(?:[^"\\]|\\.)*"?)')
_GLOB: Final = re.compile(r"[*?\[\]]+")


class Hit(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction, as a list shows it."""

    id: str
    provider: str
    model: str
    status: Status
    created_at: datetime
    submitted_at: datetime | None
    completed_at: datetime | None
    erased: bool
    error_code: str | None
    error_message: str
    """The beginning of the message; for a living prediction, why it has not ended yet."""
    recipe: str | None
    person: str | None
    depth: int
    prompt: str
    """The beginning of the prompt; of the input if it has none."""
    outputs: list[Output] | None
    """None if there are none yet, or if they are too large for a list."""
    has_output: bool


class Wanted(PredictionFilter, frozen=True, kw_only=True):
    """The filters of a search; `model` knows only `*` and `?`, and ignores upper and lower case."""

    recipe: str | None = None
    person: str | None = None
    text: str | None = None
    """A text that the input contains; upper and lower case are the same."""
    until: float | None = None
    """The time before which they were created."""


class SearchExtent(NamedTuple):
    """How far a page has searched, if it ended at the search bound and not because it is full."""

    through: int
    """The number of predictions searched."""
    until: datetime
    """The creation time of the oldest prediction searched."""


class Found(Page[T], Generic[T], frozen=True, kw_only=True):
    """A page of search results."""

    looked: SearchExtent | None = None


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """An arrival for a prediction, and its verdict."""

    channel: str
    received_at: datetime
    headers: list[tuple[str, str]]
    body: str
    """The beginning of the body."""
    size: int
    verdict: str
    reason: str
    repeats: int
    repeated_at: datetime | None


class Search(Repository):
    """Searches one store."""

    async def page(self, wanted: Wanted) -> Found[Hit]:
        """Return a page of predictions, newest first; it may contain fewer than its limit."""
        given = _given(wanted)
        bound = await self._bound(given)
        if bound is not None:
            given["bound"] = bound
        statement = sql.lists["search"].by(narrowed(given))
        rows = await self._store.read(statement, **given, limit=wanted.limit + 1)
        fits = metadata_test(wanted.metadata)
        full = len(rows) > wanted.limit
        rows = rows[: wanted.limit]
        return Found(
            data=[_hit(row) for row in rows if fits(row["metadata"])],
            next_cursor=rows[-1]["id"] if full else bound,
            looked=None if full else _looked(bound),
        )

    async def _bound(self, given: Mapping[str, Any]) -> str | None:
        """Return the id at which a search without a sufficient index must end, if there is one."""
        filters = set(narrowed(given))
        by_index = next((name for name in _INDEXED if name in filters), None)
        if filters - _FREE - {by_index, "living"} == set():
            return None
        names = [*filters & _FREE, *([by_index] if by_index else [])]
        of_index = "status" if by_index == "unsuccessful" else by_index
        params = {name: value for name, value in given.items() if name in {*_FREE, of_index}}
        statement = sql.lists["bound"].by(names)
        rows = await self._store.read(statement, **params, most=_LOOKED_THROUGH - 1)
        return rows[0]["id"] if rows else None

    async def failed(
        self, state: str, handler: str | None, cursor: str | None, limit: int
    ) -> Found[Delivery]:
        """Return dead or skipped deliveries, newest first; with a handler the search is bounded."""
        given = {"state": state} | ({} if cursor is None else {"cursor": cursor})
        bound = None
        if handler is not None:
            statement = deliveries_sql.lists["bound_failed"].by(narrowed(given))
            rows = await self._store.read(statement, **given, most=_LOOKED_THROUGH - 1)
            bound = rows[0]["id"] if rows else None
        wanted = {**given, "handler": handler, "bound": bound}
        rows = await listed(self._store, deliveries_sql.lists["list_deliveries"], wanted, limit)
        page = page_of([delivery_of(row) for row in rows], limit)
        looked = None if page.next_cursor else _looked(bound)
        return Found(data=page.data, next_cursor=page.next_cursor or bound, looked=looked)

    async def pending(self, handler: str | None, limit: int) -> list[Delivery]:
        """Return pending deliveries by handler, in the order of their due times."""
        given = {} if handler is None else {"handler": handler}
        statement = deliveries_sql.lists["list_pending"].by(["base", *given])
        rows = await self._store.read(statement, **given, limit=limit)
        return [delivery_of(row) for row in rows]

    async def family(self, prediction_id: str) -> tuple[list[Hit], list[Hit]]:
        """Return the ancestors of a prediction, the oldest first, and its children."""
        parents = await self._store.read(sql.select_parents, id=prediction_id)
        children = await self._store.read(sql.select_children, id=prediction_id)
        return [_hit(row) for row in parents], [_hit(row) for row in children]

    async def arrivals(self, prediction_id: str) -> list[Arrival]:
        """Return the arrivals for a prediction, the oldest first."""
        rows = await self._store.read(sql.select_callbacks, id=prediction_id)
        return [_arrival(row) for row in rows]

    async def with_content(self, predictions: Sequence[str]) -> set[str]:
        """Return which of some predictions exist and were not erased."""
        rows = await self._store.read(sql.select_whole, [(name,) for name in predictions])
        return {row["id"] for row in rows}

    async def recent(self, since: float, most: int) -> dict[str, int]:
        """Count by status the predictions created since `since`, the latest `most` of them."""
        rows = await self._store.read(sql.count_recent, since=oldest_id("pred", since), most=most)
        return {row["status"]: row["number"] for row in rows}


def _looked(bound: str | None) -> SearchExtent | None:
    return None if bound is None else SearchExtent(_LOOKED_THROUGH, utc(made_at(bound)))


def _given(wanted: Wanted) -> dict[str, Any]:
    """Return the values of the filters that are given."""
    given = {
        **database_filters(wanted, wanted.cursor),
        **_model(wanted.model),
        "recipe": wanted.recipe,
        "person": wanted.person,
        "text": None if wanted.text is None else _escaped(wanted.text),
        "needle": _needle(wanted.metadata),
        "until": None if wanted.until is None else oldest_id("pred", wanted.until),
    }
    return {name: value for name, value in given.items() if value is not None}


def _model(model: str | None) -> dict[str, str]:
    if model is None:
        return {}
    return {"models": _pattern(model)} if {*model} & {*"*?"} else {"model": model}


def _pattern(glob: str) -> str:
    """Return the LIKE pattern for a glob."""
    escaped = re.sub(r"([%_!])", r"!\1", glob)
    return escaped.replace("*", "%").replace("?", "_")


def _escaped(text: str) -> str:
    """Return a text as it appears inside a JSON string."""
    return msgspec.json.encode(text).decode()[1:-1]


def _needle(metadata: Mapping[str, str]) -> str | None:
    """Return the longest text that the metadata must contain for all globs to match."""
    parts = [part for glob in metadata.values() for part in _GLOB.split(glob)]
    return _escaped(max([*parts, *metadata], key=len)) if metadata else None


def _hit(row: Row) -> Hit:
    output = row["output"]
    return Hit(
        id=row["id"],
        provider=row["provider"],
        model=row["model"],
        status=Status(row["status"]),
        created_at=utc(row["created_at"]),
        submitted_at=utc(row["submitted_at"]),
        completed_at=utc(row["completed_at"]),
        erased=row["erased_at"] is not None,
        error_code=row["error_code"],
        error_message=row["error_message"] or "",
        recipe=row["recipe"],
        person=row["person"],
        depth=row["depth"],
        prompt=_prompt(row["prompt"]),
        outputs=None if output is None else msgspec.json.decode(output, type=list[Output]),
        has_output=bool(row["has_output"]),
    )


def _prompt(text: str) -> str:
    """Return the prompt from a piece of an input that begins with it and may be truncated."""
    found = _PROMPT.match(text)
    if found is None:
        return "" if text == "{}" else text
    quoted = found[1]
    if not quoted.endswith('"'):
        quoted = re.sub(r"\\(u\w{0,3})?$", "", quoted) + '"'
    try:
        return str(msgspec.json.decode(quoted))
    except msgspec.DecodeError:
        return quoted.strip('"')


def _arrival(row: Row) -> Arrival:
    body = row["body"]
    return Arrival(
        **{
            **row,
            "received_at": utc(row["received_at"]),
            "repeated_at": utc(row["repeated_at"]),
            "headers": msgspec.json.decode(row["headers"], type=list[tuple[str, str]]),
            "body": body if isinstance(body, str) else bytes(body).decode(errors="replace"),
        }
    )
