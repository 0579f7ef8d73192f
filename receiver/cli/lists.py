"""Lists of a running receiver, read page by page; and ids, of which a part is enough."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias
from urllib.parse import urlencode

from receiver.cli.client import Client
from receiver.model.errors import ReceiverError

Row: TypeAlias = Mapping[str, Any]

_LARGEST_PAGE: Final = 100
_MOST_LOOKS: Final = 5
"""Pages that are not full that are read, unless all is wanted: each was looked for far back."""
_DIGITS: Final = {"pred": 32, "dlv": 40, "rep": 32}
_LISTS: Final = {"pred": "/v1/predictions", "dlv": "/v1/deliveries", "rep": "/v1/replays"}
_PART: Final = re.compile(r"(pred|evt|dlv|rep)_[0-9a-f]{1,40}", re.ASCII)


def asking(path: str, params: Mapping[str, Any]) -> str:
    """Return a path with what is given of its parameters."""
    given = {name: value for name, value in params.items() if value is not None}
    return f"{path}?{urlencode(given)}" if given else path


def rows(
    client: Client,
    path: str,
    params: Mapping[str, Any],
    limit: int | None,
    told: Callable[[str], None],
) -> Iterator[Row]:
    """Return the rows of a list, up to a limit; None: all of them.

    A page that is not full comes of a receiver that has looked through many for those that are
    wanted. `told` hears where there may be more than were returned.
    """
    size = _LARGEST_PAGE if limit is None else min(limit, _LARGEST_PAGE)
    returned = looks = 0
    cursor: str | None = None
    while True:
        page = client.get(asking(path, {**params, "limit": size, "cursor": cursor}))
        data, cursor = page["data"], page.get("next_cursor")
        for place, row in enumerate(data, 1):
            yield row
            returned += 1
            if returned == limit:
                if cursor or place < len(data):
                    told("there are more: --limit shows as many as you say")
                return
        if cursor is None:
            return
        looks += len(data) < size
        if limit is not None and looks == _MOST_LOOKS:
            told("looked far back for these: --all goes on")
            return


def whole_id(client: Client, part: str, kind: str = "pred") -> str:
    """Return the id of a prediction, a delivery (dlv) or a replay (rep) that begins so.

    What an event or a delivery is called, its prediction is called too, but for what is before the
    `_`. Raises ReceiverError where no id begins so, or several do. What cannot be one stays as it
    is: the receiver says so.
    """
    if not _PART.fullmatch(part):
        return part
    digits = part.partition("_")[2][: _DIGITS[kind]]
    begun = f"{kind}_{digits}"
    if len(digits) == _DIGITS[kind]:
        return begun
    last = f"{kind}_{digits:f<{_DIGITS[kind]}}"
    page = client.get(asking(_LISTS[kind], {"limit": 2, "cursor": last}))
    found = [str(row["id"]) for row in page["data"] if str(row["id"]).startswith(begun)]
    if not found:
        raise ReceiverError(f"no id begins with {begun}")
    if len(found) > 1:
        raise ReceiverError(f"{found[0]} and others begin with {begun}: write more of it")
    return found[0]


def delivery_to_retry(client: Client, part: str, handler: str | None) -> str:
    """Return the delivery that is named by a part of its id, or of its prediction's or event's.

    Where that is several, one that is dead, skipped or waiting is meant, and `handler` says which.
    Raises ReceiverError where it does not.
    """
    if handler is None and (not _PART.fullmatch(part) or len(part) == len("dlv_") + _DIGITS["dlv"]):
        return part
    prediction = whole_id(client, part)
    path = asking("/v1/deliveries", {"prediction": prediction, "handler": handler, "limit": 100})
    begun = part if part.startswith("dlv_") else "dlv_"
    found = [row for row in client.get(path)["data"] if str(row["id"]).startswith(begun)]
    open_ones = [row for row in found if row["state"] not in {"done", "running"}] or found
    if len(open_ones) == 1:
        return str(open_ones[0]["id"])
    names = ", ".join(f"{row['handler']} ({row['state']})" for row in open_ones)
    raise ReceiverError(
        f"say --handler: {prediction} has deliveries to {names}"
        if open_ones
        else f"{prediction} has no such delivery"
    )
