"""The filters of lists: read from the query, and shown one by one, each removable."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from receiver.http.declare import PredictionId
from receiver.model.errors import Problem
from receiver.model.recipes import METADATA
from receiver.model.values import Status
from receiver.store.search import Wanted

Query = TypeVar("Query", bound=msgspec.Struct)

PAGE: Final = 50
_MAX_METADATA: Final = 10
"""Maximum number of filters by metadata."""
_MAX_LENGTH: Final = 300
"""Maximum characters of one of them, with its name."""
_LABELS: Final = {"since": "from"}
"""Names of filters in lists of them, if they differ from those in the query."""
_Text = Annotated[str, Meta(max_length=300)]


class Filters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The query of a list of predictions."""

    status: Status | None = None
    provider: _Text | None = None
    model: _Text | None = None
    recipe: _Text | None = None
    person: _Text | None = None
    text: _Text | None = None
    since: _Text | None = None
    until: _Text | None = None
    cursor: PredictionId | None = None


class Chip(NamedTuple):
    """A filter that is on, and the query without it."""

    name: str
    value: str
    without: Mapping[str, str]


def wanted(query: Mapping[str, str]) -> Wanted:
    """Return the filters of a query; raise Problem for an invalid one. Empty fields are ignored."""
    given = {name: value.strip() for name, value in query.items()}
    read = msgspec.structs.asdict(read_query(given, Filters))
    read |= {name: time.timestamp() for name, time in times(given).items()}
    return Wanted(**read, metadata=metadata(query), limit=PAGE)


def metadata(query: Mapping[str, str]) -> dict[str, str]:
    """Return the filters by metadata: `metadata.NAME=GLOB`, or a pair of fields of the form."""
    found = {
        name.removeprefix(METADATA): value
        for name, value in query.items()
        if name.startswith(METADATA) and value
    }
    if query.get("meta") and query.get("is"):
        found[query["meta"]] = query["is"]
    if len(found) > _MAX_METADATA or any(
        len(name + value) > _MAX_LENGTH for name, value in found.items()
    ):
        problem = f"at most {_MAX_METADATA} of metadata, of {_MAX_LENGTH} characters each"
        raise Problem(422, "invalid-request", problem)
    return found


def chips(query: Mapping[str, str]) -> list[Chip]:
    """Return the filters that are on."""
    of_form = {name: value for name, value in query.items() if name not in {"meta", "is"}}
    on = of_form | {METADATA + name: value for name, value in metadata(query).items()}
    kept = {name: value for name, value in on.items() if value and name not in {"cursor", "done"}}
    return [
        Chip(_LABELS.get(name, name), value, {k: v for k, v in kept.items() if k != name})
        for name, value in kept.items()
        if name in Filters.__struct_fields__ or name.startswith(METADATA)
    ]


def times(query: Mapping[str, str]) -> dict[str, datetime]:
    """Return `since` and `until`, if given; without a zone they are in UTC."""
    found = {}
    for name in ("since", "until"):
        if text := query.get(name):
            try:
                read = datetime.fromisoformat(text)
            except ValueError:
                problem = f"{name} must be like 2026-11-29 or 2026-11-29T13:40"
                raise Problem(422, "invalid-request", problem) from None
            found[name] = read if read.tzinfo else read.replace(tzinfo=UTC)
    return found


def read_query(query: Mapping[str, str], kind: type[Query], **more: Any) -> Query:
    """Return a route's parameters from a query; empty ones are ignored."""
    names = {*kind.__struct_fields__} & query.keys()
    given = {name: query[name] for name in names if query[name]}
    if any(value.endswith("\n") for value in given.values()):  # a pattern's `$` matches before it
        raise Problem(422, "invalid-request", "a filter is invalid: it ends with a line break")
    try:
        return msgspec.convert(given | more, kind)
    except msgspec.ValidationError as error:
        raise Problem(422, "invalid-request", f"a filter is invalid: {error}") from None
