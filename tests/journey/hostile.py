"""Handlers with harmful code, one for each `kind` in a prediction's metadata."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

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


async def closes_streams() -> None:
    for stream in range(3):
        os.close(stream)
    raise ValueError


def _no_tasks(*_: Any, **__: Any) -> Any:
    raise MemoryError


async def makes_no_tasks() -> None:
    asyncio.get_running_loop().set_task_factory(_no_tasks)
    raise ValueError


async def makes_no_tasks_later() -> None:
    asyncio.get_running_loop().call_soon(asyncio.get_running_loop().set_task_factory, _no_tasks)
    await asyncio.sleep(0.1)
    raise ValueError


async def shuts_the_executor() -> None:
    await asyncio.get_running_loop().shutdown_default_executor()


async def shuts_the_generators() -> None:
    await asyncio.get_running_loop().shutdown_asyncgens()


async def takes_the_executor() -> None:
    executor = ThreadPoolExecutor()
    executor.shutdown()
    asyncio.get_running_loop().set_default_executor(executor)


async def forks() -> None:
    if not os.fork():
        return
    raise ValueError("in the parent")


async def forks_in_a_callback() -> None:
    asyncio.get_running_loop().call_soon(os.fork)
    await asyncio.sleep(0.1)
    raise ValueError


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
        closes_streams,
        makes_no_tasks,
        makes_no_tasks_later,
        shuts_the_executor,
        shuts_the_generators,
        takes_the_executor,
        forks,
        forks_in_a_callback,
    )
}

ENDS_LOOPS: Final = ("in_a_callback", "in_a_timer", "stops_the_loop")
"""These are charged to all running attempts, so they are tried one after another."""


async def exits() -> None:
    os._exit(3)


async def aborts() -> None:
    os.abort()


async def kills_us() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


DEADLY: dict[str, Callable[[], Any]] = {way.__name__: way for way in (exits, aborts, kills_us)}


def _note(name: str, attempt: int) -> None:
    with Path(os.environ["JOURNEY_FOLDER"], "hostile").open("a") as book:
        book.write(f"{name} {attempt} {os.getpid()}\n")


def _register(name: str, way: Callable[[], Any], kind: str) -> None:
    async def run(_: Event, ctx: Context) -> Any:
        _note(name, ctx.attempt)
        return await way()

    on("*", name=name, metadata={"kind": kind}, retry=Retry(attempts=2, base=0), timeout=5)(run)


for _name, _way in WAYS.items():
    _register(_name, _way, kind=_name)
for _name, _way in DEADLY.items():
    _register(_name, _way, kind="deadly")


def _wait_until_it_may_hang() -> None:
    """Wait until the submit has been answered: its server may be the process that hangs."""
    while not Path(os.environ["JOURNEY_FOLDER"], "may_hang").exists():
        time.sleep(0.02)


@on("*", name="block", metadata={"kind": "block"}, timeout=60)
async def block(_: Event) -> None:
    await asyncio.to_thread(_wait_until_it_may_hang)
    _note("block", 1)
    threading.Event().wait()


@on("*", name="seize", metadata={"kind": "seize"}, timeout=60)
async def seize(_: Event) -> None:
    """Hold the GIL for ever, as a faulty C extension does."""
    await asyncio.to_thread(_wait_until_it_may_hang)
    _note("seize", 1)
    while True:
        ctypes.PyDLL(None).sleep(3600)


@on("*", name="outlived", metadata={"kind": "outlived"})
async def outlived(_: Event) -> None:
    """Start child processes in several ways; they outlive this process."""
    spawned = await asyncio.to_thread(subprocess.Popen, ["sleep", "3600"], close_fds=False)
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
    process.start()
    _note("child", spawned.pid)
    _note("child", process.pid or 0)
    _note("child", _sleeper())
    _note("child", await asyncio.to_thread(_sleeper))


def _sleeper() -> int:
    child = os.fork()
    if not child:
        time.sleep(3600)
        os._exit(0)
    return child


@on("*", name="good", metadata={"kind": "good"})
async def good(_: Event) -> None:
    await asyncio.to_thread(int)
