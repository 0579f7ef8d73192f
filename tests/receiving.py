"""A receiver under test: the real app on a real file, with a scripted network at its edge."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import random
import re
import sqlite3
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, overload
from urllib.parse import urlsplit

import httpx
from starlette.applications import Starlette

from receiver import create_app
from receiver.emulator.keys import Keyring
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
    "OXEN_API_KEY": "the-oxen-key",
    "EACHLABS_API_KEY": "the-eachlabs-key",
    "FAL_KEY": "the-fal-key",
    "OXEN_BASE_URL": "https://oxen.test",
    "EACHLABS_BASE_URL": "https://eachlabs.test",
    "FAL_QUEUE_URL": "https://queue.fal.test",
    "FAL_RUN_URL": "https://run.fal.test",
    "FAL_JWKS_URL": "https://rest.fal.test/jwks.json",
    "FAL_META_URL": "https://api.fal.test/v1/meta",
}
SECRETS: Final = (*(ENV[name] for name in ENV if name.endswith("KEY")), API_KEY, OTHER_API_KEY)
MODELS: Final = {"oxen": "nano-banana", "eachlabs": "nano-banana", "fal": "fal-ai/nano-banana"}
PICTURE: Final = "https://cdn.test/a.png"


@overload
async def eventually(
    read: Callable[[], Coroutine[Any, Any, T]], condition: Callable[[T], Any] = bool
) -> T: ...
@overload
async def eventually(read: Callable[[], T], condition: Callable[[T], Any] = bool) -> T: ...
async def eventually(read: Callable[[], Any], condition: Callable[[Any], Any] = bool) -> Any:
    """Read until the condition holds; a race ends in a failure, not in a hang."""
    deadline = time.monotonic() + PATIENCE
    while True:
        got = read()
        value = await got if inspect.isawaitable(got) else got
        if condition(value):
            return value
        assert time.monotonic() < deadline, value
        await asyncio.sleep(0.005)


class Clock:
    """The wall clock, and whatever it is told to be ahead."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


# --- the network ---

Answering = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]

_KINDS: Final = tuple(
    (kind, method, re.compile(pattern))
    for kind, method, pattern in (
        ("oxen.stream", "GET", r"https://oxen\.test/api/events"),
        ("oxen.submit", "POST", r"https://oxen\.test/api/ai/queue"),
        ("oxen.list", "GET", r"https://oxen\.test/api/ai/queue(\?.*)?"),
        ("oxen.poll", "GET", r"https://oxen\.test/api/ai/queue/.+"),
        ("oxen.cancel", "DELETE", r"https://oxen\.test/api/ai/queue/.+"),
        ("oxen.run", "POST", r"https://oxen\.test/api/ai/images/.+"),
        ("oxen.model", "GET", r"https://oxen\.test/api/ai/models/.+"),
        ("eachlabs.submit", "POST", r"https://eachlabs\.test/v1/prediction"),
        ("eachlabs.run", "POST", r"https://eachlabs\.test/v1/prediction/run"),
        ("eachlabs.cancel", "POST", r"https://eachlabs\.test/v1/prediction/.+/cancel"),
        ("eachlabs.poll", "GET", r"https://eachlabs\.test/v1/prediction/.+"),
        ("fal.keys", "GET", r"https://rest\.fal\.test/jwks\.json"),
        ("fal.meta", "GET", r"https://api\.fal\.test/v1/meta"),
        ("fal.run", "POST", r"https://run\.fal\.test/.+"),
        ("fal.submit", "POST", r"https://queue\.fal\.test/.+"),
        ("fal.poll", "GET", r"https://queue\.fal\.test/.+/status"),
        ("fal.result", "GET", r"https://queue\.fal\.test/.+"),
        ("fal.cancel", "PUT", r"https://queue\.fal\.test/.+/cancel"),
    )
)


def reply(
    body: object = None, status: int = 200, *, text: str | None = None, **headers: str
) -> Answering:
    """Answer with JSON, or with a text as it is."""
    content = json.dumps(body) if text is None else text
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda _: httpx.Response(status, content=content.encode(), headers=named)


def breaks(error: type[httpx.TransportError]) -> Answering:
    """Fail as a broken connection does."""

    def broken(request: httpx.Request) -> httpx.Response:
        raise error("broken on request", request=request)

    return broken


async def hangs(_: httpx.Request) -> httpx.Response:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


@dataclass(frozen=True)
class Sent:
    """One submit as a provider saw it."""

    provider: str
    id: str
    """The provider's own id for it."""
    prompt: str
    hook: str
    """The callback URL; empty where none was given."""
    secret: str
    request: httpx.Request

    @property
    def path(self) -> str:
        return urlsplit(self.hook).path

    @property
    def token(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def prediction_id(self) -> str:
        return self.token.partition(".")[0]


class _Stream(httpx.AsyncByteStream):
    """One open event stream; None ends it, an error breaks it."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (chunk := await self.said.get()) is not None:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


class Network(httpx.AsyncBaseTransport):
    """The three providers: every call is kept, and answered as scripted, else kindly."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, httpx.Request]] = []
        self.sent: list[Sent] = []
        self.streams: list[_Stream] = []
        self.keyring = Keyring(random.Random(7))
        self._scripts: dict[str, deque[Answering]] = defaultdict(deque)
        self._always: dict[str, Answering] = {}

    def script(self, kind: str, *answers: Answering) -> None:
        """Answer the next calls of a kind in turn."""
        self._scripts[kind].extend(answers)

    def always(self, kind: str, answer: Answering) -> None:
        self._always[kind] = answer

    def count(self, kind: str) -> int:
        return sum(1 for called, _ in self.calls if called == kind)

    def of(self, prompt: str) -> Sent:
        return next(sent for sent in self.sent if sent.prompt == prompt)

    def say(self, **data: object) -> None:
        """Tell every listener of a finished generation."""
        self.say_raw("media_generation_completed", json.dumps(data))

    def say_raw(self, event: str, data: str) -> None:
        for stream in self.streams:
            stream.said.put_nowait(f"event: {event}\ndata: {data}\n\n".encode())

    def cut(self) -> None:
        streams, self.streams = self.streams, []
        for stream in streams:
            stream.said.put_nowait(httpx.ReadError("cut"))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        kind = kind_of(request)
        self.calls.append((kind, request))
        scripts = self._scripts[kind]
        answer = scripts.popleft() if scripts else self._always.get(kind, self.kindly)
        response = answer(request)
        return await response if inspect.isawaitable(response) else response

    def kindly(self, request: httpx.Request) -> httpx.Response:
        """Answer as a provider does on a good day: taken, and not ready yet."""
        kind = kind_of(request)
        provider, _, call = kind.partition(".")
        if call == "submit":
            return httpx.Response(200, json=_created(self.take(provider, request)))
        if kind == "oxen.stream":
            self.streams.append(_Stream())
            headers = {"content-type": "text/event-stream"}
            return httpx.Response(200, headers=headers, stream=self.streams[-1])
        identifier = request.url.path.split("/")[-2 if kind == "fal.poll" else -1]
        return httpx.Response(200, json=self._kind_answers(kind, identifier))

    def take(self, provider: str, request: httpx.Request) -> Sent:
        """Enter a submit in the books."""
        body = json.loads(request.content)
        sent = Sent(
            provider=provider,
            id=f"{provider}-{len(self.sent) + 1}",
            prompt=str(body.get("input", body).get("prompt", "")),
            hook=body.get("webhook_url") or request.url.params.get("fal_webhook", ""),
            secret=body.get("webhook_secret", ""),
            request=request,
        )
        self.sent.append(sent)
        return sent

    def _kind_answers(self, kind: str, identifier: str) -> Json:
        answers: dict[str, Json] = {
            "oxen.poll": {"generation_id": identifier, "status": "processing"},
            "oxen.list": {"count": 0, "generations": []},
            "oxen.cancel": {"status": "success"},
            "oxen.run": {"images": [{"url": PICTURE}]},
            "oxen.model": {"id": identifier, "request_schema": {}},
            "eachlabs.poll": {"id": identifier, "status": "processing"},
            "eachlabs.cancel": {"status": "cancelled"},
            "eachlabs.run": {"status": "success", "output": [PICTURE]},
            "fal.poll": {"status": "IN_PROGRESS", "request_id": identifier},
            "fal.result": {"images": [{"url": PICTURE}]},
            "fal.cancel": {"status": "CANCELLATION_REQUESTED"},
            "fal.run": {"images": [{"url": PICTURE}]},
            "fal.keys": self.keyring.published(padded=True),
            "fal.meta": {"webhook_ip_ranges": ["198.51.100.0/24", "2001:db8:1::/48"]},
        }
        return answers[kind]


def kind_of(request: httpx.Request) -> str:
    url = str(request.url)
    whole = url.partition("?")[0] if "fal.test" in url else url
    for kind, method, pattern in _KINDS:
        if request.method == method and pattern.fullmatch(whole):
            return kind
    raise AssertionError(f"nobody should call {request.method} {url}")


def _created(sent: Sent) -> Json:
    url = f"https://queue.fal.test/fal-ai/nano-banana/requests/{sent.id}"
    answers: dict[str, Json] = {
        "oxen": {"generations": [{"generation_id": sent.id, "status": "queued"}]},
        "eachlabs": {"status": "success", "predictionID": sent.id},
        "fal": {
            "request_id": sent.id,
            "gateway_request_id": sent.id,
            "status_url": url + "/status",
            "response_url": url,
            "cancel_url": url + "/cancel",
        },
    }
    return answers[sent.provider]


ENDS: Final[dict[str, Answering]] = {
    "oxen.poll": lambda request: httpx.Response(
        200,
        json={
            "generation_id": request.url.path.rpartition("/")[2],
            "status": "succeeded",
            "result_url": PICTURE,
        },
    ),
    "eachlabs.poll": lambda request: httpx.Response(
        200,
        json={
            "id": request.url.path.rpartition("/")[2],
            "status": "success",
            "output": {"url": PICTURE},
        },
    ),
    "fal.poll": reply({"status": "COMPLETED"}),
}
"""What a poll answers when the prediction has succeeded."""


# --- callbacks ---


@dataclass
class Letter:
    """A callback on its way: an authentic one, until a test changes it."""

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
) -> Letter:
    """Write the callback that a provider would send for a submit."""
    if body is None:
        body = json.dumps(content(sent, ok=ok)).encode()
    kind: tuple[str, str] = ("content-type", "application/json")
    if sent.provider == "eachlabs":
        return Letter(sent.path, [kind, ("x-webhook-secret", sent.secret)], body)
    stamp = int(time.time() if at is None else at)
    signed = network.keyring.headers(sent.id, "user-1", stamp, body)
    return Letter(sent.path, [kind, *signed.items()], body)


def content(sent: Sent, *, ok: bool = True) -> Json:
    """Say success or failure in the words of a provider."""
    if sent.provider == "eachlabs":
        output: Any = {"url": PICTURE} if ok else [{"error": "model timed out"}]
        status = "succeeded" if ok else "failed"
        return {
            "exec_id": sent.id,
            "flow_id": None,
            "status": status,
            "output": output,
            "error": "",
        }
    ids = {"request_id": sent.id, "gateway_request_id": sent.id}
    if ok:
        return {**ids, "status": "OK", "payload": {"images": [{"url": PICTURE}]}, "error": None}
    detail = [{"loc": ["body", "prompt"], "msg": "field required", "type": "value_error"}]
    error = "Invalid status code: 422"
    return {**ids, "status": "ERROR", "error": error, "payload": {"detail": detail}}


# --- the receiver ---


@dataclass
class Station:
    """A running receiver and the ways to look at it."""

    app: Starlette
    network: Network
    database: Path | Database
    clock: Clock
    http: httpx.AsyncClient
    """A caller of /v1 with a good key."""
    world: httpx.AsyncClient
    """A stranger."""
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
        """Submit, and give what the provider saw of it."""
        await self.submit(provider, prompt, **more)
        # Another server on the same database may be the one that sends it.
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

    async def post(self, letter: Letter) -> httpx.Response:
        return await self.world.post(letter.path, content=letter.body, headers=letter.headers)  # type: ignore[arg-type] # bytes and text may mix

    async def push(self, sent: Sent, **more: Any) -> httpx.Response:
        """Deliver an authentic callback."""
        return await self.post(write(self.network, sent, **more))

    def rows(self, sql: str, *params: object) -> list[Any]:
        if isinstance(self.database, Database):
            numbers = itertools.count(1)
            sql = re.sub(r"\?", lambda _: f"${next(numbers)}", sql.replace(" BLOB", " BYTEA"))
            return self.database.rows(sql, *params)
        with closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)) as connection:
            return connection.execute(sql, params).fetchall()

    def edit(self, sql: str) -> None:
        """Change the rows behind the receiver's back."""
        if isinstance(self.database, Database):
            self.database.execute(f"SET search_path = receiver; {sql}")
            return
        with closing(sqlite3.connect(self.database)) as connection, connection:
            connection.execute(sql)

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT count(*) FROM {table}")[0][0])

    def one(self, sql: str, *params: object) -> Any:
        """Give the one column of the one row."""
        ((value,),) = self.rows(sql, *params)
        return value


@asynccontextmanager
async def receiving(
    database: Path | Database,
    network: Network,
    handlers: Sequence[Callable[..., Any]] = (),
    clock: Clock | None = None,
    *,
    dispatch: bool = True,
    others: httpx.AsyncBaseTransport | None = None,
    **env: str | None,
) -> AsyncIterator[Station]:
    """Run a receiver; a setting that is None is left out, `others` are whom handlers ask."""
    if isinstance(database, Database):
        url = database.url
    else:
        lay_out(database)
        url = f"sqlite:///{database}"
    given = {**ENV, "RECEIVER_DATABASE_URL": url, **env}
    settings = Settings.read({name: value for name, value in given.items() if value is not None})
    clock = clock or Clock()
    app = create_app(
        settings, handlers, dispatch=dispatch, clock=clock, transport=network, http=others
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
