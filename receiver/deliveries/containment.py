"""Containment: a handler's code cannot end the event loop that it shares with the receiver.

SystemExit or KeyboardInterrupt in any task or callback ends a whole event loop, as do `loop.stop()`
and the cancellation of all tasks. In a handler's task they become an error of that task; if a
callback ends the loop, the running attempts are charged with it, and `run` restarts the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Generator, Iterator
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

import structlog

from receiver.model import forks

log = structlog.get_logger("receiver")

T = TypeVar("T")

_ENDS_A_LOOP: Final = (SystemExit, KeyboardInterrupt)


class Charge:
    """The first error charged to an attempt, in addition to what its handler raised."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def take(self, error: Exception) -> None:
        self.error = self.error or error


_charge: Final[contextvars.ContextVar[Charge | None]] = contextvars.ContextVar(
    "receiver_charge", default=None
)
"""Set in all code that an attempt runs, its tasks, callbacks and thread included."""
_running: Final[set[Charge]] = set()
"""The charges of the attempts that run on the event loop now."""


@contextlib.contextmanager
def charged(charge: Charge, *, on_loop: bool) -> Iterator[contextvars.Context]:
    """Yield the context to run an attempt in."""
    context = contextvars.copy_context()
    context.run(_charge.set, charge)
    if on_loop:
        _running.add(charge)
    try:
        yield context
    finally:
        _running.discard(charge)


def contained(error: BaseException) -> Exception:
    """Return the error, or a RuntimeError instead if it would end more than an attempt."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {described(error)}")


def described(error: BaseException) -> str:
    """Return the message of an error; '' if its `__str__` raises."""
    try:
        return str(error)
    except BaseException:  # noqa: BLE001 - a handler's class may raise SystemExit here
        return ""


class _Contained(Coroutine[Any, Any, T]):
    """A handler's coroutine that raises an error instead of ending the event loop."""

    def __init__(self, inner: Coroutine[Any, Any, T], charge: Charge) -> None:
        self._inner = inner
        self._charge = charge
        self._process = os.getpid()

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._inner.throw, *error)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, T]:
        raise NotImplementedError  # only a task drives it

    def _step(self, step: Callable[..., Any], *given: Any) -> Any:
        try:
            return step(*given)
        except _ENDS_A_LOOP as error:
            made = contained(error)
            self._charge.take(made)
            raise made from error
        finally:
            take_back(self._process)


class _OwnTask(asyncio.Task[Any]):
    """A task of the receiver, which no handler's code can cancel."""

    def cancel(self, msg: Any | None = None) -> bool:
        charge = _charge.get()
        if charge is None:
            return super().cancel(msg)
        charge.take(RuntimeError("the handler cancelled tasks that are not its own"))
        return False


class _Factory:
    """A task factory: handlers' tasks are contained, others are protected or as before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, owned: bool) -> None:
        self._before = loop.get_task_factory()
        self._owned = owned

    def __call__(
        self, loop: asyncio.AbstractEventLoop, coroutine: Any, **given: Any
    ) -> asyncio.Future[Any]:
        context = given.get("context")
        charge = _charge.get() if context is None else context.get(_charge)
        if charge is not None:
            coroutine = _Contained(coroutine, charge)
        elif self._owned:
            return _OwnTask(coroutine, loop=loop, **given)
        if self._before is not None:
            return self._before(loop, coroutine, **given)
        return asyncio.Task(coroutine, loop=loop, **given)


def contain(loop: asyncio.AbstractEventLoop, *, owned: bool = False) -> None:
    """Contain the handlers' tasks on this loop; `owned` protects all other tasks from them."""
    if not isinstance(loop.get_task_factory(), _Factory):
        loop.set_task_factory(_Factory(loop, owned=owned))


class _Program:
    """The receiver's own program that this process runs, if any."""

    loop: asyncio.AbstractEventLoop | None = None
    thread: int | None = None


_FORBIDDEN_METHODS: Final = (
    "set_task_factory",
    "set_default_executor",
    "shutdown_default_executor",
    "shutdown_asyncgens",
)
"""Methods of the loop that no handler may call: they would change it for all other code."""


def is_program(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether this process runs the receiver's own program on this loop."""
    return loop is _Program.loop


def run(main: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop) -> T:
    """Run the receiver's own program to its end on its own loop, whatever handlers do to it."""
    contain(loop, owned=True)
    for name in _FORBIDDEN_METHODS:  # they would decide how the receiver's own tasks run
        setattr(loop, name, partial(_keep, name))
    asyncio.set_event_loop(loop)
    _Program.loop, _Program.thread = loop, threading.get_ident()
    task = loop.create_task(main)
    task.add_done_callback(lambda _: loop.stop())
    try:
        while not task.done():
            _turn(loop, task)
        return task.result()
    finally:
        _end(loop)


def _keep(name: str, *_: object, **__: object) -> NoReturn:
    raise RuntimeError(f"this loop is the receiver's, and others' too: it takes no {name}()")


def _turn(loop: asyncio.AbstractEventLoop, main: asyncio.Task[Any]) -> None:
    try:
        loop.run_forever()
        cause = "loop.stop()"
    except _ENDS_A_LOOP as error:
        if main.done():
            return  # the program's own end: the task's result raises it
        cause = contained(error).args[0]
    if not main.done():  # charge now: a handler that has just returned is judged next
        _interrupted(cause)


def _interrupted(cause: str) -> None:
    log.warning("loop.interrupted", cause=cause)
    for charge in _running:
        charge.take(RuntimeError(f"{cause} in a callback, while this handler ran"))


def _end(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    try:
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(type(loop).shutdown_asyncgens(loop))
    except (*_ENDS_A_LOOP, RuntimeError) as error:
        log.warning("loop.interrupted", cause=described(error))
    finally:
        asyncio.set_event_loop(None)
        _Program.loop = None
        loop.close()


# --- processes that handlers fork ---


def _begin_as_child() -> None:
    """Drop the parent's state in a child that a handler forks; a server's own child may need it.

    Signals to the child have their default effect and do not reach the parent's loop. A callback
    that forks returns to the loop in both processes: there the child exits.
    """
    if _Program.loop is None and _charge.get() is None:
        return
    forks.drop_watched()
    with contextlib.suppress(ValueError):  # not the main thread
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
    if _Program.loop is not None and _Program.thread == threading.get_ident():
        with contextlib.suppress(RuntimeError):  # it is closed
            _Program.loop.call_soon(os._exit, 0)


os.register_at_fork(after_in_child=_begin_as_child)


def take_back(parent: int) -> None:
    """Restore the process after a handler's code has run.

    A forked child exits here: deliveries and connections belong to its parent. A closed standard
    stream is opened again, as a connection with its number would be sent what is printed.
    """
    if os.getpid() != parent:
        os._exit(0)
    for stream in range(3):
        try:
            os.get_inheritable(stream)  # the cheapest check: it runs at every step
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
