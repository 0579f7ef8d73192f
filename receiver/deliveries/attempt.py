"""Run one delivery: call the handler, bounded in time, and say how the attempt ended."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import shutil
import tempfile
import threading
import traceback
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, overload

import httpx
import msgspec
import structlog

from receiver.deliveries.containment import Charge, charged, contain, contained, said, take_back
from receiver.deliveries.fetch import MAX_BYTES, TIMEOUT, Fetched, fetch_soon
from receiver.deliveries.handlers import Dead, Handler, Retry, Skip
from receiver.model.retry import Failure, FailureKind
from receiver.model.sealing import Seals, hidden, texts_in
from receiver.model.values import Mode, Output, Prediction, Stored
from receiver.providers.adapter import Guarding
from receiver.store.deliveries import Claim
from receiver.store.predictions import Annotation

T = TypeVar("T")

_LONGEST_REASON: Final = 500
_LONGEST_NOTE: Final = 4000
_LARGEST_ADDITION: Final = 256 * 1024
"""Bytes of metadata, as of those that a prediction is submitted with."""
_LARGEST_STEP: Final = 1024 * 1024
DEEPEST_CHAIN: Final = 10
_GRACE: Final = 1.0
"""Seconds a handler has to end after it was cancelled."""


if (
    TYPE_CHECKING
):  # what a method gives: to be awaited in an async handler, and itself in a plain one

    class _Fetched(Fetched, frozen=True, kw_only=True):
        def __await__(self) -> Generator[Any, None, Fetched]: ...

    class _Submitted(Prediction, frozen=True, kw_only=True):
        def __await__(self) -> Generator[Any, None, Prediction]: ...

    class _Text(str):
        __slots__ = ()

        def __await__(self) -> Generator[Any, None, str]: ...

    class _Whole(int):
        def __await__(self) -> Generator[Any, None, int]: ...

    class _Number(float):
        def __await__(self) -> Generator[Any, None, float]: ...

    class _List(list[T]):
        def __await__(self) -> Generator[Any, None, list[T]]: ...

    class _Object(dict[str, T]):
        def __await__(self) -> Generator[Any, None, dict[str, T]]: ...


class Memory(Protocol):
    """Where the results of sub-steps, and what handlers find, are kept: the store, or a test."""

    async def recall(self, delivery_id: str, key: str) -> str | None: ...
    async def remember(self, delivery_id: str, key: str, result: str) -> None: ...
    async def annotate(self, annotation: Annotation) -> None: ...


class Submit(Protocol):
    """How a handler submits the next prediction (outbound's, bound to its event)."""

    async def __call__(
        self,
        provider: str,
        model: str,
        input: dict[str, Any],
        *,
        metadata: dict[str, Any],
        mode: Mode,
        parent_id: str,
        idempotency_key: str,
    ) -> Prediction: ...


class Tools(msgspec.Struct, frozen=True):
    """What every attempt of every handler may use."""

    memory: Memory
    submit: Submit
    http: httpx.AsyncClient
    results: httpx.AsyncClient
    """The guarded client, for `ctx.fetch`."""
    seals: Seals
    guarding: Mapping[str, Guarding] = {}
    """The providers, by name, that give some of their results only to who has our key."""
    deepest: int = DEEPEST_CHAIN
    """Predictions that may lead to one that a handler submits."""


class _Shared(httpx.AsyncBaseTransport):
    """Sends by a client that others use too, and that stays open."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self._client.send(request, stream=True, follow_redirects=False)
        self._client.cookies.clear()  # they belong to the attempt that asked
        return answer


def lent(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """Make a client over another's connections that can be changed and closed at will."""
    return httpx.AsyncClient(
        transport=_Shared(client),
        headers=client.headers,
        timeout=client.timeout,
        base_url=client.base_url,
        follow_redirects=client.follow_redirects,
    )


class Context:
    """What a handler gets beside the event; made anew for every attempt.

    In a handler that is a plain function (run in a thread), `fetch`, `once`, `submit`,
    `record_stored` and `annotate` are called as they are and block; in an async one they are
    awaited.
    """

    def __init__(self, claim: Claim, tools: Tools) -> None:
        self.attempt = claim.attempt
        """1 for the first."""
        self.idempotency_key = claim.id if not claim.round else f"{claim.id}.{claim.round}"
        """The same over all retries; another after a replay, which means to do it again."""
        self.log = structlog.get_logger("handler").bind(
            handler=claim.handler,
            delivery=claim.id,
            event_id=claim.event.id,
            prediction=claim.event.prediction.id,
        )
        self.private = tools.seals.unseal(claim.private)
        """What was kept for handlers alone (`private=`); empty once all of them have ended."""
        self.sign = tools.seals.sign
        """Sign a text for a purpose, as `Door.sign` does."""
        self.open = tools.seals.open
        """Return what was signed; raise Unproved."""
        self.http = lent(tools.http)
        """An httpx.AsyncClient, unguarded: for addresses that you chose yourself.

        Its headers, cookies and settings are this attempt's own; its connections are shared, and
        stay open when it is closed.
        """
        self.guarded = lent(tools.results)
        """The same for addresses that others chose: it connects to public ones only."""
        self.guarded.follow_redirects = False
        self.noted = ""
        self._noted_metadata: dict[str, Any] = {}
        self._claim = claim
        self._tools = tools
        self._loop = asyncio.get_running_loop()
        self._folder: Path | None = None
        self._submits = 0

    def fetch(
        self, output: Output | str, *, max_bytes: int = MAX_BYTES, seconds: float = TIMEOUT
    ) -> _Fetched:
        """Download an output, guarded; gives a Fetched whose file lives as long as the attempt."""
        guarding = self._tools.guarding.get(self._claim.event.prediction.provider)
        url = output if isinstance(output, str) else output.url
        fetched: _Fetched = self._call(
            lambda: fetch_soon(
                self._tools.results,
                output,
                self._own_folder(),
                max_bytes=max_bytes,
                seconds=seconds,
                authorization=guarding.authorization(url) if guarding and url else None,
            )
        )
        return fetched

    @overload
    def once(self, key: str, step: Callable[[], Awaitable[T]]) -> Awaitable[T]: ...
    @overload
    def once(self, key: str, step: Callable[[], None]) -> Awaitable[None]: ...
    @overload
    def once(self, key: str, step: Callable[[], str]) -> _Text: ...
    @overload
    def once(self, key: str, step: Callable[[], int]) -> _Whole: ...
    @overload
    def once(self, key: str, step: Callable[[], float]) -> _Number: ...
    @overload
    def once(self, key: str, step: Callable[[], list[T]]) -> _List[T]: ...
    @overload
    def once(self, key: str, step: Callable[[], dict[str, T]]) -> _Object[T]: ...
    @overload
    def once(self, key: str, step: Callable[[], Any]) -> Any: ...
    def once(self, key: str, step: Callable[[], Any]) -> Any:
        """Run a sub-step and remember its JSON result, so that a retry does not run it again.

        A result that is no JSON, or more than 1 MiB of it, is remembered, and given, as None.
        A crash after the step and before its result is stored repeats it: give the step
        `idempotency_key` where the other side can tell a repeat.
        """
        return self._call(lambda: self._once(key, step))

    def submit(
        self,
        provider: str,
        model: str,
        input: dict[str, Any],
        *,
        metadata: dict[str, Any] | None = None,
        mode: Mode = "queue",
    ) -> _Submitted:
        """Submit the next prediction; gives it as soon as the provider took it or it waits.

        The n-th submit of a delivery is the same over retries: it is never submitted twice.
        Raises Dead where too many predictions have led to this one: a circle of handlers would cost
        money for ever.
        """
        self._submits += 1
        parent = self._claim.event.prediction
        if parent.depth >= self._tools.deepest:
            raise Dead(f"{parent.depth} predictions have led to this one: no more are submitted")
        submit = partial(
            self._tools.submit,
            provider,
            model,
            input,
            metadata=dict(parent.metadata) if metadata is None else metadata,
            mode=mode,
            parent_id=parent.id,
            idempotency_key=f"{self.idempotency_key}/{self._submits}",
        )
        submitted: _Submitted = self._call(submit)
        return submitted

    def record_stored(self, place: int, stored: Stored) -> Any:
        """Say where the output at this place (from 0) is kept: later handlers and the API see it.

        It is on the prediction once this returns, as `output[place].stored`.
        """
        _bounded("what record_stored is given", msgspec.json.encode(stored))
        addition = Annotation(prediction_id=self._prediction, stored={place: stored})
        return self._call(lambda: self._tools.memory.annotate(addition))

    def annotate(self, **metadata: Any) -> Any:
        """Add JSON values to the prediction's metadata, in place of what has their names.

        Raises ValueError where all of one prediction's would be more than 256 KiB.
        """
        self._noted_metadata |= msgspec.json.decode(msgspec.json.encode(metadata))
        all_of_it = {**self._claim.event.prediction.metadata, **self._noted_metadata}
        _bounded("the metadata", msgspec.json.encode(all_of_it))
        given = {name: self._noted_metadata[name] for name in metadata}
        addition = Annotation(prediction_id=self._prediction, metadata=given)
        return self._call(lambda: self._tools.memory.annotate(addition))

    def note(self, text: str) -> None:
        """Keep a text (its last 4,000 characters) with this attempt, in place of an earlier one."""
        self.noted = _clean(text)[-_LONGEST_NOTE:]

    @property
    def _prediction(self) -> str:
        return self._claim.event.prediction.id

    def _call(self, make: Callable[[], Awaitable[Any]]) -> Any:
        """Return something to await on the loop, and the result itself in a thread."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run_coroutine_threadsafe(_await(make), self._loop).result()
        return make()

    async def _once(self, key: str, step: Callable[[], Any]) -> Any:
        known = await self._tools.memory.recall(self._claim.id, key)
        if known is not None:
            return msgspec.json.decode(known)
        result = await _either(step)
        try:
            text = _bounded("the result", msgspec.json.encode(result), _LARGEST_STEP).decode()
        except (TypeError, ValueError, RecursionError):
            # Failing now would run the step again, which is what must not be.
            self.log.warning("step.unkept", step=key, kind=type(result).__name__)
            text = "null"
        await self._tools.memory.remember(self._claim.id, key, text)
        return msgspec.json.decode(text)

    def _own_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="receiver-"))
        return self._folder

    def clean(self) -> None:
        """Remove what was fetched."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


async def _await(make: Callable[[], Awaitable[T]]) -> T:
    return await make()


async def _either(step: Callable[[], Any]) -> Any:
    """Run a step that may be plain or async; a plain one in a thread, as it may block."""
    if inspect.iscoroutinefunction(step):
        return await step()
    value = await in_thread(step)
    return await value if inspect.isawaitable(value) else value


async def in_thread(
    function: Callable[..., T], *args: Any, ended: asyncio.Event | None = None
) -> T:
    """Run a function in a thread of its own, which nobody waits for when the process ends.

    A pool would join its threads at exit, and one hanging handler would hold up every stop.
    `ended` is set when the function has really returned, even if the wait for it was cancelled.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()
    process = os.getpid()

    def run() -> None:
        try:
            result = context.run(function, *args)
        except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the caller
            take_back(process)
            tell(future.set_exception, contained(error))
        else:
            take_back(process)
            tell(future.set_result, result)

    def tell(settle: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(finish, settle, value)

    def finish(settle: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            settle(value)
        if ended is not None:
            ended.set()

    threading.Thread(target=run, name="receiver-handler", daemon=True).start()
    return await future


_ENDINGS: Final[tuple[tuple[type[BaseException], FailureKind], ...]] = (
    (Dead, "dead"),
    (Retry, "retry"),
    (BaseException, "error"),
    (Skip, "skip"),
)
"""Of several errors that were raised together the first of these decides."""


def _kind_of(error: BaseException) -> FailureKind:
    if isinstance(error, Skip) and not isinstance(error, Dead | Retry):
        return "skip"
    return next(kind for base, kind in _ENDINGS if isinstance(error, base))


_ORDER: Final = [kind for _, kind in _ENDINGS]


def _decisive(error: BaseException) -> BaseException:
    """Return the one error of a group (as a TaskGroup raises) that decides about the delivery."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    found = sorted(_leaves(error), key=lambda leaf: _ORDER.index(_kind_of(leaf)))
    if _kind_of(found[0]) == "error":
        return error  # all that went wrong is worth telling
    if isinstance(found[0], Retry):
        return max((e for e in found if isinstance(e, Retry)), key=lambda e: e.after or 0.0)
    return found[0]


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for one in error.exceptions for leaf in _leaves(one)]


_UNRUN: Final = (CoroutineType, GeneratorType, AsyncGeneratorType, map, filter)


def _check_ran(result: Any) -> None:
    """Raise TypeError where a handler returned work that nobody does."""
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

    `ended` is set when the handler has really returned: that may be after `run`, as a thread
    cannot be stopped and a coroutine may refuse to be.
    """

    def __init__(
        self, handler: Handler, claim: Claim, tools: Tools, timeout: float | None = None
    ) -> None:
        self._handler = handler
        self._claim = claim
        self._tools = tools
        self._timeout = min(handler.timeout, timeout or handler.timeout)
        self.is_bounded = self._timeout < handler.timeout
        """Whether a time-out would be that of the drain, and not the handler's own."""
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
        call = self._in_thread if not self._handler.is_async else self._on_loop
        with charged(self._charge, on_loop=self._handler.is_async) as inside:
            task = asyncio.create_task(call(context), context=inside)
            try:
                done, _ = await asyncio.wait({task}, timeout=self._timeout)
                if not done:
                    task.cancel()
                    await asyncio.wait({task}, timeout=_GRACE)
                    return Failure(kind="timeout", reason=f"longer than {self._timeout:.3g} s")
                return self._judge(task)
            except asyncio.CancelledError:
                task.cancel()
                raise
            finally:
                self.note = context.noted
                context.clean()

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

    def _judge(self, task: asyncio.Task[None]) -> Failure | None:
        error: BaseException | None
        if task.cancelled():
            error = self._charge.error or RuntimeError("the handler cancelled itself")
        else:
            error = task.exception() or self._charge.error
        if error is None:
            return None
        error = _decisive(error)
        kind = _kind_of(error)
        reason = _say(error, self._private)
        if kind == "error":
            reason = f"{type(error).__name__}: {reason}"
            self.error = self._tellable(error, reason)
        return Failure(kind=kind, reason=reason, after=getattr(error, "after", None))

    def _tellable(self, error: BaseException, reason: str) -> BaseException:
        """Return an error for logs and traces; one that quotes private content is told anew."""
        told = tellable(error)
        if self._private:
            text = "".join(traceback.format_exception(told))
            if hidden(text, self._private) != text:
                return RuntimeError(reason).with_traceback(error.__traceback__)
        return told


def tellable(error: BaseException) -> BaseException:
    """Return an error that logs and traces can print: a handler's own may raise from its words."""
    try:
        traceback.format_exception(error)
        repr(error)
        str(error)
    except BaseException:  # noqa: BLE001 - SystemExit among them
        return RuntimeError(type(error).__name__)
    return error


def _say(error: BaseException, private: Sequence[str]) -> str:
    words = hidden(_clean(said(error)), private)
    return (words or type(error).__name__)[:_LONGEST_REASON]


def _bounded(what: str, encoded: bytes, most: int = _LARGEST_ADDITION) -> bytes:
    if len(encoded) > most:
        raise ValueError(f"{what} has {len(encoded):,} bytes, more than {most:,}")
    return encoded


def _clean(text: str) -> str:
    """Spell out what no database takes: NUL, and halves of characters, as in odd file names."""
    return text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()
