"""The context of a handler: its methods fetch, submit, remember and note, async or blocking."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import inspect
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from functools import cached_property, partial
from inspect import CORO_CREATED
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeVar, overload

import httpx
import msgspec
import structlog

from receiver.deliveries.containment import contained, take_back
from receiver.deliveries.fetch import MAX_BYTES, TIMEOUT, Fetched, fetch, soon
from receiver.deliveries.handlers import Dead
from receiver.model.errors import StoreUnavailable
from receiver.model.requests import SubmitRequest
from receiver.model.sealing import Seals
from receiver.model.tasks import start_thread
from receiver.model.values import Mode, Output, Prediction, Stored
from receiver.providers.adapter import Guarding
from receiver.store.deliveries import Claim
from receiver.store.predictions import Annotation

T = TypeVar("T")

_LONGEST_NOTE: Final = 4000
_LARGEST_ADDITION: Final = 256 * 1024
"""Limit of metadata in bytes, the same as at submit."""
_LARGEST_STEP: Final = 1024 * 1024
_LONGEST_KEY: Final = 1000
"""Bytes of a step's key; a longer one is replaced by its digest, as an index has to hold it."""
_STEP: Final = contextvars.ContextVar("step", default="")
"""The part of a submit's key for the step of `once` in which it runs; empty outside."""
_ASK_AGAIN: Final = 0.5
"""Seconds between two tries while the store is unavailable."""
DEEPEST_CHAIN: Final = 10


if TYPE_CHECKING:  # results of methods: awaited in an async handler, plain in a plain one

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
    """Where results of sub-steps and annotations are kept: in the store, or in a test."""

    async def recall(self, delivery_id: str, key: str) -> str | None: ...
    async def remember(self, delivery_id: str, key: str, result: str) -> str: ...
    async def annotate(self, annotation: Annotation) -> None: ...


Submit: TypeAlias = Callable[[SubmitRequest], Awaitable[Prediction]]
"""How a handler submits the next prediction."""


class Tools(msgspec.Struct, frozen=True):
    """The connections and functions that all attempts share."""

    memory: Memory
    submit: Submit
    http: httpx.AsyncClient
    results: httpx.AsyncClient
    """The guarded client, for `ctx.fetch`."""
    seals: Seals
    guarding: Mapping[str, Guarding] = {}
    """The providers, by name, that require our key for some of their results."""
    deepest: int = DEEPEST_CHAIN
    """Most predictions in a row that may precede one that a handler submits."""


class _Shared(httpx.AsyncBaseTransport):
    """A transport that sends through a shared client, which stays open."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        answer = await self._client.send(request, stream=True, follow_redirects=False)
        self._client.cookies.clear()  # they belong to the attempt that sent the request
        return answer


def client_over(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """Return a client over another's connections that may be changed and closed freely.

    It follows no redirects unless it is told to.
    """
    return httpx.AsyncClient(
        transport=_Shared(client),
        headers=client.headers,
        timeout=client.timeout,
        base_url=client.base_url,
    )


class Context:
    """The second argument of a handler, after the event; a new one for every attempt.

    In a handler that is a plain function (run in a thread), `fetch`, `once`, `submit`,
    `record_stored` and `annotate` are called as they are and block; in an async one they are
    awaited.
    """

    def __init__(self, claim: Claim, tools: Tools) -> None:
        self.attempt = claim.attempt
        """1 for the first."""
        self.idempotency_key = claim.id if not claim.round else f"{claim.id}.{claim.round}"
        """The same for all retries; a new one after a replay, which intends to do it again."""
        self.private = tools.seals.unseal(claim.private)
        """Values kept for handlers alone (`private=`); empty once all deliveries have ended."""
        self.sign = tools.seals.sign
        """Sign a text for a purpose, as `Door.sign` does."""
        self.open = tools.seals.open
        """Return the signed text; raise Unproved."""
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
        """The coroutines that methods returned, with the names of the methods."""
        self._submits: Counter[str] = Counter()
        """The number of submits by step."""

    # Created on first use: two clients cost more than everything else in an attempt.

    @cached_property
    def log(self) -> Any:
        """A structlog logger with the handler's name and the ids as fields."""
        return structlog.get_logger("handler").bind(
            handler=self._claim.handler,
            delivery=self._claim.id,
            event_id=self._claim.event.id,
            prediction=self._prediction,
        )

    @cached_property
    def http(self) -> httpx.AsyncClient:
        """An httpx.AsyncClient, unguarded: for addresses that you chose yourself.

        Its headers, cookies and settings belong to this attempt; its connections are shared, and
        stay open when it is closed.
        """
        return client_over(self._tools.http)

    @cached_property
    def guarded(self) -> httpx.AsyncClient:
        """The same for untrusted addresses: it connects to public addresses only."""
        return client_over(self._tools.results)

    def fetch(
        self, output: Output | str, *, max_bytes: int = MAX_BYTES, seconds: float = TIMEOUT
    ) -> _Fetched:
        """Download an output, guarded; return a Fetched, whose file the attempt's end deletes."""
        guarding = self._tools.guarding.get(self._claim.event.prediction.provider)
        url = output if isinstance(output, str) else output.url
        fetched: _Fetched = self._call(
            "fetch",
            lambda: soon(
                partial(
                    fetch,
                    self._tools.results,
                    output,
                    self._own_folder(),
                    max_bytes=max_bytes,
                    seconds=seconds,
                    authorization=guarding.authorization(url) if guarding and url else None,
                )
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

        A result that is not JSON, or larger than 1 MiB, is remembered and returned as None.
        A crash between the end of the step and the storing of its result repeats the step: send
        `idempotency_key` along if the other service can detect repeats.
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
        """Submit the next prediction; return it when the provider has accepted it or it is queued.

        The n-th submit of a delivery is the same in all retries: it is never submitted twice. In a
        step of `once` it is the n-th of that step.
        Raises Dead if too many predictions precede this one: handlers in a circle would cost money
        forever.
        """
        step = _STEP.get()
        self._submits[step] += 1
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
            key=f"{self.idempotency_key}/{step}{self._submits[step]}",
        )
        submitted: _Submitted = self._call(
            "submit", lambda: self._retry_until_stored(self._tools.submit, request)
        )
        return submitted

    def record_stored(self, place: int, stored: Stored) -> Any:
        """Record where the output at this place (from 0) is kept, for later handlers and the API.

        It is stored in the prediction when this returns, as `output[place].stored`. Raises
        IndexError if there is no such output.
        """
        outputs = self._claim.event.prediction.output or []
        if not 0 <= place < len(outputs):
            raise IndexError(f"there is no output {place}, from 0: there are {len(outputs)}")
        _bounded("what record_stored is given", msgspec.json.encode(stored))
        addition = Annotation(prediction_id=self._prediction, stored={place: stored})
        return self._call(
            "record_stored", lambda: self._retry_until_stored(self._tools.memory.annotate, addition)
        )

    def annotate(self, /, **metadata: Any) -> Any:
        """Add JSON values to the prediction's metadata; they replace values of the same names.

        Raises ValueError if the prediction's whole metadata would exceed 256 KiB.
        """
        self._noted_metadata |= msgspec.json.decode(msgspec.json.encode(metadata))
        all_of_it = {**self._claim.event.prediction.metadata, **self._noted_metadata}
        _bounded("the metadata", msgspec.json.encode(all_of_it))
        given = {name: self._noted_metadata[name] for name in metadata}
        addition = Annotation(prediction_id=self._prediction, metadata=given)
        return self._call(
            "annotate", lambda: self._retry_until_stored(self._tools.memory.annotate, addition)
        )

    def note(self, text: str) -> None:
        """Keep a text (its last 4,000 characters) with this attempt; it replaces an earlier one."""
        self.noted = clean(text)[-_LONGEST_NOTE:]

    @property
    def _prediction(self) -> str:
        return self._claim.event.prediction.id

    def unawaited(self) -> set[str]:
        """Return the names of methods whose results were not awaited, so that nothing ran."""
        left = [made for made in self._made if inspect.getcoroutinestate(made) == CORO_CREATED]
        for made in left:
            made.close()
        return {self._made[made] for made in left}

    def _call(self, name: str, make: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return a coroutine on an event loop; in a thread, wait for the result and return it."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run_coroutine_threadsafe(_await(make), self._loop).result()
        made = make() if loop is self._loop else _await_on(self._loop, make)
        self._made[made] = name
        return made

    async def _once(self, key: str, step: Callable[[], Any]) -> Any:
        key = _bounded_key(key)
        known = await self._retry_until_stored(self._tools.memory.recall, self._claim.id, key)
        if known is not None:
            return msgspec.json.decode(known)
        result = await self._run_step(key, step)
        try:
            text = _bounded("the result", msgspec.json.encode(result), _LARGEST_STEP).decode()
        except (TypeError, ValueError, RecursionError):
            # An error here would run the step again in the next attempt, which must not happen.
            self.log.warning("step.unkept", step=key, kind=type(result).__name__)
            text = "null"
        kept = await self._retry_until_stored(
            self._tools.memory.remember, self._claim.id, key, text
        )
        return msgspec.json.decode(kept)

    async def _run_step(self, key: str, step: Callable[[], Any]) -> Any:
        """Run a step, whose submits are numbered from 1, as a retry may not run it again."""
        name = f"once:{key}/"
        self._submits[name] = 0
        token = _STEP.set(name)
        try:
            return await _either(step)
        finally:
            _STEP.reset(token)

    async def _retry_until_stored(self, ask: Callable[..., Awaitable[T]], *given: Any) -> T:
        """Retry while the store is unavailable, which is not the handler's failure.

        After the end of the attempt, a thread that still runs gets the error: nothing else would
        end its wait.
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
        if self._is_over:
            raise RuntimeError("the attempt is over, and nothing would delete what is fetched now")
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="receiver-"))
        return self._folder

    def end(self) -> None:
        """Delete fetched files and stop waiting for the store: the attempt is over."""
        self._is_over = True
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


async def _await(make: Callable[[], Awaitable[T]]) -> T:
    return await make()


async def _await_on(
    loop: asyncio.AbstractEventLoop, make: Callable[[], Coroutine[Any, Any, T]]
) -> T:
    """Run on the receiver's loop what is called on another, which `asyncio.run` may soon close."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_await(make), loop))


async def _either(step: Callable[[], Any]) -> Any:
    """Run a plain or async step; a plain one runs in a thread, as it may block."""
    if inspect.iscoroutinefunction(step):
        return await step()
    value = await in_thread(step)
    return await value if inspect.isawaitable(value) else value


async def in_thread(
    function: Callable[..., T], *args: Any, ended: asyncio.Event | None = None
) -> T:
    """Run a function in its own thread, which the end of the process does not wait for.

    A pool would join its threads at exit, and one hanging handler would block every stop.
    `ended` is set when the function has really returned, even if the wait for it was cancelled.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    context = contextvars.copy_context()
    process = os.getpid()

    def run() -> None:
        try:
            result = context.run(function, *args)
        except BaseException as error:  # noqa: BLE001 - any error goes to the caller
            take_back(process)
            pass_on(future.set_exception, contained(error))
        else:
            take_back(process)
            pass_on(future.set_result, result)

    def pass_on(settle: Callable[[Any], None], value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: no task waits any more
            loop.call_soon_threadsafe(finish, settle, value)

    def finish(settle: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            settle(value)
        if ended is not None:
            ended.set()

    start_thread("receiver-handler", run)
    return await future


def _bounded(what: str, encoded: bytes, most: int = _LARGEST_ADDITION) -> bytes:
    if len(encoded) > most:
        raise ValueError(f"{what} has {len(encoded):,} bytes, more than {most:,}")
    return encoded


def _bounded_key(key: str) -> str:
    encoded = key.encode()
    return key if len(encoded) <= _LONGEST_KEY else f"sha256:{hashlib.sha256(encoded).hexdigest()}"


def clean(text: str) -> str:
    """Escape characters that no database stores: NUL, and lone surrogates, as in file names."""
    return text.replace("\0", "\\x00").encode(errors="backslashreplace").decode()
