"""Tables for the commands that list: one line per row.

On a terminal a table fits its width, if that is 80 characters or more: times are shown as ages, ids
are cut as far as they stay unique (every command accepts such a part), long texts end in an
ellipsis. In a pipe, and with `--wide`, nothing is cut.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import repeat
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from receiver.model.text import spelled

STATES: Final = {
    "succeeded": "green",
    "failed": "red",
    "canceled": "yellow",
    "unconfirmed": "magenta",
    "processing": "cyan",
    "done": "green",
    "dead": "red",
    "skipped": "yellow",
    "running": "cyan",
    "paused": "yellow",
    "open": "red",
    "probing": "magenta",
    "yes": "green",
    "no": "dim",
}
"""Colours of the states of predictions, deliveries, handlers and replays."""
_COLOURED: Final = {"status", "state", "runs"}
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|\+00:00)", re.ASCII)
_ID: Final = re.compile(r"(pred|evt|dlv|rep)_[0-9a-f]{14,40}", re.ASCII)
_SHORT_ID: Final = 14
"""Minimum number of digits of a cut id: those of its time."""
_NARROWEST: Final = 80
_GAP: Final = "  "
_AGES: Final = ((86_400, "d"), (3600, "h"), (60, "m"), (1, "s"))
_HEADS: Final = {"created_at": "age"}


def shown(text: Any, style: str = "") -> Text:
    """Return untrusted text for rich: without markup, and with unprintable characters escaped."""
    return Text(spelled(str(text)), style)


def plain_cell(value: Any) -> str:
    """Return a value of a table as text."""
    if isinstance(value, dict) and "code" in value:  # an error
        value = f"{value.get('code')}: {value.get('message')}"
    elif isinstance(value, dict):
        value = ", ".join(f"{name}={inner}" for name, inner in value.items())
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    text = "" if value is None else str(value)
    time = _TIME.fullmatch(text)
    return f"{time[1]}Z" if time else spelled(text)


def age(text: str, now: datetime | None = None) -> str:
    """Return a past time as its age (`3m`), a future one as `in 3m`, other text unchanged.

    Only the largest unit is shown.
    """
    if not _TIME.fullmatch(text):
        return text
    try:
        passed = ((now or datetime.now(UTC)) - datetime.fromisoformat(text)).total_seconds()
    except ValueError:  # such as a 13th month
        return text
    seconds = round(abs(passed))
    size, unit = next((pair for pair in _AGES if seconds >= pair[0]), _AGES[-1])
    return f"{'in ' if passed < 0 and seconds else ''}{seconds // size}{unit}"


def print_table(
    rows: Iterable[Mapping[str, Any]],
    columns: Sequence[str],
    more: Sequence[str] = (),
    *,
    wide: bool = False,
    indent: str = "",
) -> None:
    """Print rows; `more` are columns that only a wide table has. Empty columns are left out."""
    console = Console(highlight=False)
    wide = wide or not console.is_terminal
    rows = list(rows)
    filled = [
        name
        for name in (*columns, *(more if wide else ()))
        if any(plain_cell(row.get(name)) for row in rows)
    ]
    cells = [[plain_cell(row.get(name)) for row in rows] for name in filled]
    if not filled:
        return
    heads = filled if wide else [_head(name) for name in filled]
    room = max(console.width, _NARROWEST) - len(indent)
    if not wide:
        cells = [[age(text) for text in column] for column in cells]
        if _needed(_widths(heads, cells)) > room:
            cells = [_short_ids(column) for column in cells]
    widths = _widths(heads, cells)
    if not wide:
        ids = {place for place, column in enumerate(cells) if any(map(_ID.fullmatch, column))}
        widths = _squeezed(widths, room, ids)
    lines = zip(
        *(map(_styled, repeat(name), texts) for name, texts in zip(filled, cells, strict=True)),
        strict=True,
    )
    for texts in ([Text(head, "bold") for head in heads], *lines):
        for text, width in zip(texts, widths, strict=True):
            text.truncate(width, overflow="ellipsis", pad=True)
        whole = Text(indent) + Text(_GAP).join(texts)
        whole.rstrip()
        console.print(whole, soft_wrap=True)


def _styled(name: str, text: str) -> Text:
    return Text(text, STATES.get(text, "") if name in _COLOURED else "")


def _head(name: str) -> str:
    return _HEADS.get(name) or name.removesuffix("_at").removesuffix("_id")


def _short_ids(column: list[str]) -> list[str]:
    """Cut the ids of a column as far as they stay distinct."""
    ids = {text for text in column if _ID.fullmatch(text)}
    for digits in range(_SHORT_ID, max(map(len, ids), default=0)):
        if len({_cut(text, digits) for text in ids}) == len(ids):
            return [_cut(text, digits) if text in ids else text for text in column]
    return column


def _cut(text: str, digits: int) -> str:
    return text[: text.index("_") + 1 + digits]


def _widths(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    return [
        max(Text(text).cell_len for text in (head, *column))
        for head, column in zip(heads, cells, strict=True)
    ]


def _needed(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _squeezed(widths: Sequence[int], room: int, whole: Collection[int]) -> list[int]:
    """Narrow the widest columns until all fit in `room`; those in `whole` keep their width."""
    widths = [width if place in whole else min(width, room) for place, width in enumerate(widths)]
    able = [place for place in range(len(widths)) if place not in whole]
    while able and _needed(widths) > room:
        widest = max(able, key=widths.__getitem__)
        if widths[widest] == 1:
            break
        widths[widest] -= 1
    return widths
