"""A handler that records the prompts it ran for, and can block its process."""

from __future__ import annotations

import os
import time
from pathlib import Path

from receiver import Context, Event, on

BOOK = Path(os.environ["WITNESS_BOOK"])


@on("*")
async def note(event: Event, _ctx: Context) -> None:
    """Record the prompt; the first `hang` blocks the process until it is killed."""
    write(str(event.prediction.input["prompt"]))


def write(prompt: str) -> None:
    hung = BOOK.with_suffix(".hung")
    if prompt == "hang" and not hung.exists():
        hung.touch()
        time.sleep(600)  # like a library call that never returns
    with BOOK.open("a") as book:
        book.write(f"{prompt}\n")
