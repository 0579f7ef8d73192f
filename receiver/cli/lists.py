"""Lists of a running receiver, read page by page, and the completion of partial ids."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from receiver.cli.output import print_line, print_plainly
from receiver.model.errors import ReceiverError

if TYPE_CHECKING:
    from receiver.cli.client import Client

Row: TypeAlias = Mapping[str, Any]

_LARGEST_PAGE: Final = 100
_MAX_INCOMPLETE_PAGES: Final = 5
"""How many incomplete pages are read at most (--all: no limit); each costs a long search."""
_DIGITS: Final = {"pred": 32, "dlv": 40, "rep": 32}
_LISTS: Final = {"pred": "predictions", "dlv": "deliveries", "rep": "replays"}
_PART: Final = re.compile(r"(pred|evt|dlv|rep)_[0-9a-f]{1,40}", re.ASCII)


def connected() -> Client:
    """Return a client of the receiver that the environment names.

    `.env` is read only if the environment has no RECEIVER_API_KEY, so that the environment's key is
    never sent to a URL from `.env`.
    """
    from receiver.cli.client import Client
    from receiver.cli.environment import read_env_file
    from receiver.settings import Caller

    read_env_file(dev=Caller.parse(os.environ)[0].key is None)
    return Client(os.environ)


def show_list(
    listed: str,
    params: Mapping[str, Any],
    limit: int | None,
    columns: tuple[str, ...],
    more: tuple[str, ...] = (),
    *,
    as_json: bool,
    wide: bool,
    change: Callable[[Row], Row] = lambda row: row,
) -> None:
    """Print a list of the receiver; `change` turns an item into a row of the table."""
    notices: list[str] = []
    with connected() as client:
        if prediction := params.get("prediction"):
            params = {**params, "prediction": whole_id(client, prediction)}
        found = rows(client, listed, params, limit, notices.append)
        found = found if as_json else map(change, found)
        show_rows(found, columns, more, as_json=as_json, wide=wide)
    for notice in notices:
        print_line(f"-- {notice}", err=True)


def show_rows(
    rows: Iterable[Row],
    columns: tuple[str, ...] = (),
    more: tuple[str, ...] = (),
    *,
    as_json: bool = False,
    wide: bool = False,
) -> None:
    """Print rows as JSON lines or as a table; `more` are extra columns of a wide table."""
    if as_json:
        for row in rows:
            print_plainly(row)
        return
    from receiver.cli.tables import print_table

    found = list(rows)
    print_table(found, columns, more, wide=wide)
    if not found:
        print_line("-- there are none", err=True)


def rows(
    client: Client,
    listed: str,
    params: Mapping[str, Any],
    limit: int | None,
    notice: Callable[[str], None],
) -> Iterator[Row]:
    """Yield the rows of a list, up to `limit`; None: all of them.

    The receiver returns an incomplete page when it has searched many rows for those that match.
    `notice` is called if there may be more.
    """
    size = _LARGEST_PAGE if limit is None else min(limit, _LARGEST_PAGE)
    returned = incomplete = 0
    cursor: str | None = None
    while True:
        page = client.fetch(listed, **{**params, "limit": size, "cursor": cursor})
        data, cursor = page["data"], page.get("next_cursor")
        for place, row in enumerate(data, 1):
            yield row
            returned += 1
            if returned == limit:
                if cursor or place < len(data):
                    notice("there are more: use a larger --limit")
                return
        if cursor is None:
            return
        incomplete += len(data) < size
        if limit is not None and incomplete == _MAX_INCOMPLETE_PAGES:
            notice("searched far back for these; --all searches on")
            return


def whole_id(client: Client, part: str, kind: str = "pred") -> str:
    """Return the whole id of a prediction, a delivery (dlv) or a replay (rep) from its beginning.

    `part` may also be of the id of the prediction's event or delivery, which has the same digits.
    A `part` that cannot be of an id is returned unchanged, and the receiver refuses it. Raises
    ReceiverError if no id begins with the digits, or several do.
    """
    if not _PART.fullmatch(part):
        return part
    digits = part.partition("_")[2][: _DIGITS[kind]]
    prefix = f"{kind}_{digits}"
    if len(digits) == _DIGITS[kind]:
        return prefix
    last = f"{kind}_{digits:f<{_DIGITS[kind]}}"
    page = client.fetch(_LISTS[kind], limit=2, cursor=last)
    ids = [str(row["id"]) for row in page["data"] if str(row["id"]).startswith(prefix)]
    if not ids:
        raise ReceiverError(f"no id begins with {prefix}")
    if len(ids) > 1:
        raise ReceiverError(f"{ids[0]} and others begin with {prefix}: give more digits")
    return ids[0]


def change(client: Client, part: str, verb: str) -> Any:
    """Post the action `verb` for the prediction whose id begins with `part`."""
    return client.send("predictions", whole_id(client, part), verb)


def delivery_to_retry(client: Client, part: str, handler: str | None) -> str:
    """Return the id of a delivery from the beginning of its id, or of its prediction's or event's.

    Of several deliveries, those that are done or running are left out, and `handler` selects one.
    Raises ReceiverError if that leaves none or several.
    """
    if handler is None and (not _PART.fullmatch(part) or len(part) == len("dlv_") + _DIGITS["dlv"]):
        return part
    prediction = whole_id(client, part)
    page = client.fetch("deliveries", prediction=prediction, handler=handler, limit=100)
    prefix = part if part.startswith("dlv_") else "dlv_"
    rows = [row for row in page["data"] if str(row["id"]).startswith(prefix)]
    open_ones = [row for row in rows if row["state"] not in {"done", "running"}] or rows
    if len(open_ones) == 1:
        return str(open_ones[0]["id"])
    names = ", ".join(f"{row['handler']} ({row['state']})" for row in open_ones)
    raise ReceiverError(
        f"add --handler: {prediction} has deliveries to {names}"
        if open_ones
        else f"{prediction} has no such delivery"
    )
