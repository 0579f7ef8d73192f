"""A handler that writes down what it ran for, and may be told to stand in the way."""

from __future__ import annotations

import os
import time
from pathlib import Path

from receiver import Context, Event, on

BOOK = Path(os.environ["WITNESS_BOOK"])


@on("*")
async def note(event: Event, _ctx: Context) -> None:
    """Note the prompt; the first that says `hang` blocks all until the process is killed."""
    write(str(event.prediction.input["prompt"]))


def write(prompt: str) -> None:
    hung = BOOK.with_suffix(".hung")
    if prompt == "hang" and not hung.exists():
        hung.touch()
        time.sleep(600)  # as a library does that never comes back
    with BOOK.open("a") as book:
        book.write(f"{prompt}\n")
