"""The environment of the measurements: predictions, their callbacks, and servers."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from receiver.emulator import create_emulator
from receiver.emulator.endings import Ending
from receiver.emulator.inprocess import BY_HAND, EmulatedProviders
from receiver.model.ids import new_id
from receiver.predictions.tokens import Tokens
from receiver.store.facade import Store
from receiver.store.postgres.engine import PostgresStore
from receiver.store.postgres.queue import PgQueuerJobs
from receiver.store.predictions import NewPrediction, Progress, SubmitBudget
from receiver.store.sqlite.engine import SQLiteStore
from tests.bench.load import post
from tests.emulator.parts import prediction
from tests.emulator.serving import serve
from tests.loopback import free_port
from tests.postgres import Database, made

SECRET = "bench-secret-key-of-more-than-32-characters"
EMULATED = EmulatedProviders()
"""Signs callbacks, with the keys that every emulator of the same seed publishes."""
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


class Books(ABC):
    """A database of one engine, for one measurement."""

    engine: str
    url: str

    @abstractmethod
    def store(self) -> Store: ...

    @abstractmethod
    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query, also while a server runs."""

    @abstractmethod
    def run(self, statements: Sequence[str], count: int) -> None:
        """Run statements in which `{ids}` is a table of `count` ids, and `{now}` the time."""

    def fill(self, count: int) -> None:
        """Insert `count` predictions that ended long ago, with their callbacks and deliveries."""
        if count:
            self.run(_ENDED, count)

    def fill_in_flight(self, count: int) -> None:
        """Insert `count` predictions that are at a provider, to be polled in an hour."""
        if count:
            self.run(_IN_FLIGHT, count)

    def seed(self, provider: str, count: int) -> list[tuple[str, str]]:
        """Create `count` processing predictions; return (our id, the provider's id) of each."""
        return asyncio.run(_seed(self.store(), provider, count))


class SQLiteBooks(Books):
    engine = "SQLite"

    def __init__(self, home: Path) -> None:
        self._path = home / "receiver.db"
        self.url = f"sqlite:///{self._path}"

    def store(self) -> Store:
        return SQLiteStore(str(self._path), lambda _: None)

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._path, timeout=10)) as connection:
            return connection.execute(sql).fetchall()

    def run(self, statements: Sequence[str], count: int) -> None:
        ids = (
            "(WITH RECURSIVE n(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n WHERE n < "
            f"{count}) SELECT printf('%014x%018d', n, n) AS id FROM n)"
        )
        with closing(sqlite3.connect(self._path)) as connection, connection:
            for statement in statements:
                connection.execute(statement.format(ids=ids, now=time.time()))


class PostgresBooks(Books):
    engine = "PostgreSQL"

    def __init__(self, database: Database) -> None:
        self.database = database
        self.url = database.url

    def store(self) -> Store:
        return PostgresStore(self.url, lambda _: None, PgQueuerJobs())

    def ask(self, sql: str) -> list[tuple[Any, ...]]:
        return self.database.rows(sql)

    def run(self, statements: Sequence[str], count: int) -> None:
        ids = (
            "(SELECT lpad(to_hex(n), 14, '0') || lpad(n::text, 18, '0') AS id "
            f"FROM generate_series(1, {count}) n)"
        )
        self.database.execute(
            "SET search_path = receiver",
            *(statement.format(ids=ids, now=time.time()) for statement in statements),
            "VACUUM ANALYZE",
        )


_ENDED = (
    """INSERT INTO predictions (id, provider, model, mode, status, input, metadata, provider_id,
           output, channel, created_at, submitted_at, completed_at, deadline_at)
       SELECT 'pred_' || id, 'eachlabs', 'nano-banana', 'queue', 'succeeded',
           '{{"prompt":"a lighthouse"}}', '{{}}', 'old-' || id, '[]', 'webhook', 1, 1, 2, 3600
       FROM {ids} x""",
    """INSERT INTO callbacks
           (prediction_id, channel, digest, received_at, headers, body, verdict, reason)
       SELECT 'pred_' || id, 'webhook', id, 2, '[]', '{{"status": "succeeded"}}', 'accepted', ''
       FROM {ids} x""",
    """INSERT INTO events (prediction_id, type, time, channel)
       SELECT 'pred_' || id, 'prediction.succeeded', 2, 'webhook' FROM {ids} x""",
    """INSERT INTO deliveries
           (id, prediction_id, handler, state, attempts, claims, created_at, ended_at)
       SELECT 'dlv_' || id || '00000000', 'pred_' || id, 'empty', 'done', 1, 1, 2, 2
       FROM {ids} x""",
)
_IN_FLIGHT = (
    """INSERT INTO predictions (id, provider, model, mode, status, input, metadata, provider_id,
           links, created_at, submitted_at, due_at, deadline_at)
       SELECT 'pred_' || id, 'fal', 'fal-ai/nano-banana', 'queue', 'processing',
           '{{"prompt":"a lighthouse"}}', '{{}}', 'flying-' || id, '{{}}',
           {now}, {now}, {now} + 3600, {now} + 7200
       FROM {ids} x""",
)


@contextmanager
def books(server: Database | None) -> Iterator[tuple[Path, Books]]:
    """Yield a folder and an empty database: a file, or one on the server."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home = Path(folder)
        if server is None:
            yield home, SQLiteBooks(home)
        else:
            yield home, PostgresBooks(stack.enter_context(made(server)))


async def _seed(store: Store, provider: str, count: int) -> list[tuple[str, str]]:
    await store.start()
    now = time.time()
    # One per millisecond: ids sort by their time, and callbacks come roughly in that order.
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
    await asyncio.gather(*(store.predictions.create(row) for row in new))
    slots = SubmitBudget(
        provider=provider,
        now=now,
        most=count,
        max_in_flight=None,
        per_minute=None,
        hold_until=now + 3600,
        timeout=3600,
    )
    await store.predictions.begin_submits(slots)
    steps = [
        Progress(id=ours, cause="accepted", due_at=now + 3600, provider_id=theirs)
        for ours, theirs in ids
    ]
    await asyncio.gather(*(store.predictions.progress(step) for step in steps))
    await store.stop()
    return ids


def callback(provider: str, ours: str, theirs: str, url: str | None = None) -> bytes:
    """Return the request of an authentic callback for a success of one prediction."""
    path = f"/webhooks/{provider}/{TOKENS.callback(provider, ours)}"
    url = url or f"https://cdn.example/{theirs}.png"
    secret = TOKENS.webhook_secrets(ours)[0].decode()
    told = prediction(provider=provider, id=theirs, secret=secret)
    body = EMULATED.callback(told, Ending(output=({"url": url, "content_type": "image/png"},)))
    headers = EMULATED.headers(told, body)
    del headers["content-type"]  # `post` adds it
    return post(path, body, headers)


@contextmanager
def jwks() -> Iterator[str]:
    """Serve the key set of the fal callbacks' signatures; yield its URL."""
    with serve(create_emulator(BY_HAND)) as port:
        yield f"http://127.0.0.1:{port}/fal/.well-known/jwks.json"


AS_INSTALLED = {"PYTHONDONTWRITEBYTECODE": "", "SSL_CERT_FILE": "", "SSL_CERT_DIR": ""}
"""Lets a start use compiled modules and certifi's authorities, as most installations do."""


class Server:
    """A process that serves a port, or a worker, with port 0."""

    def __init__(self, command: list[str], port: int, home: Path, env: dict[str, str]) -> None:
        self.port = port
        self._log = (home / "server.log").open("ab")
        self._process = subprocess.Popen(
            command,
            cwd=home,
            env={**os.environ, **AS_INSTALLED, **env},
            stdout=self._log,
            stderr=self._log,
        )
        self.pid = self._process.pid

    def wait(self) -> None:
        """Wait until the port accepts connections; a worker has none."""
        if not self.port:
            return
        ends = time.monotonic() + 20
        while time.monotonic() < ends and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.002)
        raise RuntimeError("the server did not start; see server.log")

    def resident(self) -> int:
        """Return the resident memory in bytes."""
        found = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(self.pid)], capture_output=True, check=True, text=True
        )
        return int(found.stdout) * 1024

    def peak(self) -> int:
        """Return the peak of the resident memory in bytes, from Linux's /proc."""
        [line] = (
            line
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines()
            if line.startswith("VmHWM:")
        )
        return int(line.split()[1]) * 1024

    def cpu(self) -> float:
        """Return the CPU seconds of all threads of the process, from Linux's /proc."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

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


INSTANT = """import asyncio, itertools, json

numbers = itertools.count()


class Provider(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.data = transport, b""

    def data_received(self, data):
        self.data += data
        head, blank, body = self.data.partition(b"\\r\\n\\r\\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\\r\\n")[0] or 0)
        if blank and len(body) >= length:
            self.data = b""
            said = {"request_id": f"req-{next(numbers)}", "status": "IN_PROGRESS"}
            said = json.dumps(said).encode()
            head = f"HTTP/1.1 200 OK\\r\\nContent-Length: {len(said)}\\r\\n\\r\\n"
            self.transport.write(head.encode() + said)


async def main():
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", PORT)
    await server.serve_forever()


asyncio.run(main())
"""
"""A provider that accepts every submit at once, and never finishes one."""


def instant_provider(home: Path) -> Server:
    port = free_port()
    script = home / "instant.py"
    script.write_text(INSTANT.replace("PORT", str(port)))
    return Server([sys.executable, str(script)], port, home, {})


def submit(number: int) -> bytes:
    """Return the request of one submit."""
    body = msgspec.json.encode(
        {"provider": "fal", "model": MODELS["fal"], "input": {"prompt": f"lighthouse {number}"}}
    )
    return post("/v1/predictions", body, {"Authorization": "Bearer bench"})


def empty_route(home: Path) -> Server:
    port = free_port()
    script = home / "empty.py"
    script.write_text(EMPTY.replace("PORT", str(port)))
    return Server([sys.executable, str(script)], port, home, {})


FILES = """import asyncio, os

BODY = os.urandom(5_000_000)
HEAD = b"HTTP/1.1 200 OK\\r\\nContent-Type: video/mp4\\r\\nContent-Length: 5000000\\r\\n\\r\\n"


class Files(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.writelines([HEAD, BODY])


async def main():
    server = await asyncio.get_running_loop().create_server(Files, "127.0.0.1", PORT)
    await server.serve_forever()


asyncio.run(main())
"""
"""A server of results of 5 MB."""
ALONE = """import asyncio, resource, sys, time
import httpx

url, count = sys.argv[1], int(sys.argv[2])


async def main():
    numbers = iter(range(count))
    async with httpx.AsyncClient(trust_env=False) as client:

        async def lane():
            for number in numbers:
                with open(f"alone-{number}", "wb") as file:
                    async with client.stream("GET", url) as answer:
                        async for piece in answer.aiter_bytes():
                            file.write(piece)

        await asyncio.gather(*(lane() for _ in range(16)))


began = time.perf_counter()
asyncio.run(main())
used = resource.getrusage(resource.RUSAGE_SELF)
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""
SAVING = {"RECEIVER_ALLOW_PRIVATE_FETCH": "1", "SAVE_URL": "results"}


def files(home: Path) -> Server:
    port = free_port()
    script = home / "files.py"
    script.write_text(FILES.replace("PORT", str(port)))
    return Server([sys.executable, str(script)], port, home, {})


PGQUEUER = """import asyncio, resource, sys, time
import asyncpg
from pgqueuer.db import AsyncpgPoolDriver
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode

url, count, records = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True"
RECORD = "INSERT INTO done (delivery, ended_at) VALUES ($1, now())"


def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


async def main():
    async with asyncpg.create_pool(url, server_settings={"search_path": "public"}) as pool:
        manager = QueueManager(Queries(AsyncpgPoolDriver(pool)))
        await manager.queries.install()
        await pool.execute("CREATE TABLE done (delivery TEXT PRIMARY KEY, ended_at TIMESTAMPTZ)")

        @manager.entrypoint("empty", concurrency_limit=64)
        async def empty(job):
            if records:
                await pool.execute(RECORD, job.payload.decode())

        names = [f"dlv_{number}".encode() for number in range(count)]
        await manager.queries.enqueue(["empty"] * count, names, [0] * count)
        began, before, _ = used()
        await manager.run(batch_size=64, mode=QueueExecutionMode.drain)
        ended, after, memory = used()
        assert await pool.fetchval("SELECT count(*) FROM pgqueuer") == 0
        assert await pool.fetchval("SELECT count(*) FROM done") == (count if records else 0)
        print(ended - began, after - before, memory)


asyncio.run(main())
"""


def httpx_alone(home: Path, url: str, count: int) -> tuple[float, float, int]:
    """Fetch results into files; return the seconds, the CPU seconds, and the peak memory."""
    return _alone(home, ALONE, url, str(count))


def pgqueuer_alone(home: Path, url: str, count: int, *, records: bool) -> tuple[float, float, int]:
    """Run empty jobs with PgQueuer's own worker; with `records`, each inserts a row at its end."""
    return _alone(home, PGQUEUER, url, str(count), str(records))


def _alone(home: Path, text: str, *arguments: str) -> tuple[float, float, int]:
    script = home / "alone.py"
    script.write_text(text)
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, cwd=home, check=True, stdout=subprocess.PIPE, text=True)
    seconds, cpu, memory = done.stdout.split()
    return float(seconds), float(cpu), int(memory)


@contextmanager
def submitting(home: Path, books: Books, jwks_url: str, limits: dict[str, str]) -> Iterator[Server]:
    """Run a receiver with the instant provider; it expects callbacks, and so polls late."""
    with running(instant_provider(home)) as provider:
        env = {
            "FAL_KEY": "bench",
            "FAL_QUEUE_URL": f"http://127.0.0.1:{provider.port}",
            "RECEIVER_PUBLIC_URL": "https://bench.example",
            **limits,
        }
        with running(receiver(home, books, jwks_url, **env)) as server:
            yield server


def receiver(home: Path, books: Books, jwks_url: str, *arguments: str, **env: str) -> Server:
    """Start the real server, as a user would; `arguments` are handlers and options."""
    port = free_port()
    command = [sys.executable, "-m", "receiver", "serve", *arguments, "--port", str(port)]
    return Server(command, port, home, {**_env(home, books, jwks_url), **env})


def worker(home: Path, books: Books, jwks_url: str) -> Server:
    command = [sys.executable, "-m", "receiver", "worker", "empty_handler.py"]
    return Server(command, 0, home, _env(home, books, jwks_url))


def _env(home: Path, books: Books, jwks_url: str) -> dict[str, str]:
    (home / "empty_handler.py").write_text(HANDLER)
    return {
        "RECEIVER_SECRET_KEY": SECRET,
        "RECEIVER_API_KEYS": "bench",
        "RECEIVER_DATABASE_URL": books.url,
        "FAL_JWKS_URL": jwks_url,
        "PYTHONPATH": str(Path.cwd()),
    }
