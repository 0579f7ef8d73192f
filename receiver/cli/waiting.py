"""Wait for a prediction, and print its id and each change of its status on stderr."""

from __future__ import annotations

from typing import Any, Final

import typer

from receiver.cli.client import Client
from receiver.cli.output import print_line
from receiver.model.errors import ReceiverError
from receiver.model.states import TERMINAL
from receiver.model.values import Status

_ORDER: Final[tuple[str, ...]] = tuple(Status)
_INTERRUPTED: Final = 130
"""The exit code that shells report for a program that Ctrl-C ended."""


def wait(client: Client, prediction: dict[str, Any], after: int | None) -> Any:
    """Wait until a prediction ends, print each status on stderr, and return the prediction.

    `after` is the place of the live stream before the submit. Ctrl-C, or a receiver that does not
    answer, ends only the wait, not the prediction.
    """
    name = str(prediction["id"])
    goes_on = f"{name} goes on: `receiver show {name}` shows it, `receiver cancel {name}` ends it"
    try:
        return _wait(client, prediction, name, after)
    except KeyboardInterrupt:
        print_line("", err=True)  # after the terminal's ^C
        print_line(goes_on, err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except ReceiverError as error:
        raise ReceiverError(f"{error}; {goes_on}") from error


def _wait(client: Client, prediction: dict[str, Any], name: str, after: int | None) -> Any:
    first = str(prediction["status"])
    passed = set(_ORDER[: _ORDER.index(first) + 1]) if first in _ORDER else {first}
    print_line(f"{name}  {first}", err=True)
    if first in TERMINAL:
        return prediction

    def changed(status: Status) -> None:
        if status not in passed:
            print_line(f"{name}  {status}", err=True)
        if status == first or status not in passed:
            passed.clear()  # the stream has reached the answer to the submit

    client.wait(name, after=after, changed=changed)
    return client.fetch("predictions", name)
