"""Replay in bulk from a terminal: count, ask, begin, show how far it is, and let it be canceled."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol

from receiver.model.errors import ReceiverError

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION: Final = re.compile(r"(\d{1,6})([smhdw])", re.ASCII)
_LOOK: Final = 0.5
"""Seconds between two looks at a replay under way."""


class Api(Protocol):
    """What this needs of a client of /v1."""

    def get(self, path: str) -> Any: ...
    def post(self, path: str, body: Any = None) -> Any: ...


class Terminal(Protocol):
    """Whoever reads what we say, and may be asked."""

    def say(self, text: str) -> None: ...
    def ask(self, question: str) -> bool: ...
    def progress(self, done: int, total: int) -> None: ...


def moment(text: str, now: float) -> str:
    """Read a time: RFC 3339, or how long ago, as 24h or 7d."""
    found = _DURATION.fullmatch(text)
    if found is None:
        return _rfc3339(text)
    try:
        ago = timedelta(**{_UNITS[found[2]]: int(found[1])})
        return (datetime.fromtimestamp(now, UTC) - ago).isoformat()
    except OverflowError:
        raise ReceiverError(f"{text} ago is before there were any years") from None


def _rfc3339(text: str) -> str:
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        given = None
    if given is None or given.tzinfo is None:
        raise ReceiverError(f"{text!r} is no time: write 24h, 7d, or 2026-01-31T12:00:00Z")
    return given.isoformat()


def replay(
    api: Api,
    terminal: Terminal,
    wanted: Mapping[str, Any],
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Count what is wanted, and replay it if the one who is asked agrees; give the replay."""
    counted = api.post("/v1/replays", dict(wanted))
    path = f"/v1/replays/{counted['id']}"
    matched, events = counted["matched"], counted["events"]
    terminal.say(f"{counted['id']}: {matched} deliveries of {events} events would be redelivered")
    try:
        agreed = bool(matched) and terminal.ask("Redeliver them?")
    except BaseException:
        api.post(f"{path}/cancel")  # nobody would ever start it
        raise
    if not agreed:
        return api.post(f"{path}/cancel")
    found = api.post(f"{path}/start")
    is_unwanted = False
    while found["state"] == "running":
        try:
            terminal.progress(found["replayed"], matched)
            sleep(_LOOK)
            found = api.get(path)
        except KeyboardInterrupt:
            if terminal.ask("Cancel the replay? What is redelivered by now stays pending."):
                is_unwanted = True
                found = _cancel(api, path)
                break
            terminal.say(f"it goes on; `receiver replays --cancel {counted['id']}` ends it")
            return found
    terminal.progress(found["replayed"], matched)
    late = ", before it could be canceled" if is_unwanted and found["state"] == "done" else ""
    terminal.say(f"{found['state']}: {found['replayed']} deliveries redelivered{late}")
    return found


def _cancel(api: Api, path: str) -> Any:
    """Cancel it, unless it has just ended by itself."""
    try:
        return api.post(f"{path}/cancel")
    except ReceiverError:
        found = api.get(path)
        if found["state"] != "done":
            raise
        return found
