"""What the measurements need around them: predictions, callbacks of them, and servers."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from receiver.model import new_id
from receiver.store.sqlite import SQLiteStore
from receiver.store.values import NewPrediction, Progress, Slots
from receiver.tokens import Tokens
from tests.bench.load import post

SECRET = "bench-secret-key-of-more-than-32-characters"
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
TOKENS = Tokens([SECRET])
MODELS = {"eachlabs": "nano-banana", "fal": "fal-ai/nano-banana"}
HANDLER = """from receiver import Event, on


@on("*", name="empty", concurrency=64)
async def empty(event: Event) -> None: ...
"""
EMPTY = """import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


async def empty(request: Request) -> Response:
    return Response(b"{}", media_type="application/json")


app = Starlette(routes=[Route("/webhooks/{provider}/{token}", empty, methods=["POST"])])
uvicorn.run(app, port=PORT, access_log=False, log_level="warning", ws="none")
"""


def seed(path: Path, provider: str, count: int) -> list[tuple[str, str]]:
    """Make `count` predictions that are processing; give (our id, the provider's id) for each."""
    return asyncio.run(_seed(path, provider, count))


async def _seed(path: Path, provider: str, count: int) -> list[tuple[str, str]]:
    store = SQLiteStore(str(path), lambda _: None)
    store.open()
    now = time.time()
    # One a millisecond, as ids sort by their time: callbacks come roughly in that order too.
    made = [now - (count - number) / 1000 for number in range(count)]
    ids = [(new_id("pred", at), f"req-{provider}-{at:.3f}") for at in made]
    new = [
        NewPrediction(
            id=ours,
            provider=provider,
            model=MODELS[provider],
            mode="queue",
            input={"prompt": "a lighthouse"},
            metadata={},
            created_at=at,
        )
        for (ours, _), at in zip(ids, made, strict=True)
    ]
    await asyncio.gather(*(store.create(row) for row in new))
    slots = Slots(
        provider=provider,
        now=now,
        most=count,
        max_in_flight=None,
        per_minute=None,
        hold_until=now + 3600,
        hold_sync_until=now + 3600,
        timeout=3600,
    )
    await store.begin_submits(slots)
    steps = [
        Progress(id=ours, cause="accepted", due_at=now + 3600, provider_id=theirs)
        for ours, theirs in ids
    ]
    await asyncio.gather(*(store.progress(step) for step in steps))
    store.close()
    return ids


def callback(provider: str, ours: str, theirs: str) -> bytes:
    """Prepare the success callback of one prediction, proved."""
    path = f"/webhooks/{provider}/{TOKENS.callback(provider, ours)}"
    url = f"https://cdn.example/{theirs}.png"
    if provider == "eachlabs":
        body = msgspec.json.encode(
            {"exec_id": theirs, "flow_id": None, "status": "succeeded", "output": url, "error": ""}
        )
        secret = TOKENS.webhook_secrets(ours)[0].decode()
        return post(path, body, {"X-Webhook-Secret": secret})
    body = msgspec.json.encode(
        {
            "request_id": theirs,
            "gateway_request_id": theirs,
            "status": "OK",
            "payload": {"images": [{"url": url, "content_type": "image/png"}]},
        }
    )
    stamp = str(int(time.time()))
    message = "\n".join((theirs, "user-1", stamp, hashlib.sha256(body).hexdigest()))
    headers = {
        "X-Fal-Webhook-Request-Id": theirs,
        "X-Fal-Webhook-User-Id": "user-1",
        "X-Fal-Webhook-Timestamp": stamp,
        "X-Fal-Webhook-Signature": KEY.sign(message.encode()).hex(),
    }
    return post(path, body, headers)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def jwks() -> Iterator[str]:
    """Serve the key set that the fal callbacks are signed for."""
    x = urlsafe_b64encode(KEY.public_key().public_bytes_raw()).decode()
    body = msgspec.json.encode({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x}]})

    class Keys(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Keys)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/jwks.json"
    finally:
        server.shutdown()
        server.server_close()


class Server:
    """A process that serves a port; `pid` is for looking at its memory."""

    def __init__(self, command: list[str], port: int, home: Path, env: dict[str, str]) -> None:
        self.port = port
        self._log = (home / "server.log").open("ab")
        self._process = subprocess.Popen(
            command, cwd=home, env={**os.environ, **env}, stdout=self._log, stderr=self._log
        )
        self.pid = self._process.pid

    def wait(self) -> None:
        """Wait until the port takes connections."""
        ends = time.monotonic() + 20
        while time.monotonic() < ends and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.002)
        raise RuntimeError("the server did not start; see server.log")

    def resident(self) -> int:
        """Give the resident memory in bytes."""
        found = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, check=True, text=True
        )
        return int(found.stdout) * 1024

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(15)
        self._log.close()


@contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def empty_route(home: Path) -> Server:
    port = free_port()
    script = home / "empty.py"
    script.write_text(EMPTY.replace("PORT", str(port)))
    return Server([sys.executable, str(script)], port, home, {})


def receiver(home: Path, jwks_url: str, *handlers: str) -> Server:
    """Start the real server, as a user would, on the database in `home`."""
    port = free_port()
    (home / "empty_handler.py").write_text(HANDLER)
    env = {
        "RECEIVER_SECRET_KEY": SECRET,
        "RECEIVER_API_KEYS": "bench",
        "RECEIVER_DATABASE_URL": f"sqlite:///{home / 'receiver.db'}",
        "FAL_JWKS_URL": jwks_url,
        "PYTHONPATH": str(Path.cwd()),
    }
    command = [sys.executable, "-m", "receiver", "serve", *handlers, "--port", str(port)]
    return Server(command, port, home, env)


def ask(home: Path, sql: str) -> list[tuple[float, ...]]:
    """Read the database of a server, also while it runs."""
    with sqlite3.connect(home / "receiver.db", timeout=10) as connection:
        rows = connection.execute(sql).fetchall()
    connection.close()
    return rows
