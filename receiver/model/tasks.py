"""Background tasks: their wake-ups, the loop of a repeated step, and sets of concurrent tasks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import Context
from typing import Any, Final, Literal, NoReturn, TypeAlias, TypeVar

import structlog

from receiver.model.errors import StoreUnavailable

log = structlog.get_logger("receiver")

T = TypeVar("T")

Topic: TypeAlias = Literal["handler", "prediction", "capacity", "poll", "changes", "role"]
"""The topics of wake-ups: deliveries of a handler, the state of a prediction, room at a
provider, predictions to be polled, the change log, the state of a leader's task."""

_AFTER_TROUBLE: Final = 1.0
"""Seconds until a failed step is tried again."""


class Wakeups:
    """The wake-ups of waiting tasks in this process, by topic and name.

    A wake-up is a hint and may be lost with its process: the database contains the work, and each
    task also polls it.
    """

    def __init__(self) -> None:
        self._events: dict[Topic, dict[str, Counter[asyncio.Event]]] = {}
        """One event may listen several times: all readers of a stream share one."""

    @contextlib.contextmanager
    def listen(
        self, topic: Topic, name: str = "", event: asyncio.Event | None = None
    ) -> Iterator[asyncio.Event]:
        """Yield an event that each wake-up of this name sets; listen first, look, then wait."""
        event = event or asyncio.Event()
        events = self._events.setdefault(topic, {})
        listening = events.setdefault(name, Counter())
        listening[event] += 1
        try:
            yield event
        finally:
            listening[event] -= 1
            if not listening[event]:
                del listening[event]
            if not listening:
                del events[name]

    def is_awaited(self, topic: Topic) -> bool:
        """Return whether any task listens to a topic now."""
        return bool(self._events.get(topic))

    def wake(self, topic: Topic, *names: str) -> None:
        """Wake the tasks that listen to any of these names; without a name, none."""
        events = self._events.get(topic, {})
        for name in names:
            for event in events.get(name, ()):
                event.set()

    def wake_all(self, topic: Topic) -> None:
        """Wake the tasks that listen to any name of a topic."""
        self.wake(topic, *self._events.get(topic, {}))


async def repeat(
    step: Callable[[], Awaitable[float | None]],
    awake: asyncio.Event | None = None,
    *,
    longest: float | None = None,
    **about: str,
) -> NoReturn:
    """Run `step` again and again, also after errors.

    A step returns the seconds until the next step, limited to `longest`; None means `longest`.
    `awake` ends the wait early. The fields `about` are logged with an error.
    """
    awake = awake or asyncio.Event()
    while True:
        awake.clear()
        try:
            nap = await step()
        except StoreUnavailable:
            nap = _AFTER_TROUBLE  # the store has logged it
        except Exception:
            log.exception("task.failed", **about)
            nap = _AFTER_TROUBLE
        if nap is None or (longest is not None and nap > longest):
            nap = longest
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if nap is None else max(nap, 0.0)):
                await awake.wait()


class TaskSet:
    """Concurrent tasks, each with a name; a task that ends is removed.

    `ended` is called after each end. An error is logged, unless the caller awaits each task.
    """

    def __init__(
        self, ended: Callable[[], None] = lambda: None, *, is_awaited: bool = False
    ) -> None:
        self._tasks: dict[asyncio.Task[Any], str] = {}
        self._ended = ended
        self._is_awaited = is_awaited

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(list(self._tasks))

    def names(self) -> list[str]:
        """Return the names of the running tasks; callable from any thread."""
        return list(self._tasks.values())

    def find(self, name: str) -> asyncio.Task[Any] | None:
        """Return the task of that name, if it runs."""
        return next((task for task, given in self._tasks.items() if given == name), None)

    def start(
        self, work: Coroutine[Any, Any, Any], name: str = "", *, context: Context | None = None
    ) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, context=context)
        self._tasks[task] = name
        task.add_done_callback(self._take_out)
        return task

    def _take_out(self, task: asyncio.Task[Any]) -> None:
        name = self._tasks.pop(task)
        error = None if task.cancelled() else task.exception()
        if error is not None and not self._is_awaited:
            log.error("task.failed", task=name, exc_info=error)
        self._ended()

    async def wait(self, seconds: float | None = None) -> None:
        """Wait until all have ended, `seconds` at most."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=seconds)

    async def cancel(self) -> None:
        """Cancel all, and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def wait_for_all(*work: Awaitable[T]) -> list[T]:
    """Wait for all, then raise the first error, so that none still runs when it is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks]


def start_thread(name: str, run: Callable[..., None], *given: Any) -> threading.Thread:
    """Start a daemon thread; its name shows in stack dumps."""
    thread = threading.Thread(target=run, args=given, name=name, daemon=True)
    thread.start()
    return thread
