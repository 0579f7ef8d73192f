"""Real processes on loopback, with every fault there is, killed again and again."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.emulator import settings_for
from tests.emulator.serving import serve

T = TypeVar("T")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE = 30.0
API_KEY = "the-key-of-the-journey"
SECRETS = (API_KEY, "journey-secret-key-of-32-characters-or-so", "oxen-k-1", "each-k-1", "fal-k-1")
MODELS = {"oxen": "nano-banana", "eachlabs": "nano-banana", "fal": "fal-ai/nano-banana"}
FAULTS = (
    {"fault": "lose_callback", "probability": 0.15},
    {"fault": "repeat_callback", "probability": 0.3},
    {"fault": "delay_callback", "probability": 0.2, "seconds": 1},
    {"fault": "reorder_callbacks", "probability": 0.2, "seconds": 0.5},
    {"fault": "early_callback", "probability": 0.15, "seconds": 0.5},
    {"fault": "refuse_submit", "probability": 0.15, "retry_after": 0},
    {"fault": "refuse_submit", "probability": 0.05, "status": 429, "retry_after": 0},
    {"fault": "drop_submit", "probability": 0.05},
    {"fault": "stall_submit", "probability": 0.1, "seconds": 0.2},
    {"fault": "break_poll", "probability": 0.2},
    {"fault": "break_poll", "probability": 0.1, "answer": "garbage"},
    {"fault": "break_poll", "probability": 0.1, "answer": "missing"},
    {"fault": "null_payload", "probability": 0.1},
    {"fault": "wrong_signature", "probability": 0.05},
    {"fault": "stale_timestamp", "probability": 0.05},
    {"fault": "large_output", "probability": 0.05},
)


def eventually(read: Callable[[], T], condition: Callable[[T], Any] = bool) -> T:
    deadline = time.monotonic() + PATIENCE
    while not condition(value := read()):
        assert time.monotonic() < deadline, value
        time.sleep(0.02)
    return value


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Process:
    """One process of ours, started again and again on the same port and with the same log."""

    arguments: list[str]
    port: int
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            env = {**os.environ, **self.env}
            self.running = subprocess.Popen(
                [sys.executable, *self.arguments], cwd=ROOT, env=env, stdout=log, stderr=log
            )
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self.running is not None
        assert self.running.poll() is None, self.log.read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def send(self, number: signal.Signals) -> None:
        if self.running is not None and self.running.poll() is None:
            self.running.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.running is not None:
            self.running.wait(PATIENCE)


class Toll:
    """Stands where callbacks pass: it can kill the receiver the moment a 2xx comes back."""

    def __init__(self, receiver: Process) -> None:
        self._receiver = receiver
        self.kills_wanted = 0
        self.killed_after: list[str] = []
        route = Route("/{path:path}", self._pass, methods=["POST"])
        self.app = Starlette(routes=[route], lifespan=self._open)

    @asynccontextmanager
    async def _open(self, _: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=5) as self._http:
            yield

    async def _pass(self, request: Request) -> Response:
        headers = [pair for pair in request.headers.raw if pair[0] != b"host"]
        url = f"http://127.0.0.1:{self._receiver.port}{request.url.path}"
        try:
            answer = await self._http.post(url, content=await request.body(), headers=headers)
        except httpx.HTTPError:
            return Response(status_code=502)
        if answer.is_success and self.kills_wanted:
            self.kills_wanted -= 1
            self._receiver.send(signal.SIGKILL)
            self.killed_after.append(request.url.path.rpartition("/")[2].partition(".")[0])
        return Response(answer.content, answer.status_code)


@dataclass
class World:
    """The emulator, the receiver, the toll between them, and the caller."""

    folder: Path
    emulator: Process
    receiver: Process
    toll: Toll
    http: httpx.Client

    @property
    def providers(self) -> str:
        return f"http://127.0.0.1:{self.emulator.port}/_emulator"

    def rows(self, sql: str) -> list[Any]:
        with closing(sqlite3.connect(f"file:{self.folder}/receiver.db?mode=ro", uri=True)) as cx:
            return cx.execute(sql).fetchall()

    def notes(self, book: str) -> list[list[str]]:
        file = self.folder / book
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def submit(self, provider: str, prompt: str, key: str, kind: str = "journey") -> dict[str, Any]:
        """Submit as a good client does: with a key, until there is an answer."""
        body = {
            "provider": provider,
            "model": MODELS[provider],
            "input": {"prompt": prompt},
            "metadata": {"kind": kind},
        }
        headers = {"idempotency-key": key}

        def answer() -> httpx.Response | httpx.HTTPError:
            try:
                return self.http.post("/v1/predictions", json=body, headers=headers)
            except httpx.HTTPError as error:
                return error

        found = eventually(answer, lambda got: getattr(got, "status_code", 0) in {200, 202})
        assert isinstance(found, httpx.Response)
        return dict(found.json())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    emulator_port, receiver_port = free_port(), free_port()
    emulator = Process(
        [str(HERE / "emulating.py"), str(emulator_port)], emulator_port, tmp_path / "emulator.log"
    )
    receiver = Process(
        ["-m", "receiver", "serve", str(HERE / "witnesses.py"), "--port", str(receiver_port)],
        receiver_port,
        tmp_path / "receiver.log",
    )
    toll = Toll(receiver)
    with ExitStack() as stack:
        toll_port = stack.enter_context(serve(toll.app))
        receiver.env = {
            **settings_for(f"http://127.0.0.1:{emulator_port}"),
            "RECEIVER_SECRET_KEY": SECRETS[1],
            "RECEIVER_API_KEYS": API_KEY,
            "RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{toll_port}",
            "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path}/receiver.db",
            "RECEIVER_POLL_AFTER": "0.5",
            "RECEIVER_PREDICTION_TIMEOUT": "12",
            "RECEIVER_RETRY_BASE": "0.1",
            "RECEIVER_RETRY_CAP": "0.5",
            "OXEN_API_KEY": SECRETS[2],
            "EACHLABS_API_KEY": SECRETS[3],
            "FAL_KEY": SECRETS[4],
            "EACHLABS_MAX_IN_FLIGHT": "none",
            "EACHLABS_REQUESTS_PER_MINUTE": "none",
            "JOURNEY_FOLDER": str(tmp_path),
        }
        for process in (emulator, receiver):
            stack.callback(process.kill)
            process.start()
        http = stack.enter_context(
            httpx.Client(
                base_url=f"http://127.0.0.1:{receiver_port}",
                headers={"authorization": f"Bearer {API_KEY}"},
                timeout=40,
                limits=httpx.Limits(max_connections=80),
            )
        )
        yield World(tmp_path, emulator, receiver, toll, http)


def prompts() -> list[tuple[str, str]]:
    """Give 60 submits over all providers; a few are refused or fail by their own words."""
    words = ["", "[fail]", "[refuse]", "[fast]", "again", "[moderated]", "", "", "", ""]
    order = ["eachlabs", "fal", "oxen"]
    return [
        (order[number // 10 % 3], f"picture {number} {words[number // 3 % 10]}".strip())
        for number in range(60)
    ]


def test_the_books_balance_whatever_dies(world: World) -> None:
    httpx.put(world.providers + "/faults", json=FAULTS).raise_for_status()
    chance = random.Random(5)
    waves = [prompts()[first::3] for first in range(3)]
    submits = []
    with ThreadPoolExecutor(20) as callers:
        for wave in waves:
            world.toll.kills_wanted = 1
            submits += [callers.submit(world.submit, *one, key=one[1]) for one in wave]
            eventually(lambda: world.toll.kills_wanted == 0)
            world.receiver.kill()
            world.receiver.start()
            time.sleep(chance.uniform(0.05, 0.4))  # the moment of the next kill is the point
            world.receiver.kill()
            faults = [*FAULTS, {"fault": "cut_stream"}]
            httpx.put(world.providers + "/faults", json=faults).raise_for_status()
            world.receiver.start()
        predictions = [submit.result(PATIENCE) for submit in submits]

    living = "SELECT id FROM predictions WHERE due_at IS NOT NULL"
    eventually(lambda: world.rows(living), lambda rows: not rows)
    open_ = "SELECT id FROM deliveries WHERE state IN ('pending', 'running')"
    eventually(lambda: world.rows(open_), lambda rows: not rows)
    assert len({prediction["id"] for prediction in predictions}) == 60
    check_bills(world)
    check_events(world)
    check_handlers(world)
    check_log(world)


def check_bills(world: World) -> None:
    """One bill for each that was accepted, none for what was refused; never two."""
    ledger = httpx.get(world.providers + "/ledger").json()
    billed = Counter((row["provider"], row["prompt"]) for row in ledger["predictions"])
    ids = {(row["provider"], row["id"]): row["prompt"] for row in ledger["predictions"]}
    assert ledger["violations"] == []
    assert not [prompt for prompt, bills in billed.items() if bills > 1]
    rows = world.rows(
        "SELECT provider, json_extract(input, '$.prompt'), provider_id, status, error_code"
        " FROM predictions"
    )
    assert len(rows) == 60
    for provider, prompt, provider_id, status, code in rows:
        if provider_id is not None:
            assert ids[provider, provider_id] == prompt
            assert billed[provider, prompt] == 1
        else:
            assert status == "failed"
            assert code in {"rejected", "unconfirmed", "expired"}
            assert billed[provider, prompt] <= (code == "unconfirmed")
    assert {prompt for _, prompt in billed} <= {prompt for _, prompt, *_ in rows}


def check_events(world: World) -> None:
    """Exactly one event for each, which says what the prediction says."""
    rows = world.rows(
        "SELECT p.status, count(e.id), max(e.type) FROM predictions p"
        " LEFT JOIN events e ON e.prediction_id = p.id GROUP BY p.id"
    )
    assert all((count, kind) == (1, f"prediction.{status}") for status, count, kind in rows)
    assert Counter(status for status, *_ in rows)["succeeded"] > 3
    for prediction_id in world.toll.killed_after:
        assert world.rows(
            f"SELECT status FROM predictions WHERE id = '{prediction_id}' AND due_at IS NULL"
        )
    verdicts = dict(world.rows("SELECT verdict, count(*) FROM callbacks GROUP BY verdict"))
    assert verdicts["accepted"] <= 60


def check_handlers(world: World) -> None:
    deliveries = world.rows("SELECT id, event_id, handler, state FROM deliveries")
    assert len(deliveries) == 120
    assert {state for *_, state in deliveries} == {"done"}
    seen = {(event, handler) for event, handler, *_ in world.notes("seen")}
    assert seen == {(event, handler) for _, event, handler, _ in deliveries}
    steps = Counter(tuple(words) for words in world.notes("steps"))
    # A step is repeated only by another process, after the one that ran it was killed over it.
    assert not [step for step, times in steps.items() if times > 1]
    repeated = Counter((delivery, step) for delivery, step, _ in steps)
    assert len(repeated) == 60 * 3


def check_log(world: World) -> None:
    log = world.receiver.log.read_text()

    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert not [line for line in lines if line["event"] in {"task.failed", "request.failed"}]
    assert not [line for line in log.splitlines() if not line.startswith("{")]
    tokens = [text for (text,) in world.rows("SELECT id FROM predictions")]
    assert not [secret for secret in SECRETS if secret in log]
    assert not [token for token in tokens if f"{token}." in log]


def test_sigterm_ends_all_within_seconds_and_loses_nothing(world: World) -> None:
    world.receiver.kill()
    world.receiver.env["HANG"] = "1"
    world.receiver.start()
    hanging = world.submit("fal", "to hang on", "hang-1", kind="hang")
    eventually(lambda: len(world.notes("hung")) == 2)
    never = world.submit("eachlabs", "[never]", "never-1")
    answers: list[httpx.Response] = []

    def wait() -> None:
        headers = {"prefer": "wait=60"}
        answers.append(world.http.get(f"/v1/predictions/{never['id']}", headers=headers))

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)  # nothing shows from outside that a request waits
    process = world.receiver.running
    assert process is not None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in {0, -signal.SIGTERM}
    waiting.join(1)
    assert [(a.status_code, a.json()["status"]) for a in answers] == [(200, "processing")]
    assert dict(world.rows("SELECT handler, state FROM deliveries")) == {
        "async-hang": "pending",
        "sync-hang": "pending",
    }

    del world.receiver.env["HANG"]
    world.receiver.start()
    sql = "SELECT handler, state FROM deliveries"
    done = {"async-hang": "done", "sync-hang": "done"}
    eventually(lambda: dict(world.rows(sql)), lambda found: found == done)
    assert world.http.get(f"/v1/predictions/{hanging['id']}").json()["status"] == "succeeded"
    assert world.http.get(f"/v1/predictions/{never['id']}").json()["status"] == "processing"
    assert world.rows("SELECT count(*), count(DISTINCT prediction_id) FROM events") == [(1, 1)]
