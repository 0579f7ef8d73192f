"""An app answers 503 before its start, and repeated or failed starts leak nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from receiver import Context, Event, create_app, on
from receiver.model.errors import StoreUnavailable, StoreUnusable
from receiver.settings import Settings
from receiver.store.deliveries import DeliveryStore
from receiver.store.facade import Store
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from tests.conftest import Logged
from tests.journey.parts import ROOT
from tests.journey.parts import eventually as soon
from tests.loopback import free_port, is_ready
from tests.patience import PATIENCE
from tests.postgres import Database
from tests.receiving import API_KEY, ENV, Network, eventually

pytestmark = pytest.mark.anyio

KEY = {"authorization": f"Bearer {API_KEY}"}
DESCRIBED: dict[str, list[str]] = {
    path: [method.upper() for method in item if method in {"get", "post"}]
    for path, item in json.loads(files("receiver.http").joinpath("openapi.json").read_text())[
        "paths"
    ].items()
}


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'receiver.db'}"
    return str(request.getfixturevalue("database").url)


def app_on(url: str, *handlers: Any) -> Starlette:
    settings = Settings.read({**ENV, "RECEIVER_DATABASE_URL": url})
    return create_app(settings, handlers, transport=Network())


def client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="https://hooks.test", headers=KEY)


async def ask_everything(http: httpx.AsyncClient, prefix: str = "") -> dict[tuple[str, str], int]:
    """Request every route of the app; return the statuses."""
    async with asyncio.timeout(PATIENCE):
        return {
            (method, path): (
                await http.request(method, prefix + path.format_map(_Any()))
            ).status_code
            for path, methods in DESCRIBED.items()
            for method in methods
        }


class _Any(dict[str, str]):
    def __missing__(self, _: str) -> str:
        return "fal"


# --- before, after and without a start ---


@pytest.mark.parametrize("prefix", ["", "/under"])
async def test_every_route_answers_503_before_the_start(
    tmp_path: Path, logged: Logged, prefix: str
) -> None:
    app = app_on(f"sqlite:///{tmp_path / 'receiver.db'}")
    outer = Starlette(routes=[Mount("/under", app)])
    async with client(outer if prefix else app) as http:
        answers = await ask_everything(http, prefix)
        free = {("GET", path) for path in ("/", "/healthz", "/health", "/openapi.json", "/docs")}
        assert {answers.pop(one) for one in free} == {200}
        assert set(answers.values()) == {503}
        answer = await http.post(f"{prefix}/webhooks/fal/x", content=b"{}")
        assert answer.headers["content-type"] == "application/problem+json"
        assert "has not been started" in answer.json()["detail"]
        assert (await http.get(f"{prefix}/v1/models/fal/a/b")).status_code == 503
        assert (await http.get(f"{prefix}/nowhere")).status_code == 404
    assert [line["event"] for line in logged] == ["receiver.unstarted"]
    assert not (tmp_path / "receiver.db").exists()


async def test_route_added_by_the_embedding_program_survives_a_start(tmp_path: Path) -> None:
    app = app_on(f"sqlite:///{tmp_path / 'receiver.db'}")
    app.router.routes.append(Route("/own", lambda _: PlainTextResponse("mine")))
    async with client(app) as http:
        for _ in range(2):
            assert (await http.get("/own")).text == "mine"
            async with app.router.lifespan_context(app):
                assert (await http.get("/own")).text == "mine"
                assert (await http.get("/readyz")).status_code == 200
            assert (await http.get("/readyz")).status_code == 503


async def test_failed_start_is_reported_leaks_nothing_and_can_be_repeated(
    tmp_path: Path, logged: Logged
) -> None:
    path = tmp_path / "receiver.db"
    path.write_bytes(b"this is no database, but long enough to be taken for one")
    before, opened = left_over(), [descriptors()]
    app = app_on(f"sqlite:///{path}")
    async with client(app) as http:
        for _ in range(3):
            with pytest.raises(StoreUnusable, match="cannot open the database"):
                await run_once(app)
            assert logged == []  # the error says it all
            await eventually(lambda: left_over() == before)
            assert "its start failed" in (await http.get("/readyz")).json()["detail"]
            opened.append(descriptors())
            logged.clear()
        assert_none_kept(opened)
        path.unlink()
        async with app.router.lifespan_context(app):
            assert (await http.get("/readyz")).status_code == 200


async def test_read_only_database_fails_the_lifespan_startup_with_a_message(
    database: Database,
) -> None:
    app = app_on(database.url_with("default_transaction_read_only=on"))
    said: list[Any] = []

    async def start() -> dict[str, str]:
        return {"type": "lifespan.startup"}

    async def hear(message: Any) -> None:
        said.append(message)

    with pytest.raises(StoreUnavailable):
        await app({"type": "lifespan", "asgi": {"version": "3.0"}}, start, hear)
    [failed] = said
    assert failed["type"] == "lifespan.startup.failed"
    assert failed["message"].startswith("receiver: the database does not take writes: ")


async def test_requests_during_shutdown_get_503(tmp_path: Path) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    @on("*")
    async def slow(_event: Event, _ctx: Context) -> None:
        begun.set()
        await may_end.wait()

    app = app_on(f"sqlite:///{tmp_path / 'receiver.db'}", slow)
    lifespan = app.router.lifespan_context(app)
    async with client(app) as http:
        await lifespan.__aenter__()
        body = {"provider": "fal", "model": "a/b", "input": {"prompt": "x"}, "mode": "sync"}
        assert (await http.post("/v1/predictions", json=body)).status_code == 200
        await begun.wait()
        stopping = asyncio.create_task(lifespan.__aexit__(None, None, None))
        refused = await eventually(
            lambda: http.get("/readyz"), lambda answer: answer.status_code == 503
        )
        assert "is stopping" in refused.json()["detail"]
        may_end.set()
        await stopping


# --- repeated starts ---


@pytest.fixture(autouse=True)
def _small_heap() -> None:
    """Exclude what earlier tests left from collections, which then take milliseconds."""
    gc.freeze()


def left_over() -> tuple[list[str], int]:
    """Return what still runs in this process: the receiver's threads, and the number of tasks."""
    threads = sorted(one.name for one in threading.enumerate() if one.name.startswith("receiver"))
    return threads, len(asyncio.all_tasks())


def descriptors() -> Counter[str]:
    """Return the targets of this process's open file descriptors, with their counts."""
    gc.collect()
    found = Counter[str]()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            found[fd.readlink().name] += 1
    return found


def assert_none_kept(opened: list[Counter[str]]) -> None:
    """Fail if each of some rounds has left more open than the one before.

    A single count may change with what other tests have left in this process.
    """
    growth = [later - earlier for earlier, later in pairwise(opened)]
    assert any(later.total() <= earlier.total() for earlier, later in pairwise(opened)), growth


def paths_of(app: Starlette) -> set[str]:
    return {str(getattr(route, "path", "")).replace(":path", "") for route in app.routes}


async def run_once(app: Starlette) -> None:
    async with app.router.lifespan_context(app):
        pass


async def test_app_can_be_started_repeatedly_without_leaks(url: str, logged: Logged) -> None:
    ran = []

    @on("*")
    async def note(event: Event, _ctx: Context) -> None:
        ran.append(event.prediction.id)

    app = app_on(url, note)
    assert paths_of(app) == DESCRIBED.keys()
    before, opened = left_over(), []
    async with client(app) as http:
        for number in range(1, 6):
            async with app.router.lifespan_context(app):
                body = {"provider": "fal", "model": "a/b", "input": {"prompt": "x"}, "mode": "sync"}
                assert (await http.post("/v1/predictions", json=body)).status_code == 200
                await eventually(lambda number=number: len(ran) == number)  # type: ignore[misc]
                assert paths_of(app) == DESCRIBED.keys()
            await eventually(lambda: left_over() == before)
            opened.append(descriptors())
    assert_none_kept(opened)
    owners = [line["owner"] for line in logged if line["event"] == "receiver.started"]
    assert len(set(owners)) == 5


@pytest.mark.parametrize("step", ["recover", "pending"])
async def test_start_that_fails_halfway_leaks_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    app = app_on(url)
    await run_once(app)
    before, opened = left_over(), [descriptors()]

    async def fails(*_: object) -> None:
        raise StoreUnavailable("just now")

    for kind in (Store, *Store.__subclasses__(), DeliveryStore):
        if step in vars(kind):
            monkeypatch.setattr(kind, step, fails)
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match="just now"):
            await run_once(app)
        await eventually(lambda: left_over() == before)
        opened.append(descriptors())
    assert_none_kept(opened)
    monkeypatch.undo()
    await run_once(app)


async def test_second_start_while_running_is_refused(url: str) -> None:
    app = app_on(url)
    async with app.router.lifespan_context(app), client(app) as http:
        with pytest.raises(StoreUnusable, match="runs already"):
            await run_once(app)
        assert (await http.get("/readyz")).status_code == 200


def test_each_postgres_store_has_its_own_sender_name() -> None:
    one, other = (
        PostgresStore("postgresql:///x", lambda _: None, PgQueuerJobs()) for _ in range(2)
    )
    assert one._notices.sender != other._notices.sender  # noqa: SLF001 - a process recognises its own notices by it


# --- servers ---


@asynccontextmanager
async def reading(http: httpx.AsyncClient) -> AsyncIterator[asyncio.Task[bytes]]:
    """Read the live stream to its end."""
    async with http.stream("GET", "/v1/events/stream", headers=KEY) as answer:
        assert answer.status_code == 200
        yield asyncio.create_task(answer.aread())


@pytest.mark.parametrize("server", ["receiver serve", "uvicorn receiver.asgi:app"])
async def test_server_stops_while_clients_wait(tmp_path: Path, server: str) -> None:
    port = free_port()
    env = {**os.environ, **ENV, "FAL_QUEUE_URL": "http://127.0.0.1:1"}
    env["RECEIVER_DATABASE_URL"] = f"sqlite:///{tmp_path / 'receiver.db'}"
    command = [sys.executable, "-m", *server.split(), "--port", str(port)]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)  # noqa: ASYNC220
    try:
        base = f"http://127.0.0.1:{port}"
        await asyncio.to_thread(soon, lambda: is_ready(f"{base}/readyz"))
        async with httpx.AsyncClient(base_url=base, timeout=90, headers=KEY) as http:
            body = {"provider": "fal", "model": "a/b", "input": {"prompt": "x"}}
            made = (await http.post("/v1/predictions", json=body)).json()
            async with reading(http) as stream:
                path = f"/v1/predictions/{made['id']}"
                waiting = asyncio.create_task(http.get(path, headers={"prefer": "wait=60"}))
                # This is sent after both, so both have arrived.
                assert (await http.get("/readyz")).status_code == 200
                process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(process.wait, PATIENCE)
                assert (await waiting).json()["status"] == "queued"
                await stream
    finally:
        process.kill()
        process.wait()
        log.close()
