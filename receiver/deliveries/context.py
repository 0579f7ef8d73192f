"""The context of a handler: what it may fetch, submit, remember and note, awaited or blocking."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import os
import shutil
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from functools import cached_property
from inspect import CORO_CREATED
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar, overload

import httpx
import msgspec
import structlog

from receiver.deliveries.containment import contained, take_back
from receiver.deliveries.fetch import MAX_BYTES, TIMEOUT, Fetched, fetch_soon
from receiver.deliveries.handlers import Dead
from receiver.model.errors import StoreUnavailable
from receiver.model.requests import SubmitRequest
from receiver.model.sealing import Seals
from receiver.model.values import Mode, Output, Prediction, Stored
from receiver.providers.adapter import Guarding
from receiver.store.deliveries import Claim
from receiver.store.predictions import Annotation

T = TypeVar("T")

_LONGEST_NOTE: Final = 4000
_LARGEST_ADDITION: Final = 256 * 1024
"""Bytes of metadata, as of those that a prediction is submitted with."""
_LARGEST_STEP: Final = 1024 * 1024
_ASK_AGAIN: Final = 0.5
"""Seconds between two tries while the store is away."""
DEEPEST_CHAIN: Final = 10


if TYPE_CHECKING:  # what a method gives: awaited in an async handler, itself in a plain one

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
    async def remember(self, delivery_id: str, key: str, result: str) -> str: ...
    async def annotate(self, annotation: Annotation) -> None: ...


Submit: TypeAlias = Callable[[SubmitRequest], Awaitable[Prediction]]
"""How a handler submits the next prediction."""


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
        self.private = tools.seals.unseal(claim.private)
        """What was kept for handlers alone (`private=`); empty once all of them have ended."""
        self.sign = tools.seals.sign
        """Sign a text for a purpose, as `Door.sign` does."""
        self.open = tools.seals.open
        """Return what was signed; raise Unproved."""
        self.noted = ""
        self.store_is_away = False
        """Whether the handler waits for the store."""
        self._is_over = False
        self._noted_metadata: dict[str, Any] = {}
        self._claim = claim
        self._tools = tools
        self._loop = asyncio.get_running_loop()
        self._folder: Path | None = None
        self._made: dict[Coroutine[Any, Any, Any], str] = {}
        """The coroutines that methods returned, with the names of these."""
        self._submits = 0

    # Made when they are asked for: two clients cost more than all else of an attempt.

    @cached_property
    def log(self) -> Any:
        """A structlog logger that knows the ids."""
        return structlog.get_logger("handler").bind(
            handler=self._claim.handler,
            delivery=self._claim.id,
            event_id=self._claim.event.id,
            prediction=self._prediction,
        )

    @cached_property
    def http(self) -> httpx.AsyncClient:
        """An httpx.AsyncClient, unguarded: for addresses that you chose yourself.

        Its headers, cookies and settings are this attempt's own; its connections are shared, and
        stay open when it is closed.
        """
        return lent(self._tools.http)

    @cached_property
    def guarded(self) -> httpx.AsyncClient:
        """The same for addresses that others chose: it connects to public ones only."""
        made = lent(self._tools.results)
        made.follow_redirects = False
        return made

    def fetch(
        self, output: Output | str, *, max_bytes: int = MAX_BYTES, seconds: float = TIMEOUT
    ) -> _Fetched:
        """Download an output, guarded; gives a Fetched whose file lives as long as the attempt."""
        guarding = self._tools.guarding.get(self._claim.event.prediction.provider)
        url = output if isinstance(output, str) else output.url
        fetched: _Fetched = self._call(
            "fetch",
            lambda: fetch_soon(
                self._tools.results,
                output,
                self._own_folder(),
                max_bytes=max_bytes,
                seconds=seconds,
                authorization=guarding.authorization(url) if guarding and url else None,
            ),
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
        return self._call("once", lambda: self._once(key, step))

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
        request = SubmitRequest(
            provider=provider,
            model=model,
            input=input,
            metadata=dict(parent.metadata) if metadata is None else metadata,
            mode=mode,
            parent_id=parent.id,
            key=f"{self.idempotency_key}/{self._submits}",
        )
        submitted: _Submitted = self._call(
            "submit", lambda: self._insist(self._tools.submit, request)
        )
        return submitted

    def record_stored(self, place: int, stored: Stored) -> Any:
        """Say where the output at this place (from 0) is kept: later handlers and the API see it.

        It is on the prediction once this returns, as `output[place].stored`. Raises IndexError
        where there is no such output.
        """
        outputs = self._claim.event.prediction.output or []
        if not 0 <= place < len(outputs):
            raise IndexError(f"there is no output {place}, from 0: there are {len(outputs)}")
        _bounded("what record_stored is given", msgspec.json.encode(stored))
        addition = Annotation(prediction_id=self._prediction, stored={place: stored})
        return self._call(
            "record_stored", lambda: self._insist(self._tools.memory.annotate, addition)
        )

    def annotate(self, /, **metadata: Any) -> Any:
        """Add JSON values to the prediction's metadata, in place of what has their names.

        Raises ValueError where all of one prediction's would be more than 256 KiB.
        """
        self._noted_metadata |= msgspec.json.decode(msgspec.json.encode(metadata))
        all_of_it = {**self._claim.event.prediction.metadata, **self._noted_metadata}
        _bounded("the metadata", msgspec.json.encode(all_of_it))
        given = {name: self._noted_metadata[name] for name in metadata}
        addition = Annotation(prediction_id=self._prediction, metadata=given)
        return self._call("annotate", lambda: self._insist(self._tools.memory.annotate, addition))

    def note(self, text: str) -> None:
        """Keep a text (its last 4,000 characters) with this attempt, in place of an earlier one."""
        self.noted = clean(text)[-_LONGEST_NOTE:]

    @property
    def _prediction(self) -> str:
        return self._claim.event.prediction.id

    def unawaited(self) -> set[str]:
        """Name the methods whose results the handler did not await: nothing of them has run."""
        left = [made for made in self._made if inspect.getcoroutinestate(made) == CORO_CREATED]
        for made in left:
            made.close()
        return {self._made[made] for made in left}

    def _call(self, name: str, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return something to await on the loop, and the result itself in a thread."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run_coroutine_threadsafe(_await(make), self._loop).result()
        made = make()
        self._made[made] = name
        return made

    async def _once(self, key: str, step: Callable[[], Any]) -> Any:
        known = await self._insist(self._tools.memory.recall, self._claim.id, key)
        if known is not None:
            return msgspec.json.decode(known)
        result = await _either(step)
        try:
            text = _bounded("the result", msgspec.json.encode(result), _LARGEST_STEP).decode()
        except (TypeError, ValueError, RecursionError):
            # Failing now would run the step again, which is what must not be.
            self.log.warning("step.unkept", step=key, kind=type(result).__name__)
            text = "null"
        kept = await self._insist(self._tools.memory.remember, self._claim.id, key, text)
        return msgspec.json.decode(kept)

    async def _insist(self, ask: Callable[..., Awaitable[T]], *given: Any) -> T:
        """Retry while the store is away, which is no failure of the handler's.

        Once the attempt is over, a thread that still runs gets the error: nothing else would end
        its wait.
        """
        while True:
            try:
                found = await ask(*given)
            except StoreUnavailable:
                if self._is_over:
                    raise
                self.store_is_away = True
                await asyncio.sleep(_ASK_AGAIN)
            else:
                self.store_is_away = False
                return found

    def _own_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="receiver-"))
        return self._folder

    def end(self) -> None:
        """Remove what was fetched, and end waits for the store: the attempt is over."""
        self._is_over = True
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
            pass_on(future.set_exception, contained(error))
        else:
            take_back(process)
            pass_on(future.set_result, result)

    def pass_on(settle: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            loop.call_soon_threadsafe(finish, settle, value)

    def finish(settle: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            settle(value)
        if ended is not None:
            ended.set()

    threading.Thread(target=run, name="receiver-handler", daemon=True).start()
    return await future


def _bounded(what: str, encoded: bytes, most: int = _LARGEST_ADDITION) -> bytes:
    if len(encoded) > most:
        raise ValueError(f"{what} has {len(encoded):,} bytes, more than {most:,}")
    return encoded


def clean(text: str) -> str:
    """Spell out what no database takes: NUL, and halves of characters, as in odd file names."""
    return text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()
