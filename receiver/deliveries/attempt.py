"""An attempt: call the handler of one delivery within its time-out, and report the result."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from types import (
    AsyncGeneratorType,
    CoroutineType,
    FunctionType,
    GeneratorType,
    MethodType,
)
from typing import Any, Final

from receiver.deliveries.containment import Charge, charged, contain, described
from receiver.deliveries.context import Context, Tools, clean, in_thread
from receiver.deliveries.handlers import Dead, Handler, Retry, Skip
from receiver.model.errors import Unreadable
from receiver.model.retry import Failure, FailureKind
from receiver.model.sealing import hidden, texts_in
from receiver.store.deliveries import Claim

_LONGEST_REASON: Final = 500
_GRACE: Final = 1.0
"""Seconds a handler has to end after it was cancelled."""


_KINDS: Final[Mapping[type[Exception], FailureKind]] = {Dead: "dead", Retry: "retry", Skip: "skip"}
_PRECEDENCE: Final = ("dead", "retry", "error", "skip")
"""Which of several errors that are raised together decides."""


def _kind_of(error: BaseException) -> FailureKind:
    return next((kind for base, kind in _KINDS.items() if isinstance(error, base)), "error")


def _decisive(error: BaseException) -> BaseException:
    """Return the error of a group (as a TaskGroup raises) that decides the delivery's state."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    found = sorted(_leaves(error), key=lambda leaf: _PRECEDENCE.index(_kind_of(leaf)))
    if _kind_of(found[0]) == "error":
        return error  # the whole group is reported
    if isinstance(found[0], Retry):
        return max((e for e in found if isinstance(e, Retry)), key=lambda e: _after(e) or 0.0)
    return found[0]


def _after(error: BaseException) -> float | None:
    """Return the seconds that an error of ours asks to wait; other errors' `after` is their own."""
    after = getattr(error, "after", None) if isinstance(error, Retry | Unreadable) else None
    return after if isinstance(after, int | float) else None


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for one in error.exceptions for leaf in _leaves(one)]


_UNRUN: Final = (
    *(CoroutineType, GeneratorType, AsyncGeneratorType, map, filter),
    *(FunctionType, MethodType, partial),
)
"""Types of results that would still have to be run."""


def _check_ran(result: Any) -> None:
    """Raise TypeError if a handler returned a coroutine or generator, which nothing runs."""
    if result is None:
        return
    several = isinstance(result, list | tuple | set | frozenset | dict)
    each = result.values() if isinstance(result, dict) else result if several else [result]
    unrun = [one for one in each if isinstance(one, _UNRUN)]
    for one in unrun:
        if isinstance(one, CoroutineType | GeneratorType):
            one.close()
    if unrun:
        raise TypeError(f"the handler returned a {type(unrun[0]).__name__}, which nothing runs")


class Attempt:
    """One run of one handler.

    `ended` is set when the handler has really returned. That may be after `run` returns: a thread
    cannot be stopped, and a coroutine may ignore its cancellation.
    """

    def __init__(
        self, handler: Handler, claim: Claim, tools: Tools, timeout: float | None = None
    ) -> None:
        self._handler = handler
        self._claim = claim
        self._tools = tools
        self._timeout = min(handler.timeout, timeout or handler.timeout)
        self.is_bounded = self._timeout < handler.timeout
        """Whether a time-out is due to the drain, the request or the store, not to the handler."""
        self.ended = asyncio.Event()
        self.error: BaseException | None = None
        self.note = ""
        self._charge = Charge()
        self._private: list[str] = []

    async def run(self) -> Failure | None:
        """Call the handler once; None means success. Raises only when cancelled itself."""
        contain(asyncio.get_running_loop())
        context = Context(self._claim, self._tools)
        self._private = texts_in(context.private)
        call = self._on_loop if self._handler.is_async else self._in_thread
        with charged(self._charge, on_loop=self._handler.is_async) as inside:
            task = asyncio.create_task(call(context), context=inside)
            try:
                done, _ = await asyncio.wait({task}, timeout=self._timeout)
                if not done:
                    self.is_bounded |= context.store_is_away
                    task.cancel()
                    await asyncio.wait({task}, timeout=_GRACE)
                    return Failure(kind="timeout", reason=f"longer than {self._timeout:.3g} s")
                return self._judge(task, context)
            except asyncio.CancelledError:
                task.cancel()
                raise
            finally:
                self.note = context.noted
                context.end()

    async def _on_loop(self, context: Context) -> None:
        try:
            result = await self._handler.function(*self._arguments(context))
            _check_ran(await result if inspect.isawaitable(result) else result)
        finally:
            self.ended.set()

    async def _in_thread(self, context: Context) -> None:
        result = await in_thread(
            self._handler.function, *self._arguments(context), ended=self.ended
        )
        if inspect.isawaitable(result):  # a plain function that made a coroutine
            self.ended.clear()
            try:
                result = await result
            finally:
                self.ended.set()
        _check_ran(result)

    def _arguments(self, context: Context) -> tuple[Any, ...]:
        event = self._claim.event
        return (event, context) if self._handler.takes_context else (event,)

    def _judge(self, task: asyncio.Task[None], context: Context) -> Failure | None:
        error: BaseException | None
        if task.cancelled():
            error = self._charge.error or RuntimeError("the handler cancelled itself")
        else:
            error = task.exception() or self._charge.error
        # Coroutines that the handler made tasks of have started by now.
        if error is None and (left := context.unawaited()):
            error = TypeError(f"the handler did not await ctx.{', ctx.'.join(sorted(left))}")
        if error is None:
            return None
        error = _decisive(error)
        kind = _kind_of(error)
        reason = _reason(error, self._private)
        if kind == "error":
            reason = f"{type(error).__name__}: {reason}"
            self.error = self._without_private(error, reason)
        return Failure(kind=kind, reason=reason, after=_after(error))

    def _without_private(self, error: BaseException, reason: str) -> BaseException:
        """Return the error for logs and traces; replace one that quotes private content."""
        safe = plain_error(error)
        if self._private:
            text = "".join(traceback.format_exception(safe))
            if hidden(text, self._private) != text:
                return RuntimeError(reason).with_traceback(error.__traceback__)
        return safe


def plain_error(error: BaseException) -> BaseException:
    """Return an error that logs and traces can print: `str` of a handler's own may raise."""
    try:
        traceback.format_exception(error)
        repr(error)
        str(error)
    except BaseException:  # noqa: BLE001 - SystemExit among them
        return RuntimeError(type(error).__name__)
    return error


def _reason(error: BaseException, private: Sequence[str]) -> str:
    words = hidden(clean(described(error)), private)
    return (words or type(error).__name__)[:_LONGEST_REASON]
