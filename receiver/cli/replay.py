"""Replay in bulk from a terminal: count, confirm, start, show progress, cancel."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import typer

from receiver.cli.output import print_line
from receiver.model.errors import ReceiverError

if TYPE_CHECKING:
    from receiver.cli.client import Client

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION: Final = re.compile(r"(\d{1,6})([smhdw])", re.ASCII)
_POLL_INTERVAL: Final = 0.5
"""Seconds between two polls of a running replay."""


def moment(text: str, now: float | None = None) -> str:
    """Return a time as RFC 3339; `text` is RFC 3339, or an age such as 24h or 7d."""
    found = _DURATION.fullmatch(text)
    if found is None:
        return _rfc3339(text)
    try:
        ago = timedelta(**{_UNITS[found[2]]: int(found[1])})
        return (datetime.fromtimestamp(now or time.time(), UTC) - ago).isoformat()
    except OverflowError:
        raise ReceiverError(f"{text} ago is before the year 1") from None


def _rfc3339(text: str) -> str:
    try:
        given = datetime.fromisoformat(text)
    except ValueError:
        given = None
    if given is None or given.tzinfo is None:
        raise ReceiverError(f"{text!r} is not a time: write 24h, 7d, or 2026-01-31T12:00:00Z")
    return given.isoformat()


def replay_all(
    client: Client,
    wanted: Mapping[str, Any],
    *,
    yes: bool,
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Count a replay; start it with `yes` or if the user confirms, else cancel it. Return it."""
    from rich.progress import Progress

    count = client.send("replays", body=dict(wanted))
    path = ("replays", count["id"])
    matched, events = count["matched"], count["events"]
    print_line(f"{count['id']}: {matched} deliveries of {events} events would be redelivered")
    try:
        agreed = bool(matched) and (yes or _confirm("Redeliver them?"))
    except BaseException:
        client.send(*path, "cancel")  # it would never be started
        raise
    if not agreed:
        return client.send(*path, "cancel")
    replay = client.send(*path, "start")
    late = ""
    try:
        with Progress(disable=not is_interactive()) as bar:
            task = bar.add_task("redelivered", total=matched, completed=replay["replayed"])
            while replay["state"] == "running":
                sleep(_POLL_INTERVAL)
                replay = client.fetch(*path)
                bar.update(task, completed=replay["replayed"])
    except KeyboardInterrupt:
        if not (yes or _confirm("Cancel the replay? What is redelivered by now stays pending.")):
            print_line(f"it goes on; `receiver replays --cancel {count['id']}` ends it")
            return replay
        replay = _cancel(client, path)
        late = ", before it could be canceled" if replay["state"] == "done" else ""
    print_line(f"{replay['state']}: {replay['replayed']} deliveries redelivered{late}")
    return replay


def is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _confirm(question: str) -> bool:
    if not is_interactive():
        raise ReceiverError("this is not a terminal: pass --yes")
    return typer.confirm(question)


def _cancel(client: Client, path: tuple[str, ...]) -> Any:
    """Cancel a replay, and return it; one that is already done is returned as it is."""
    try:
        return client.send(*path, "cancel")
    except ReceiverError:
        found = client.fetch(*path)
        if found["state"] != "done":
            raise
        return found
