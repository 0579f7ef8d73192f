"""Handlers whose code does what it should not, one for each kind of prediction."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from receiver import Context, Event, Retry, on


class Unsayable(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


async def ends(code: int = 2) -> None:
    sys.exit(code)


async def raises(error: BaseException) -> None:
    raise error


async def in_wait_for() -> None:
    await asyncio.wait_for(ends(), 5)


async def in_gather() -> None:
    await asyncio.gather(ends(), ends())


async def in_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(ends())


async def in_a_task() -> None:
    task = asyncio.create_task(ends())
    await asyncio.sleep(0.1)
    del task


async def in_a_thread() -> None:
    await asyncio.gather(asyncio.to_thread(sys.exit, 2))


async def in_a_callback() -> None:
    asyncio.get_running_loop().call_soon(sys.exit, 2)


async def in_a_timer() -> None:
    asyncio.get_running_loop().call_later(0.05, sys.exit, 2)
    await asyncio.sleep(0.5)


async def stops_the_loop() -> None:
    asyncio.get_running_loop().stop()


async def closes_the_loop() -> None:
    asyncio.get_running_loop().close()


async def cancels_all() -> None:
    for task in asyncio.all_tasks():
        task.cancel()


async def cancels_others() -> None:
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


async def cannot_be_said() -> None:
    raise Unsayable


async def interrupts() -> None:
    await asyncio.create_task(raises(KeyboardInterrupt()))


async def generator_exit() -> None:
    await asyncio.create_task(raises(GeneratorExit()))


async def returns_its_work() -> Any:
    return [ends()]


async def takes_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise ValueError


async def forks() -> None:
    if not os.fork():
        return
    raise ValueError("in the parent")


WAYS: dict[str, Callable[[], Any]] = {
    way.__name__: way
    for way in (
        in_wait_for,
        in_gather,
        in_group,
        in_a_task,
        in_a_thread,
        in_a_callback,
        in_a_timer,
        stops_the_loop,
        closes_the_loop,
        cancels_all,
        cancels_others,
        cannot_be_said,
        interrupts,
        generator_exit,
        returns_its_work,
        takes_signals,
        forks,
    )
}


def _note(name: str, attempt: int) -> None:
    with Path(os.environ["JOURNEY_FOLDER"], "hostile").open("a") as book:
        book.write(f"{name} {attempt} {os.getpid()}\n")


def _register(name: str, way: Callable[[], Any]) -> None:
    async def run(_: Event, ctx: Context) -> Any:
        _note(name, ctx.attempt)
        return await way()

    on("*", name=name, metadata={"kind": name}, retry=Retry(attempts=2, base=0), timeout=5)(run)


for _name, _way in WAYS.items():
    _register(_name, _way)


@on("*", name="block", metadata={"kind": "block"}, timeout=60)
async def block(_: Event) -> None:
    _note("block", 1)
    while True:
        pass


@on("*", name="dies", metadata={"kind": "dies"}, retry=Retry(attempts=1))
async def dies(_: Event) -> None:
    os._exit(3)


@on("*", name="good", metadata={"kind": "good"})
async def good(_: Event) -> None: ...
