"""A receiver under test: the real app on a real database, with a scripted network."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import re
import sqlite3
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, overload
from urllib.parse import urlsplit

import httpx
import msgspec
from starlette.applications import Starlette

from receiver import create_app
from receiver.emulator import Rule, settings_for
from receiver.emulator.endings import Ending
from receiver.emulator.inprocess import BY_HAND, EmulatedProviders
from receiver.emulator.ledger import Prediction
from receiver.emulator.providers import CALLING
from receiver.emulator.wire import EventStream
from receiver.providers import DECLARED
from receiver.providers.adapter import Publishing
from receiver.settings import Settings
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.sqlite import lay_out

T = TypeVar("T")
Json = dict[str, Any]

STRANGER: Final = ("203.0.113.9", 50000)
API_KEY: Final = "api-key-of-the-first-caller"
OTHER_API_KEY: Final = "api-key-of-the-second-caller"
ENV: Final = {
    "RECEIVER_SECRET_KEY": "the-newest-secret-key-of-this-receiver",
    "RECEIVER_API_KEYS": f"{API_KEY},{OTHER_API_KEY}",
    "RECEIVER_PUBLIC_URL": "https://hooks.test",
    "RECEIVER_RETRY_BASE": "0.02",
    **{declared.key: f"the-{name}-key" for name, declared in DECLARED.items()},
    **settings_for("https://providers.test"),
}
SECRETS: Final = (
    *(ENV[declared.key] for declared in DECLARED.values()),
    *(ENV["RECEIVER_SECRET_KEY"], API_KEY, OTHER_API_KEY),
)
MODELS: Final = {name: declared.example for name, declared in DECLARED.items()}
PUSHING: Final = tuple(CALLING)
"""The providers that call back."""
PICTURE: Final = "https://cdn.test/a.png"
OPTIONS: Final = msgspec.structs.replace(
    BY_HAND,
    one_account=True,
    by_hand=Ending(output=({"url": PICTURE},)),
    fal_sources=("198.51.100.0/24", "2001:db8:1::/48"),
)
FAILURE: Final = Ending("timeout", "model timed out")


@overload
async def eventually(
    read: Callable[[], Coroutine[Any, Any, T]], condition: Callable[[T], Any] = bool
) -> T: ...
@overload
async def eventually(read: Callable[[], T], condition: Callable[[T], Any] = bool) -> T: ...
async def eventually(read: Callable[[], Any], condition: Callable[[Any], Any] = bool) -> Any:
    """Read until the condition holds, and return the value; fail after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        got = read()
        value = await got if inspect.isawaitable(got) else got
        if condition(value):
            return value
        assert time.monotonic() < deadline, value
        await asyncio.sleep(0.01)


class Clock:
    """A clock that is `ahead` seconds ahead of the wall clock."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


# --- the network ---

Answering = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]


def reply(
    body: object = None, status: int = 200, *, text: str | None = None, **headers: str
) -> Answering:
    """Return a function that answers with JSON, or with `text` unchanged."""
    content = json.dumps(body) if text is None else text
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: httpx.Response(status, content=content.encode(), headers=named)


def breaks(error: type[httpx.TransportError]) -> Answering:
    """Return a function that fails as a broken connection does."""

    def broken(request: httpx.Request) -> httpx.Response:
        raise error("broken on request", request=request)

    return broken


async def hangs(_: httpx.Request) -> httpx.Response:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


@dataclass(frozen=True)
class Sent:
    """One submit as the provider received it."""

    prediction: Prediction
    request: httpx.Request

    @property
    def provider(self) -> str:
        return self.prediction.provider

    @property
    def id(self) -> str:
        """The provider's id of the prediction."""
        return self.prediction.id

    @property
    def prompt(self) -> str:
        return self.prediction.prompt

    @property
    def hook(self) -> str:
        """The callback URL; empty if none was given."""
        return self.prediction.callback_url

    @property
    def secret(self) -> str:
        return self.prediction.secret

    @property
    def path(self) -> str:
        return urlsplit(self.hook).path

    @property
    def token(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def prediction_id(self) -> str:
        return self.token.partition(".")[0]


def named_in(request: httpx.Request) -> set[str]:
    """Return the possible prediction ids in the path and the query of a poll."""
    return {*request.url.path.split("/"), request.url.params.get("id", "")}


class Network(httpx.AsyncBaseTransport):
    """The transport to the emulator: it records calls, and answers by a script or the emulator."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, httpx.Request]] = []
        self.sent: list[Sent] = []
        self.emulator = EmulatedProviders(options=OPTIONS)
        self._scripts: dict[str, deque[Answering]] = defaultdict(deque)
        self._always: dict[str, Answering] = {}

    def script(self, kind: str, *answers: Answering) -> None:
        """Set the answers to the next calls of a kind, a name of the emulator's routes."""
        self._scripts[kind].extend(answers)

    def always(self, kind: str, answer: Answering) -> None:
        self._always[kind] = answer

    def count(self, kind: str) -> int:
        return sum(1 for called, _ in self.calls if called == kind)

    def of(self, prompt: str) -> Sent:
        return next(sent for sent in self.sent if sent.prompt == prompt)

    @property
    def streams(self) -> Sequence[EventStream]:
        """The open connections to Oxen's event stream."""
        return self.emulator.streams

    def end_and_broadcast(self, sent: Sent) -> None:
        """End a prediction, and send its event to Oxen's streams."""
        self.emulator.end(sent.prediction)
        self.emulator.broadcast(sent.prediction)

    def broadcast(self, **data: object) -> None:
        """Send every stream an event of a finished generation with the test's own data."""
        self.broadcast_raw("media_generation_completed", json.dumps(data))

    def broadcast_raw(self, event: str, data: str) -> None:
        for stream in self.streams:
            stream.send(f"event: {event}\ndata: {data}\n\n".encode())

    async def account_secret(self, provider: str) -> str:
        """Return the secret that a provider shows to its account now."""
        adapter = Settings.read(ENV).adapters()[provider]
        assert isinstance(adapter, Publishing)
        answer = await self.emulator.handle_async_request(adapter.keys())
        return adapter.read_keys(await answer.aread())[0].decode()

    def cut(self) -> None:
        self.emulator.faults.replace([Rule(fault="cut_stream")])

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        kind = self.emulator.kind(request)
        self.calls.append((kind, request))
        scripts = self._scripts[kind]
        answer = scripts.popleft() if scripts else self._always.get(kind, self.by_emulator)
        response = answer(request)
        return await response if inspect.isawaitable(response) else response

    async def by_emulator(self, request: httpx.Request) -> httpx.Response:
        """Answer as the emulator does, and record each accepted submit."""
        if not self.emulator.kind(request).endswith(".submit"):
            return await self.emulator.handle_async_request(request)
        before = len(self.emulator.predictions)
        response = await self.emulator.handle_async_request(request)
        taken = self.emulator.predictions[before:]
        self.sent.extend(Sent(prediction, request) for prediction in taken)
        return response

    async def ends(self, request: httpx.Request) -> httpx.Response:
        """End the polled prediction, then answer the poll."""
        for prediction in self.emulator.predictions:
            if prediction.id in named_in(request):
                self.emulator.end(prediction)
        return await self.by_emulator(request)


# --- callbacks ---


@dataclass
class CallbackRequest:
    """A callback to send: authentic, until a test changes it."""

    path: str
    headers: list[tuple[str | bytes, str | bytes]]
    body: bytes


def write(
    network: Network,
    sent: Sent,
    *,
    ok: bool = True,
    body: bytes | None = None,
    at: float | None = None,
) -> CallbackRequest:
    """Return the emulator's callback for a submit, or a proved one with the test's own body."""
    if body is None:
        body = network.emulator.callback(sent.prediction, None if ok else FAILURE)
    headers = network.emulator.headers(sent.prediction, body, at)
    return CallbackRequest(sent.path, [*headers.items()], body)


def content(network: Network, sent: Sent) -> Json:
    """Return the body of a provider's callback for a success."""
    return dict(json.loads(network.emulator.callback(sent.prediction)))


# --- the receiver ---


@dataclass
class Station:
    """A running receiver, with its clients and its database."""

    app: Starlette
    network: Network
    database: Path | Database
    clock: Clock
    http: httpx.AsyncClient
    """A client of /v1 with a valid key."""
    world: httpx.AsyncClient
    """A client without a key."""
    problems: list[str] = field(default_factory=list)

    async def submit(
        self,
        provider: str = "eachlabs",
        prompt: str = "a lighthouse",
        *,
        headers: dict[str, str] | None = None,
        model: str | None = None,
        **more: Any,
    ) -> Json:
        body = {
            "provider": provider,
            "model": model or MODELS[provider],
            "input": {"prompt": prompt},
        }
        answer = await self.http.post("/v1/predictions", json={**body, **more}, headers=headers)
        assert answer.status_code in {200, 202}, answer.text
        return dict(answer.json())

    async def submitted(self, provider: str, prompt: str = "a lighthouse", **more: Any) -> Sent:
        """Submit, and return the submit as the provider received it."""
        await self.submit(provider, prompt, **more)
        # Another server on the same database may send it.
        await eventually(lambda: any(sent.prompt == prompt for sent in self.network.sent))
        return self.network.of(prompt)

    async def read(self, prediction_id: str) -> Json:
        answer = await self.http.get(f"/v1/predictions/{prediction_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def until(self, prediction_id: str, *statuses: str) -> Json:
        return await eventually(
            lambda: self.read(prediction_id), lambda found: found["status"] in statuses
        )

    async def post(self, letter: CallbackRequest) -> httpx.Response:
        return await self.world.post(letter.path, content=letter.body, headers=letter.headers)  # type: ignore[arg-type] # bytes and text may mix

    async def push(self, sent: Sent, **more: Any) -> httpx.Response:
        """Send an authentic callback."""
        return await self.post(write(self.network, sent, **more))

    def rows(self, sql: str, *params: object) -> list[Any]:
        if isinstance(self.database, Database):
            numbers = itertools.count(1)
            sql = re.sub(r"\?", lambda _: f"${next(numbers)}", sql.replace(" BLOB", " BYTEA"))
            return self.database.rows(sql, *params)
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute(sql, params).fetchall()

    def edit(self, sql: str) -> None:
        """Change rows directly, not through the receiver."""
        if isinstance(self.database, Database):
            self.database.execute(f"SET search_path = receiver; {sql}")
            return
        with closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute(sql)

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) FROM {table}")[0][0])

    def one(self, sql: str, *params: object) -> Any:
        """Return the only column of the only row."""
        ((value,),) = self.rows(sql, *params)
        return value


@asynccontextmanager
async def receiving(
    database: Path | Database,
    network: Network,
    handlers: Sequence[Callable[..., Any]] = (),
    clock: Clock | None = None,
    *,
    dispatch: bool | Literal["inline"] = True,
    others: httpx.AsyncBaseTransport | None = None,
    results: httpx.AsyncBaseTransport | None = None,
    **env: str | None,
) -> AsyncIterator[Station]:
    """Run a receiver; a setting that is None is left out.

    `others` replaces the network of `ctx.http`, `results` that of fetched results, with its guard.
    """
    if isinstance(database, Database):
        place = {"RECEIVER_DATABASE_URL": database.url, "RECEIVER_MIGRATE_URL": database.url}
    else:
        lay_out(database)
        place = {"RECEIVER_DATABASE_URL": f"sqlite:///{database}"}
    given = {**ENV, **place, **env}
    settings = Settings.read({name: value for name, value in given.items() if value is not None})
    clock = clock or Clock()
    app = create_app(
        settings,
        handlers,
        dispatch=dispatch,
        clock=clock,
        transport=network,
        http=others,
        results=results,
    )
    transport = httpx.ASGITransport(app, client=STRANGER)
    key = {"authorization": f"Bearer {API_KEY}"}
    base = "https://hooks.test"
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=base, headers=key) as http,
        httpx.AsyncClient(transport=transport, base_url=base) as world,
    ):
        yield Station(app, network, database, clock, http, world)
