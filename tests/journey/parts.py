"""Helpers of the journey tests: real processes on loopback, and checks of all records."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver.deliveries.heartbeat import TIMING
from receiver.emulator import settings_for
from receiver.store.leases import LEASE
from tests import loopback
from tests.emulator.serving import serve
from tests.forked import Forked
from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.postgres import Database

T = TypeVar("T")

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
API_KEY = "the-key-of-the-journey"
SECRETS = (
    API_KEY,
    "journey-secret-key-of-32-characters-or-so",
    "oxen-k-1",
    "each-k-1",
    "fal-k-1",
    "the-password-of-the-journey",
)
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
ACCEPTS: Final = ("--no-dispatch",)


def eventually(
    read: Callable[[], T],
    condition: Callable[[T], Any] = bool,
    patience: float = PATIENCE,
    pause: float = 0.05,
) -> T:
    deadline = time.monotonic() + patience
    while not condition(value := read()):
        assert time.monotonic() < deadline, value
        time.sleep(pause)
    return value


@dataclass
class Process:
    """One process, which is restarted on the same port and with the same log."""

    arguments: list[str]
    log: Path
    env: dict[str, str] = field(default_factory=dict)
    port: int | None = None
    """The port of a server; None for a worker, whose log shows that it has started."""
    running: Forked | None = None
    killed: set[str] = field(default_factory=set)
    """The process ids that got SIGKILL."""
    _said: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> str:
        assert self.running is not None
        return str(self.running.pid)

    @property
    def is_alive(self) -> bool:
        return self.running is not None and self.running.poll() is None

    def start(self) -> None:
        self.launch()
        self.wait_until_up()

    def launch(self) -> None:
        self._said = self.log.stat().st_size if self.log.exists() else 0
        env = {**os.environ, **self.env}
        self.running = Forked(self.arguments, ROOT, env, self.log, self.log)

    def wait_until_up(self) -> None:
        eventually(self._is_up, patience=PATIENCE)

    def _is_up(self) -> bool:
        assert self.is_alive, self.log.read_text()
        if self.port is None:
            return b'"receiver.started"' in self.log.read_bytes()[self._said :]
        # A server listens before it has started, so only an answer shows that it is up.
        with suppress(httpx.HTTPError):
            loopback.get(f"{self.url}/healthz", timeout=PATIENCE)
            return True
        return False

    def send(self, number: signal.Signals) -> None:
        if self.is_alive:
            assert self.running is not None
            if number is signal.SIGKILL:
                self.killed.add(self.pid)
            self.running.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        if self.running is not None:
            self.running.wait(PATIENCE)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of its log."""
        text = self.log.read_text() if self.log.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """Return the lines of its log with this event and these fields."""
        wanted = {"event": event, **fields}
        return [line for line in self.lines() if wanted.items() <= line.items()]


class CallbackProxy:
    """A proxy that distributes callbacks over the servers.

    If a server does not answer, the next one is tried. `kills_wanted` servers are killed, each as
    soon as it has answered a 2xx.
    """

    def __init__(self, servers: list[Process]) -> None:
        self.servers = servers
        self.kills_wanted = 0
        self.killed_after: list[str] = []
        self.answers: list[tuple[str, int]] = []
        """(prediction id, status that a server answered) of each callback."""
        self._turn = itertools.count()
        route = Route("/{path:path}", self._pass, methods=["POST"])
        self.app = Starlette(routes=[route], lifespan=self._open)

    @asynccontextmanager
    async def _open(self, _: Starlette) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=PATIENCE, verify=False) as self._http:
            yield

    async def _pass(self, request: Request) -> Response:
        headers = [pair for pair in request.headers.raw if pair[0] != b"host"]
        prediction = request.url.path.rpartition("/")[2].partition(".")[0]
        first = next(self._turn)
        servers = list(self.servers)
        for number in range(len(servers)):
            server = servers[(first + number) % len(servers)]
            url = server.url + request.url.path
            try:
                answer = await self._http.post(url, content=await request.body(), headers=headers)
            except httpx.HTTPError:
                continue
            self.answers.append((prediction, answer.status_code))
            if answer.is_success and self.kills_wanted:
                self.kills_wanted -= 1
                server.send(signal.SIGKILL)
                self.killed_after.append(prediction)
            return Response(answer.content, answer.status_code)
        return Response(status_code=502)

    def statuses(self, prediction: str) -> list[int]:
        return [status for whose, status in self.answers if whose == prediction]


@dataclass
class World:
    """The emulator, the receiver's processes, the proxy between them, and an API client."""

    folder: Path
    emulator: Process
    env: dict[str, str]
    database: Database | None
    """None: SQLite, a file in the folder."""
    http: httpx.Client
    statuses: Counter[int]
    """Counts of the responses to the API client, by status."""
    servers: list[Process] = field(default_factory=list)
    workers: list[Process] = field(default_factory=list)
    retired: list[Process] = field(default_factory=list)
    proxy: CallbackProxy = field(init=False)
    _turn: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.proxy = CallbackProxy(self.servers)

    @property
    def providers(self) -> str:
        return f"{self.emulator.url}/_emulator"

    @property
    def fleet(self) -> list[Process]:
        return [*self.servers, *self.workers]

    @property
    def everyone(self) -> list[Process]:
        """All processes that are or were in the fleet."""
        return [*self.fleet, *self.retired]

    def new_server(self, *options: str) -> Process:
        port = free_port()
        arguments = ["serve", str(HERE / "witnesses.py"), "--port", str(port), *options]
        return self._new(arguments, port)

    def new_worker(self) -> Process:
        return self._new(["worker", str(HERE / "witnesses.py")], None)

    def _new(self, arguments: list[str], port: int | None) -> Process:
        log = self.folder / f"{arguments[0]}-{next(self._turn)}.log"
        return Process(["-m", "receiver", *arguments], log, dict(self.env), port)

    def end(self) -> None:
        for process in (*self.everyone, self.emulator):
            process.kill()

    def revive(self) -> None:
        """Start all processes of the fleet that are not running, in parallel."""
        start_all([process for process in self.fleet if not process.is_alive])

    def rows(self, sql: str) -> list[Any]:
        if self.database is not None:
            return self.database.rows(sql)
        with closing(sqlite3.connect(f"file:{self.folder}/receiver.db?mode=ro", uri=True)) as cx:
            return cx.execute(sql).fetchall()

    def notes(self, book: str) -> list[list[str]]:
        file = self.folder / book
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def release(self, *processes: Process) -> None:
        """Let the long handlers of these processes end."""
        for process in processes:
            (self.folder / f"release-{process.pid}").touch()

    def begun(self, prediction: Mapping[str, Any], process: Process) -> int:
        """Return how many long handlers this process has begun for a prediction."""
        notes = self.notes("begun")
        return sum((one[0], one[-1]) == (prediction["id"], process.pid) for one in notes)

    def break_with(self, *faults: Mapping[str, Any]) -> None:
        httpx.put(self.providers + "/faults", json=faults, verify=False).raise_for_status()

    def ledger(self) -> dict[str, Any]:
        return dict(loopback.get(self.providers + "/ledger").json())

    def streams(self) -> int:
        """Return the number of connections to Oxen's stream."""
        return int(loopback.get(f"{self.emulator.url}/_journey/streams").text)

    def submit(
        self,
        provider: str,
        prompt: str,
        key: str,
        kind: str = "journey",
        server: Process | None = None,
        prefer: str = "",
    ) -> dict[str, Any]:
        """Submit with an idempotency key, and retry at any server until it is accepted."""
        body = {
            "provider": provider,
            "model": MODELS[provider],
            "input": {"prompt": prompt},
            "metadata": {"kind": kind},
        }
        headers = {"idempotency-key": key, "prefer": prefer}

        def answer() -> httpx.Response | httpx.HTTPError:
            asked = server or self.servers[next(self._turn) % len(self.servers)]
            try:
                return self.http.post(f"{asked.url}/v1/predictions", json=body, headers=headers)
            except httpx.HTTPError as error:
                return error

        # Slow enough that twenty retrying clients do not delay the start of the servers.
        found = eventually(
            answer, lambda got: getattr(got, "status_code", 0) in {200, 202}, 2 * PATIENCE, 0.25
        )
        assert isinstance(found, httpx.Response)
        return dict(found.json())

    def read(self, prediction: Mapping[str, Any], prefer: str = "") -> dict[str, Any]:
        url = f"{self.servers[0].url}/v1/predictions/{prediction['id']}"
        return dict(self.http.get(url, headers={"prefer": prefer}).raise_for_status().json())

    def ended(self, prediction: Mapping[str, Any]) -> dict[str, Any]:
        """Wait until the first server reports a prediction's end."""
        return eventually(lambda: self.read(prediction), lambda found: found["completed_at"])

    def settle(self, patience: float = PATIENCE) -> None:
        """Wait until every prediction has ended, and no delivery is pending or running."""
        living = "SELECT id, status FROM predictions WHERE due_at IS NOT NULL"
        eventually(lambda: self.rows(living), lambda rows: not rows, patience)
        open_ = "SELECT id, state, owner FROM deliveries WHERE state IN ('pending', 'running')"
        eventually(lambda: self.rows(open_), lambda rows: not rows, patience)


def let_leases_end(world: World, *pids: str) -> None:
    """End the leases of killed processes now, instead of waiting half a minute."""
    if world.database is None:
        return
    theirs = f"owner ~ ':({'|'.join(pids)}):[^:]*$'"
    world.database.execute(
        "SET search_path = receiver",
        f"UPDATE leases SET until = until - {LEASE} WHERE {theirs}",
        f"WITH held AS (UPDATE deliveries SET lease_until = lease_until - {TIMING.lease}"
        f" WHERE state = 'running' AND {theirs} RETURNING id) "
        f"UPDATE pgqueuer SET heartbeat = heartbeat - interval '{TIMING.lease} s'"
        " WHERE status = 'picked' AND dedupe_key IN (SELECT id FROM held)",
    )


def start_all(processes: Sequence[Process]) -> None:
    for process in processes:
        process.launch()
    for process in processes:
        process.wait_until_up()


def with_password(database: Database) -> str:
    """Return the database's URL with a password, which a server ignores if it trusts clients."""
    scheme, _, rest = database.url.partition("://")
    login, _, place = rest.rpartition("@")
    user, _, password = login.partition(":")
    return f"{scheme}://{user}:{password or SECRETS[-1]}@{place}"


@contextmanager
def living(
    folder: Path,
    database: Database | None = None,
    *,
    servers: Sequence[Sequence[str]] = ((),),
    workers: int = 0,
    more: Mapping[str, str] | None = None,
    emulated: Mapping[str, Any] | None = None,
) -> Iterator[World]:
    """Run a world: a server for each list of options in `servers`, workers, and an emulator.

    `more` are settings of the receiver, `emulated` options of the emulator.
    """
    port = free_port()
    emulator = Process([str(HERE / "emulating.py"), str(port)], folder / "emulator.log", port=port)
    emulator.env["JOURNEY_OPTIONS"] = json.dumps(emulated or {})
    env = {
        **settings_for(emulator.url),
        "RECEIVER_SECRET_KEY": SECRETS[1],
        "RECEIVER_API_KEYS": API_KEY,
        "RECEIVER_DATABASE_URL": f"sqlite:///{folder}/receiver.db",
        "RECEIVER_POLL_AFTER": "0.5",
        "RECEIVER_PREDICTION_TIMEOUT": "12",
        "RECEIVER_RETRY_BASE": "0.1",
        "RECEIVER_RETRY_CAP": "0.5",
        "OXEN_API_KEY": SECRETS[2],
        "EACHLABS_API_KEY": SECRETS[3],
        "FAL_KEY": SECRETS[4],
        "EACHLABS_MAX_IN_FLIGHT": "none",
        "EACHLABS_REQUESTS_PER_MINUTE": "none",
        "JOURNEY_FOLDER": str(folder),
        **(more or {}),
    }
    if database is not None:
        env["RECEIVER_DATABASE_URL"] = with_password(database)
    statuses: Counter[int] = Counter()
    http = httpx.Client(
        verify=loopback.TLS,
        headers={"authorization": f"Bearer {API_KEY}"},
        timeout=2 * PATIENCE,
        limits=httpx.Limits(max_connections=80),
        event_hooks={"response": [lambda answer: statuses.update([answer.status_code])]},
    )
    world = World(folder, emulator, env, database, http, statuses)
    with ExitStack() as stack:
        stack.enter_context(http)
        env["RECEIVER_PUBLIC_URL"] = (
            f"http://127.0.0.1:{stack.enter_context(serve(world.proxy.app))}"
        )
        world.servers += [world.new_server(*given) for given in servers]
        world.workers += [world.new_worker() for _ in range(workers)]
        stack.callback(world.end)
        emulator.start()
        start_all(world.fleet)
        yield world


def prompts() -> list[tuple[str, str]]:
    """Return 60 pairs (provider, prompt); a few prompts cause a refusal or a failure."""
    words = ["", "[fail]", "[refuse]", "[fast]", "again", "[moderated]", "", "", "", ""]
    order = ["eachlabs", "fal", "oxen"]
    return [
        (order[number // 10 % 3], f"picture {number} {words[number // 3 % 10]}".strip())
        for number in range(60)
    ]


def some_of(processes: Sequence[Process], chance: random.Random) -> list[Process]:
    """Return one of the processes, at random; none if there are none."""
    return [chance.choice(processes)] if processes else []


# --- checks of all records ---


def check_books(world: World, submits: int) -> None:
    """Compare the database, the emulator's ledger, the handlers' notes and the logs."""
    check_bills(world, submits)
    check_events(world, submits)
    check_evidence(world)
    check_handlers(world, submits)
    check_logs(world)


def check_bills(world: World, submits: int) -> None:
    """Check that each accepted prediction has one bill, a refused one none, and none has two."""
    ledger = world.ledger()
    billed = Counter((row["provider"], row["prompt"]) for row in ledger["predictions"])
    ids = {(row["provider"], row["id"]): row["prompt"] for row in ledger["predictions"]}
    assert ledger["violations"] == []
    assert not [prompt for prompt, bills in billed.items() if bills > 1]
    rows = [
        (provider, json.loads(given)["prompt"], *rest)
        for provider, given, *rest in world.rows(
            "SELECT provider, input, provider_id, status, error_code FROM predictions"
        )
    ]
    assert len(rows) == submits
    for provider, prompt, provider_id, status, code in rows:
        if provider_id is not None:
            assert ids[provider, provider_id] == prompt
            assert billed[provider, prompt] == 1
        else:
            assert status == "failed"
            assert code in {"rejected", "unconfirmed", "expired"}
            assert billed[provider, prompt] <= (code == "unconfirmed")
    assert {prompt for _, prompt in billed} <= {prompt for _, prompt, *_ in rows}


def check_events(world: World, submits: int) -> None:
    """Check that each prediction has exactly one event, with the prediction's status."""
    rows = world.rows(
        "SELECT p.status, count(e.id), max(e.type) FROM predictions p"
        " LEFT JOIN events e ON e.prediction_id = p.id GROUP BY p.id"
    )
    assert len(rows) == submits
    assert all((count, kind) == (1, f"prediction.{status}") for status, count, kind in rows)
    assert Counter(status for status, *_ in rows)["succeeded"] > 3
    verdicts = dict(world.rows("SELECT verdict, count(*) FROM callbacks GROUP BY verdict"))
    assert verdicts["accepted"] <= submits


def check_evidence(world: World) -> None:
    """Check that every callback answered with 2xx is recorded, and its prediction has ended."""
    found = world.rows(
        "SELECT prediction_id, sum(1 + repeats) FROM callbacks WHERE channel = 'webhook'"
        " GROUP BY prediction_id"
    )
    recorded = {prediction: int(times) for prediction, times in found}
    promised = Counter(whose for whose, status in world.proxy.answers if 200 <= status < 300)
    assert promised
    short = {whose: n for whose, n in promised.items() if recorded.get(whose, 0) < n}
    assert not short
    ends = {row[0] for row in world.rows("SELECT id FROM predictions WHERE due_at IS NULL")}
    assert promised.keys() <= ends


def check_handlers(world: World, submits: int) -> None:
    deliveries = world.rows("SELECT id, event_id, handler, state FROM deliveries")
    assert len(deliveries) == 2 * submits
    assert {state for *_, state in deliveries} == {"done"}
    done = "SELECT delivery_id, count(*) FROM attempts WHERE result = 'done' GROUP BY delivery_id"
    assert dict(world.rows(done)) == {delivery: 1 for delivery, *_ in deliveries}
    seen = {(event, handler) for event, handler, *_ in world.notes("seen")}
    assert seen == {(event, handler) for _, event, handler, _ in deliveries}
    runs: dict[tuple[str, str], list[str]] = {}
    for delivery, step, pid in world.notes("steps"):
        runs.setdefault((delivery, step), []).append(pid)
    assert len(runs) == submits * 3
    # A step is repeated only by another process, after the one that ran it was killed.
    killed = set().union(*(process.killed for process in world.everyone))
    assert not [pids for pids in runs.values() if len(set(pids)) < len(pids)]
    assert not [pids for pids in runs.values() if not set(pids[:-1]) <= killed]


def check_logs(world: World) -> None:
    """Check that no log has an internal error or a secret, and no answer a 5xx but 503."""
    tokens = [text for (text,) in world.rows("SELECT id FROM predictions")]
    for process in world.everyone:
        log = process.log.read_text()
        assert not [line for line in log.splitlines() if not line.startswith("{")], process.log
        lines = process.lines()
        assert not [line for line in lines if line["event"] in {"task.failed", "request.failed"}]
        shown = [line for line in lines if "exception" in line or "Traceback" in str(line)]
        assert not [line for line in shown if line["event"] != "handler.attempt"], process.log
        assert not [secret for secret in SECRETS if secret in log], process.log
        assert not [token for token in tokens if f"{token}." in log], process.log
    answered = {*world.statuses, *(status for _, status in world.proxy.answers)}
    assert not {status for status in answered if status >= 500} - {503}
