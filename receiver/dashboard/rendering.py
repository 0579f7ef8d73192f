"""The rendering of pages from templates: all values are escaped, and a missing one is an error."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import Any, Final

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from receiver.model.states import TERMINAL
from receiver.model.tolerant import DEEPEST
from receiver.model.values import utc

_FOLDER: Final = files("receiver.dashboard").joinpath("static")
TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_UNITS: Final = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_KIB: Final = 1024
_LONGEST_INDENTED: Final = 50_000
_LONGEST_SHOWN: Final = 200_000
_BRACKETS: Final = re.compile(r"[][{}]")


class Static:
    """The files that pages load, and tags for their addresses that change with the content."""

    def __init__(self) -> None:
        self.files = {
            each.name: each.read_bytes()
            for each in _FOLDER.iterdir()
            if each.name.rpartition(".")[2] in TYPES
        }
        self.tags = {
            name: hashlib.sha256(content).hexdigest()[:16] for name, content in self.files.items()
        }


@cache
def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("receiver.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    for each in (moment, ago, duration, pretty, short, size, dollars, seconds_between):
        made.filters[each.__name__] = each
    made.tests |= {"ended": lambda status: status in TERMINAL}
    return made


def render(template: str, values: Mapping[str, Any]) -> str:
    return environment().get_template(template).render(values)


def moment(time: datetime | str | float | None) -> Markup:
    """Return a time as HTML, in UTC, to the second."""
    if time is None:
        return Markup("&ndash;")
    read = _read(time)
    shown = read.strftime("%Y-%m-%d %H:%M:%S")
    return Markup('<time datetime="{}">{}</time>').format(_iso(read), shown)


def ago(time: datetime | str | float | None, now: float) -> Markup:
    """Return as HTML how long ago a time is, or how long it is until then."""
    if time is None:
        return Markup("&ndash;")
    read = _read(time)
    seconds = now - read.timestamp()
    text = f"{duration(abs(seconds))} ago" if seconds >= 0 else f"in {duration(-seconds)}"
    return Markup('<time datetime="{}" title="{} UTC">{}</time>').format(
        _iso(read), read.strftime("%Y-%m-%d %H:%M:%S"), text if abs(seconds) >= 1 else "now"
    )


def duration(seconds: float) -> str:
    """Return a time span in its largest unit."""
    if seconds < 10:  # noqa: PLR2004 - where tenths matter
        return f"{seconds:.1f} s"
    unit, name = next(each for each in _UNITS if seconds >= each[0])
    return f"{seconds / unit:.0f} {name}"


def seconds_between(end: datetime | str, start: datetime | str) -> float:
    return (_read(end) - _read(start)).total_seconds()


def pretty(value: Any) -> str:
    """Return indented JSON, or the text as it is if invalid, long or deep; only its beginning."""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if len(text) <= _LONGEST_INDENTED and _depth(text) <= DEEPEST:
        with suppress(msgspec.DecodeError):
            text = msgspec.json.format(text, indent=2)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _depth(text: str) -> int:
    """Return how many brackets are open at most, including brackets in texts."""
    return max(accumulate(1 if mark in "[{" else -1 for mark in _BRACKETS.findall(text)), default=0)


def short(id: str) -> str:
    """Return the kind and the end of an id, by which ids differ."""
    kind, _, name = id.partition("_")
    return f"{kind}_…{name[-6:]}"


def size(number: int) -> str:
    """Return a number of bytes with its unit."""
    if number < _KIB:
        return f"{number} B"
    if number < _KIB**2:
        return f"{number / _KIB:.0f} KiB"
    return f"{number / _KIB**2:.1f} MiB"


def dollars(amount: float) -> str:
    """Return an amount in dollars; below one dollar, to a microdollar."""
    if amount >= 1:
        return f"${amount:,.2f}"
    cents, rest = f"{amount:.6f}"[:4], f"{amount:.6f}"[4:]
    return f"${cents}{rest.rstrip('0')}"


def _read(time: datetime | str | float) -> datetime:
    if isinstance(time, str):
        return datetime.fromisoformat(time)
    return utc(time) if isinstance(time, float | int) else time


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds")
