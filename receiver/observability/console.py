"""The log on a terminal: one line for each event, the most important fields first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Final, TextIO

from receiver.model.text import spelled

_STATES: Final = ("status", "state", "outcome", "result")
"""Fields with a state; the first that is there is shown."""
_SHOWN: Final = frozenset({"time", "level", "event", "provider", "model", "prediction"})
_SECONDARY: Final = frozenset({"provider_id", "event_id", "delivery", "request", "owner", "trace"})
"""Ids for other systems: shown only in warnings and errors."""
_QUIET: Final = frozenset({"debug", "info"})
_SHORT_ID: Final = len("pred_") + 12
"""Characters of an id that no other id begins with, unless made in the same millisecond."""
_SHORTEST_MODEL: Final = 8
_COLOURS: Final = {
    "warning": 33,
    "error": 31,
    "critical": 31,
    "succeeded": 32,
    "done": 32,
    "failed": 31,
    "dead": 31,
}


class Console:
    """Renders events for a stream; debug and info lines are cut to the terminal's width."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._colours = out.isatty() and not os.environ.get("NO_COLOR")

    def __call__(self, _: Any, __: str, event: MutableMapping[str, Any]) -> str:
        """Return a line and, indented below it, the lines of a traceback or another long text.

        So no line of an error's message looks like a line of the log.
        """
        long = "\n".join(str(event.pop(name)) for name in ("exception", "stack") if name in event)
        below = [f"    {spelled(line)}" for line in long.split("\n")] if long else []
        return "\n".join([self._line(event), *below])

    def _line(self, event: Mapping[str, Any]) -> str:
        """Return one line without its line end."""
        level = str(event.get("level", "info"))
        head = [
            (str(event.get("time", ""))[11:19], 0),
            (f"{'warn' if level == 'warning' else level:<5}", _COLOURS.get(level, 2)),
            (f"{_spelled(event.get('event', '')):<15}", 1),
        ]
        state = next((name for name in _STATES if event.get(name) is not None), None)
        state_text = _spelled(event[state]) if state else ""
        ids = _spelled(event.get("prediction") or "")[:_SHORT_ID]
        provider = _spelled(event.get("provider") or "")
        tail = [(state_text, _COLOURS.get(state_text, 0)), (ids, 36)]
        rest = [(text, 2) for text in _rest(event, level, state)]
        model, width = _spelled(event.get("model") or ""), self._width(level)
        if width and model:
            used = sum(len(text) + 1 for text, _ in [*head, (provider, 0), *tail] if text)
            model = _cut(model, max(width - used, _SHORTEST_MODEL))
        return self._joined([*head, (provider, 0), (model, 0), *tail, *rest], width)

    def _width(self, level: str) -> int | None:
        """Return the most columns of a line; None: no limit."""
        if level not in _QUIET or not self._out.isatty():
            return None
        given = os.environ.get("COLUMNS", "")
        try:
            if given.isdecimal():
                return int(given)
            return os.get_terminal_size(self._out.fileno()).columns
        except (OSError, ValueError):
            return None

    def _joined(self, parts: list[tuple[str, int]], width: int | None) -> str:
        """Join the parts that are not empty, each in its colour, up to the width."""
        written: list[str] = []
        used = 0
        for text, colour in parts:
            if not text:
                continue
            room = None if not width else width - used
            if room is not None and room <= 1:
                break
            shown = text if room is None else _cut(text, room)
            used += len(shown) + 1
            written.append(f"\x1b[{colour}m{shown}\x1b[0m" if self._colours and colour else shown)
        return " ".join(written).rstrip()


def _rest(event: Mapping[str, Any], level: str, state: str | None) -> Iterator[str]:
    """Yield the other fields, `reason` first; debug and info lines without `_SECONDARY`."""
    hidden = _SHOWN | _SECONDARY if level in _QUIET else _SHOWN
    for name, value in sorted(event.items(), key=lambda field: field[0] != "reason"):
        is_cut = name == "prediction" and level not in _QUIET
        if value is None or name == state or (name in hidden and not is_cut):
            continue
        yield f"{_spelled(name)}={_spelled(value)}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def _spelled(value: object) -> str:
    try:
        return spelled(value if isinstance(value, str) else repr(value))
    except Exception:  # noqa: BLE001 - that of a handler's own value, whose call must not fail
        return type(value).__name__
