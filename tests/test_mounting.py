"""A receiver mounted in another app, and run by third-party ASGI servers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

import receiver
from receiver import AsyncReceiver
from receiver.http.access_logs import guard_access_logs
from receiver.settings import Settings
from tests.conftest import Logged
from tests.journey.parts import ROOT, eventually
from tests.loopback import free_port, is_ready
from tests.patience import PATIENCE
from tests.receiving import API_KEY, ENV, Network, write

pytestmark = pytest.mark.anyio

Frame = Callable[..., Starlette]
BOTH: Final = [Starlette, FastAPI]
URL: Final = "https://bot.test/predictions"


def settings(folder: Path, public_url: str = "https://bot.test") -> Settings:
    env = {
        "RECEIVER_PUBLIC_URL": public_url,
        "RECEIVER_DATABASE_URL": f"sqlite:///{folder / 'r.db'}",
    }
    return Settings.read({**ENV, **env})


def client(app: Starlette, url: str = URL) -> AsyncReceiver:
    return AsyncReceiver(url, API_KEY, patience=0, transport=httpx.ASGITransport(app))


@pytest.mark.parametrize("frame", BOTH)
async def test_mounted_receiver_starts_before_and_stops_after_the_apps_lifespan(
    frame: Frame, tmp_path: Path
) -> None:
    @asynccontextmanager
    async def own(app: Starlette) -> AsyncIterator[dict[str, int]]:
        async with client(app) as within:
            assert (await within.ready()).status == "ok"
            yield {"mine": 1}
            assert (await within.ready()).status == "ok"

    app = frame(lifespan=own)
    mounted = receiver.mount(app, "/predictions", settings(tmp_path), [], transport=Network())
    async with client(app) as outside:
        for _ in range(2):
            with pytest.raises(receiver.ClientError, match="has not been started"):
                await outside.list()
            async with app.router.lifespan_context(app) as state:
                assert state == {"mine": 1}
                assert (await outside.list()).data == []
    assert mounted in {route.app for route in app.routes if isinstance(route, Mount)}


@pytest.mark.parametrize("frame", BOTH)
@pytest.mark.parametrize(
    ("public", "hooks"),
    [
        ("https://bot.test", URL),
        (URL, URL),
        ("https://hooks.test/from/afar", "https://hooks.test/from/afar"),
    ],
)
async def test_all_urls_are_below_the_mount_path(
    frame: Frame, tmp_path: Path, public: str, hooks: str
) -> None:
    app, network = frame(), Network()
    receiver.mount(app, "/predictions/", settings(tmp_path, public), [], transport=network)
    key = {"authorization": f"Bearer {API_KEY}"}
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url=URL, headers=key) as http,
    ):
        body = {"provider": "fal", "model": "a/b", "input": {"prompt": "x"}}
        made = await http.post("/v1/predictions", json=body)
        assert str(made.url.join(made.headers["location"])) == (
            f"{URL}/v1/predictions/{made.json()['id']}"
        )
        described = await http.get("/openapi.json")
        [server] = described.json()["servers"]
        assert server["url"] == hooks
        [sent] = network.sent
        assert sent.hook.startswith(f"{hooks}/webhooks/fal/")
        callback = write(network, sent)
        path = f"/webhooks/fal/{sent.token}"
        called = await http.post(path, content=callback.body, headers=callback.headers)  # type: ignore[arg-type] # bytes and text may mix
        assert called.status_code == 200


async def test_mount_path_does_not_make_a_public_url(tmp_path: Path, logged: Logged) -> None:
    app = Starlette()
    given = Settings.read(
        {"RECEIVER_SECRET_KEY": "k" * 32, "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'r.db'}"}
    )
    receiver.mount(app, "/predictions", given, [], transport=Network())
    async with app.router.lifespan_context(app):
        [started] = [line for line in logged if line["event"] == "receiver.started"]
        assert started["public_url"] is None


def test_invalid_mount_path_or_app_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path must begin with a slash"):
        receiver.mount(Starlette(), "predictions", settings(tmp_path))
    with pytest.raises(TypeError, match="app must be one of Starlette or FastAPI"):
        receiver.mount(print, "/predictions", settings(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["/predictions", "/predictions/", "/", ""])
def test_mount_path_that_another_mount_has_taken_is_refused(tmp_path: Path, first: str) -> None:
    app = Starlette()
    app.mount(first, Starlette())
    with pytest.raises(ValueError, match="gets all requests for '/predictions'"):
        receiver.mount(app, "/predictions", settings(tmp_path), [])
    app.routes.clear()
    app.mount("/pre", Starlette())
    receiver.mount(app, "/predictions", settings(tmp_path), [])


# --- third-party servers ---

SERVERS: Final = {
    "uvicorn": "uvicorn {app} --port {port}",
    "hypercorn": "hypercorn {app} -b 127.0.0.1:{port} --access-logfile -",
    "hypercorn in one process": "hypercorn {app} -b 127.0.0.1:{port} -w 0 --access-logfile -",
    "granian": "granian --interface asgi {app} --port {port} --access-log",
    "gunicorn": "gunicorn -k asgi {app} -b 127.0.0.1:{port} --access-logfile -",
    "gunicorn and uvicorn": "gunicorn -k uvicorn.workers.UvicornWorker {app} "
    "-b 127.0.0.1:{port} --access-logfile -",
}
TOKEN: Final = "pred_0199f3a6d2c1e45b7f1c9d3e8a260f4b.the-secret-part"


@pytest.mark.parametrize("name", SERVERS)
async def test_third_party_server_logs_no_token_and_stops_while_clients_wait(
    name: str, tmp_path: Path
) -> None:
    port = free_port()
    app = "tests.mounted:starlette" if name == "granian" else "tests.mounted:fastapi"
    module, *arguments = SERVERS[name].format(app=app, port=port).split()
    env = {**os.environ, **ENV, "FAL_QUEUE_URL": "http://127.0.0.1:1", "RECEIVER_POLL_AFTER": "60"}
    env["RECEIVER_DATABASE_URL"] = f"sqlite:///{tmp_path / 'receiver.db'}"
    log = (tmp_path / "log").open("wb")
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)  # noqa: ASYNC220
    base = f"http://127.0.0.1:{port}"
    hook = f"/predictions/webhooks/fal/{TOKEN}"
    try:
        await asyncio.to_thread(eventually, lambda: is_ready(f"{base}/predictions/readyz"))
        async with httpx.AsyncClient(base_url=base) as http:
            assert (await http.get("/own")).json() == "the app's own lifespan ran"
            for method, status in (("POST", 401), ("GET", 405)):
                assert (await http.request(method, hook)).status_code == status
        async with AsyncReceiver(f"{base}/predictions", API_KEY, patience=0) as caller:
            made = await caller.submit("fal", "a/b", {"prompt": "x"})
            stream = caller.changes(0)
            assert (await anext(stream)).type == "prediction.queued"
            waiting = asyncio.create_task(caller.get(made.id, wait=60))
            await caller.ready()  # sent after both, so both have arrived
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait, PATIENCE)
            assert (await waiting).status in {"queued", "submitting"}
            await stream.aclose()
        assert process.returncode in {0, -signal.SIGTERM}
    finally:
        process.kill()
        process.wait()
        log.close()
    text = (tmp_path / "log").read_text()
    assert text.count("/predictions/webhooks/fal/...") == 2
    assert "receiver.stopped" in text
    assert "the-secret-part" not in text


async def test_token_is_hidden_from_access_logs_before_the_start(tmp_path: Path) -> None:
    app = Starlette()
    receiver.mount(app, "/predictions", settings(tmp_path), [], transport=Network())
    scopes: list[Any] = []

    async def seen(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await app(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(seen), base_url=URL) as http:
        answer = await http.post(f"/webhooks/fal/{TOKEN}")
    assert answer.status_code == 503
    assert (scopes[0]["path"], scopes[0]["raw_path"]) == (
        "/predictions/webhooks/fal/...",
        b"/predictions/webhooks/fal/...",
    )


class Atoms(dict[str, str]):
    """Like gunicorn's atoms: a missing key reads as a dash."""

    def __getitem__(self, name: str) -> str:
        return self.get(name, "-")


@pytest.mark.parametrize(
    ("message", "args", "expected"),
    [
        (f"POST /webhooks/fal/{TOKEN}?a=b", (), "POST /webhooks/fal/...?a=b"),
        ('"%s" %d', (f"/art/webhooks/fal/{TOKEN}", 200), '"/art/webhooks/fal/..." 200'),
        ('"%(r)s" %(x)s', (Atoms(r=f"/webhooks/fal/{TOKEN} HTTP"),), '"/webhooks/fal/... HTTP" -'),
        ("%s", ("/v1/predictions",), "/v1/predictions"),
        ("nothing", (), "nothing"),
    ],
)  # fmt: skip
def test_access_log_line_hides_the_callback_token(
    message: str, args: tuple[Any, ...], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gunicorn.access")
    for _ in range(2):
        guard_access_logs()
    logging.getLogger("gunicorn.access").info(message, *args)
    assert caplog.messages == [expected]
