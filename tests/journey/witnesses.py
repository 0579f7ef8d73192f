"""Handlers that append a line to a file for each thing they do, so that a kill loses none."""

import asyncio
import os
import threading
import time
from pathlib import Path

from receiver import Context, Event, on

_FOLDER = Path(os.environ["JOURNEY_FOLDER"])


def note(book: str, *words: object) -> None:
    line = " ".join(str(word) for word in (*words, os.getpid())) + "\n"
    descriptor = os.open(_FOLDER / book, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


@on(name="async-witness", metadata={"kind": "journey"})
async def watch(event: Event, ctx: Context) -> None:
    note("seen", event.id, "async-witness", event.prediction.id, event.type)
    await ctx.once("first", lambda: note("steps", ctx.idempotency_key, "first"))
    await asyncio.sleep(0.05)
    await ctx.once("second", lambda: note("steps", ctx.idempotency_key, "second"))


@on(name="sync-witness", metadata={"kind": "journey"})
def look(event: Event, ctx: Context) -> None:
    note("seen", event.id, "sync-witness", event.prediction.id, event.type)
    time.sleep(0.05)
    ctx.once("only", lambda: note("steps", ctx.idempotency_key, "only"))
    if ctx.attempt == 1 and event.prediction.input["prompt"].endswith("again"):
        raise RuntimeError("the first attempt fails")


@on(name="async-hang", metadata={"kind": "hang"})
async def hang(event: Event) -> None:
    note("hung", event.id, "async-hang")
    while "HANG" in os.environ:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            note("refused", event.id)  # the worst case: it swallows its cancellation


@on(name="sync-hang", metadata={"kind": "hang"})
def block(event: Event) -> None:
    note("hung", event.id, "sync-hang")
    if "HANG" in os.environ:
        threading.Event().wait()


def _is_released() -> bool:
    return (_FOLDER / f"release-{os.getpid()}").exists()


@on(name="async-long", metadata={"kind": "long"}, timeout=600)
async def stay(event: Event, ctx: Context) -> None:
    note("begun", event.prediction.id, "async-long", ctx.attempt)
    while not _is_released():  # noqa: ASYNC110 - the test is another process, and creates a file
        await asyncio.sleep(0.02)
    note("ended", event.prediction.id, "async-long", ctx.attempt)


@on(name="sync-long", metadata={"kind": "long"}, timeout=600)
def stand(event: Event, ctx: Context) -> None:
    note("begun", event.prediction.id, "sync-long", ctx.attempt)
    while not _is_released():
        time.sleep(0.02)
    note("ended", event.prediction.id, "sync-long", ctx.attempt)
