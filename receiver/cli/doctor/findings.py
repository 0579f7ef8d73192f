"""What a check has found: one line, fit for a terminal and for a script."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, Literal, TypeAlias, TypeVar

import msgspec

T = TypeVar("T")

Level: TypeAlias = Literal["ok", "warn", "FAIL"]
_ORDER: Final[tuple[Level, ...]] = ("ok", "warn", "FAIL")


class Finding(msgspec.Struct, frozen=True):
    """One line of the report."""

    level: Level
    name: str
    """What was looked at."""
    says: str
    fix: str = ""
    """How to fix it; empty where nothing is wrong."""

    def __str__(self) -> str:
        return f"{self.name}: {self.says}" + (f"; {self.fix}" if self.fix else "")


Findings: TypeAlias = list[Finding]

ok: Final = partial(Finding, "ok")
warn: Final = partial(Finding, "warn")
fail: Final = partial(Finding, "FAIL")


def worst(findings: Findings) -> Level:
    return max((found.level for found in findings), key=_ORDER.index, default="ok")


async def in_thread(work: Callable[[], T]) -> T:
    """Run what blocks in a thread of its own, which nobody waits for at our end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(result)  # type: ignore[arg-type] # there is one where there is no error
        else:
            done.set_exception(error)

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 - it is raised where it is awaited
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True).start()
    return await done
