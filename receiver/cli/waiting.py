"""A prediction that a command waits for: its id at once, each change of its state, its results."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

import typer

from receiver.cli.client import Client
from receiver.cli.output import say
from receiver.cli.show import addresses
from receiver.model.errors import ReceiverError
from receiver.model.states import TERMINAL

_FIRST_PAUSE: Final = 0.1
_LONGEST_PAUSE: Final = 1.0
_INTERRUPTED: Final = 130
"""What a shell has for a program that Ctrl-C has ended."""


def wait(
    client: Client,
    prediction: dict[str, Any],
    sleep: Callable[[float], None] = time.sleep,
) -> Any:
    """Wait for the end of a prediction, and say on stderr what happens; return it as it is then.

    Ctrl-C ends only the waiting, as does a receiver that does not answer.
    """
    name = str(prediction["id"])
    path = f"/v1/predictions/{quote(name, safe='')}"
    goes_on = f"{name} goes on: `receiver show {name}` shows it, `receiver cancel {name}` ends it"
    said = None
    pause = _FIRST_PAUSE
    try:
        while True:
            if prediction["status"] != said:
                said = prediction["status"]
                say(f"{name}  {said}", err=True)
            if said in TERMINAL:
                break
            sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE)
            prediction = client.get(path)
    except KeyboardInterrupt:
        say("", err=True)  # behind the terminal's ^C
        say(goes_on, err=True)
        raise typer.Exit(_INTERRUPTED) from None
    except ReceiverError as error:
        raise ReceiverError(f"{error}; {goes_on}") from error
    return prediction


def say_addresses(prediction: dict[str, Any]) -> None:
    """Say on stderr where the results of a prediction are."""
    for address in addresses(prediction):
        say(address, err=True)
