"""`receiver doctor` against real servers: it reports faults, shows no secret, writes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

import httpx
import msgspec
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from receiver import create_app
from receiver.cli.doctor import Finding, examine, worst
from receiver.cli.doctor.database import (
    LATEST,
    SKEWED,
    WRONG,
    DatabaseState,
    Server,
    check_backlog,
    check_clocks,
    judge,
)
from receiver.cli.doctor.environment import weakness
from receiver.emulator import create_emulator, settings_for
from receiver.predictions.tokens import Tokens
from receiver.providers import DECLARED
from receiver.settings import Caller, Settings
from receiver.store.schema import migrations
from tests.emulator.parts import write_certificate
from tests.emulator.serving import FAST, serve
from tests.forked import run_to_end
from tests.loopback import free_port
from tests.patience import PATIENCE
from tests.postgres import Database

pytestmark = pytest.mark.anyio

KEY: Final = "5d1c0b7e41f84f3a9e26b07dd8134a6f"
OTHER_KEY: Final = "e3a9c5f2870b4d61b8f2046a7c93d15e"
PROVIDER_KEY: Final = "good-key-of-providers"
API_KEY: Final = "k2Vd8sQx0ZrLw5Ty"
Env = dict[str, str]


@pytest.fixture
def env(tmp_path: Path) -> Env:
    """Return a valid environment with every optional feature off."""
    return {
        "RECEIVER_SECRET_KEY": KEY,
        "RECEIVER_API_KEYS": API_KEY,
        "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path / 'receiver.db'}",
        "RECEIVER_URL": f"http://127.0.0.1:{free_port()}",
    }


async def found(env: Mapping[str, str], name: str = "") -> list[tuple[str, str]]:
    """Run the doctor, and return the lines about one subject as (level, text)."""
    lines = await examine(env)
    return [(line.level, str(line)) for line in lines if line.name.startswith(name)]


def says(lines: list[tuple[str, str]], level: str, *words: str) -> bool:
    return any(at == level and all(word in text for word in words) for at, text in lines)


# --- settings and secrets ---


async def test_all_invalid_settings_are_reported_at_once(env: Env) -> None:
    env |= {"RECEIVER_POLL_AFTER": "soon", "RECEIVER_DEV": "perhaps", "FAL_MAX_IN_FLIGHT": "-1"}
    lines = await found(env | {"PORT": "eighty", "HOST": "a b"}, "settings")
    assert [level for level, _ in lines] == ["FAIL"] * 5
    assert says(lines, "FAIL", "PORT; must be a port to listen on")
    assert says(lines, "FAIL", "HOST; must be")
    assert says(lines, "FAIL", "RECEIVER_POLL_AFTER; must be a number of seconds")
    assert says(lines, "FAIL", "FAL_MAX_IN_FLIGHT")


async def test_invalid_secret_key_does_not_stop_the_other_checks(env: Env) -> None:
    lines = await found({**env, "RECEIVER_SECRET_KEY": "short"})
    assert says(lines, "FAIL", "settings: RECEIVER_SECRET_KEY", "32 characters")
    assert says(lines, "ok", "database:")
    assert says(lines, "warn", "receiver: not checked")


async def test_invalid_database_url_fails_and_no_database_is_checked(env: Env) -> None:
    lines = await found({**env, "RECEIVER_DATABASE_URL": "mysql://x"})
    assert says(lines, "FAIL", "settings: RECEIVER_DATABASE_URL")
    assert not [text for _, text in lines if text.startswith(("database", "backlog"))]


async def test_unknown_settings_are_reported_with_the_nearest_known_name(
    env: Env,
) -> None:
    env |= {
        "RECEIVER_PUBLC_URL": "x",
        "OXEN_APIKEY": "x",
        "EACHLABS_ZZZ": "x",
        "FAL_KEY_ID": "x",
        "RECEIVER_SERVICE_HOST": "10.0.0.1",
        "RECEIVER_SERVICE_PORT_HTTP": "80",
        "RECEIVER_PORT_8000_TCP_ADDR": "10.0.0.1",
        "RECEIVER_PORT": "tcp://10.0.0.1:8000",
        "PATH": "x",
    }
    lines = await found(env, "settings")
    assert len(lines) == 4
    assert says(lines, "warn", "RECEIVER_PUBLC_URL", "did you mean RECEIVER_PUBLIC_URL?")
    assert says(lines, "warn", "OXEN_APIKEY", "did you mean OXEN_API_KEY?")
    assert says(lines, "warn", "EACHLABS_ZZZ is not a setting; correct or remove it")
    assert says(lines, "warn", "FAL_KEY_ID", "<id>:<secret>")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a" * 32, "repeats"),
        ("abcd" * 8, "repeats"),
        ("changeme-9f8a7b6c5d4e3f2a1b0c9d8e", "placeholder"),
        ("your-secret-key-of-32-characters!", "placeholder"),
        (KEY, None),
        (API_KEY, None),
        ("90817263549281736455019283746510", None),
        ("pQ8-xV_2mZk7Lr0TgYw5Bd9HsNc3Fj6Ua1Ee", None),
    ],
)
def test_weak_secret_is_detected_with_its_reason(text: str, reason: str | None) -> None:
    said = weakness(text)
    assert (said is None) == (reason is None), said
    assert reason is None or (said is not None and reason in said)


def test_random_secret_is_not_weak() -> None:
    for seed in range(500):
        assert weakness(os.urandom(16).hex()) is None, seed


async def test_secrets_are_checked_for_strength_reuse_and_rotation(env: Env) -> None:
    env |= {
        "RECEIVER_SECRET_KEY": f"{KEY},{'ab' * 20},{KEY}",
        "RECEIVER_API_KEYS": f"short,{KEY}",
        "RECEIVER_API_KEY": "none-of-them",
        "RECEIVER_VIEWER_KEYS": "ops:peek",
        "CRON_SECRET": "brief",
    }
    lines = await found(env, "secrets")
    assert says(lines, "FAIL", "number 2 of RECEIVER_SECRET_KEY repeats a few characters")
    assert says(lines, "FAIL", "number 1 of RECEIVER_API_KEYS has fewer than 16")
    assert says(lines, "FAIL", "CRON_SECRET has fewer than 16")
    assert says(lines, "FAIL", "RECEIVER_VIEWER_KEYS has fewer than 16")
    assert says(lines, "FAIL", "RECEIVER_SECRET_KEY and RECEIVER_API_KEYS have the same value")
    assert says(lines, "warn", "a rotation is under way", "3 keys", "3600 s")
    assert says(lines, "warn", "RECEIVER_API_KEY, which commands use, is not one")


async def test_missing_api_key_is_a_warning(env: Env) -> None:
    lines = await found({**env, "RECEIVER_API_KEYS": ""}, "secrets")
    assert says(lines, "warn", "RECEIVER_API_KEYS is not set")
    assert not says(lines, "FAIL")


async def test_doctor_never_prints_a_secret(env: Env, tmp_path: Path) -> None:
    secrets = [KEY, OTHER_KEY, "k" * 20, "p4ss word", "fal-key-of-mine", "api-key-of-mine"]
    handlers = tmp_path / "loud.py"
    handlers.write_text(f"raise ValueError({OTHER_KEY!r})")
    password = quote(secrets[3])
    lines = await found(
        env
        | {
            "RECEIVER_SECRET_KEY": f"{KEY},{OTHER_KEY}",
            "RECEIVER_API_KEYS": f"{secrets[2]},{KEY}",
            "RECEIVER_API_KEY": secrets[5],
            "RECEIVER_DATABASE_URL": f"postgresql://me:{password}@127.0.0.1:{free_port()}/x",
            "FAL_KEY": secrets[4],
            "FAL_QUEUE_URL": f"http://127.0.0.1:{free_port()}",
            "FAL_JWKS_URL": f"http://127.0.0.1:{free_port()}",
            "RECEIVER_HANDLERS": str(handlers),
        }
    )
    text = "\n".join(line for _, line in lines)
    assert "loud.py:1" in text
    assert not [secret for secret in (*secrets, password) if secret in text]


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("SSL_CERT_FILE", "/nowhere.pem", "/nowhere.pem cannot be read"),
        ("SSL_CERT_DIR", "/nowhere", "openssl rehash"),
        ("SSLKEYLOGFILE", "/dev/null/log", "cannot be written"),
        ("ALL_PROXY", "socks4://127.0.0.1:1080", "socks4"),
        ("HTTPS_PROXY", "http://me:hush@[::1", "percent-encode"),
        ("PROMETHEUS_MULTIPROC_DIR", "/dev/null/x", "cannot be made"),
        ("RECEIVER_API_KEY", "hush\u00fc", "printable ASCII"),
        ("RECEIVER_URL", "receiver.example", "must begin with"),
    ],
)
async def test_invalid_library_and_client_settings_are_failures(
    env: Env, monkeypatch: pytest.MonkeyPatch, name: str, text: str, word: str
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setenv(name, text)  # as libraries see it
    lines = await found({**env, name: text})
    assert says(lines, "FAIL", f"settings: {name}", word)
    assert says(lines, "ok", "database:")
    assert not [line for _, line in lines if "hush" in line]


# --- the database ---


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time and the content of each file of a folder."""
    return {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir()
        if path.is_file()
    }


def make_database(env: Env, *statements: str) -> Path:
    """Create the database as a receiver does, then run these statements."""
    path = Path(env["RECEIVER_DATABASE_URL"].removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        for script in migrations("sqlite"):
            connection.executescript(script)
        connection.execute(f"PRAGMA user_version = {len(migrations('sqlite'))}")
        connection.execute("PRAGMA foreign_keys = OFF")
        for statement in statements:
            connection.execute(statement)
    return path


async def test_missing_sqlite_file_is_ok_and_is_not_created(env: Env, tmp_path: Path) -> None:
    env["RECEIVER_DATABASE_URL"] = f"sqlite:///{tmp_path}/a/b/receiver.db"
    [(level, text)] = await found(env, "database")
    assert level == "ok"
    assert "not there yet" in text
    assert state(tmp_path) == {}


async def test_valid_sqlite_file_is_ok_and_nothing_is_written(env: Env, tmp_path: Path) -> None:
    make_database(env)
    before = state(tmp_path)
    lines = await found(env)
    assert says(lines, "ok", "database:", f"schema {LATEST}")
    assert says(lines, "ok", "backlog: 0 deliveries pending, none dead")
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    ("statement", "level", "said"),
    [
        ("PRAGMA user_version = 99", "FAIL", "newer receiver (schema 99"),
        ("PRAGMA user_version = 0", "warn", f"this receiver needs {LATEST}"),
    ],
)
async def test_other_schema_version_of_sqlite_is_reported(
    env: Env, statement: str, level: str, said: str
) -> None:
    make_database(env, statement)
    assert says(await found(env, "database"), level, said)


async def test_corrupt_sqlite_file_is_reported(env: Env) -> None:
    path = make_database(env)
    path.write_text("not a database " * 1000)
    assert says(await found(env, "database"), "FAIL", "cannot be read", "not a database")


async def test_full_disk_and_read_only_folder_are_reported(
    env: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_database(env)
    full = SimpleNamespace(free=10 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    monkeypatch.setattr(os, "access", lambda *_: False)
    lines = await found(env, "database")
    assert says(lines, "FAIL", "only 10 MB are free")
    assert says(lines, "FAIL", "cannot be written")


def enqueue(number: int, handler: str, state: str, due_at: float | None) -> str:
    digits, ended = f"{number:032x}", "1.0" if state == "dead" else "NULL"
    return (
        "INSERT INTO deliveries (id, prediction_id, handler, state, due_at, created_at, ended_at) "
        f"VALUES ('dlv_{digits}', 'pred_{digits}', '{handler}', '{state}', "
        f"{'NULL' if due_at is None else due_at}, 1.0, {ended})"
    )


async def test_overdue_dead_paused_and_unhandled_deliveries_are_reported(
    env: Env, tmp_path: Path
) -> None:
    handlers = tmp_path / "mine.py"
    handlers.write_text("from receiver import on\n@on('*', name='mine')\ndef f(event): ...\n")
    make_database(
        env,
        enqueue(1, "mine", "pending", time.time() - 3600),
        enqueue(2, "gone", "pending", time.time() + 60),
        enqueue(3, "mine", "dead", None),
        enqueue(4, "resting", "pending", time.time() - 3600),
        "INSERT INTO handlers (name, paused_at) VALUES ('resting', 1.0)",
        "INSERT INTO handlers (name, open_until, reason) VALUES ('failing', 1.0, 'refused')",
    )
    lines = await found({**env, "RECEIVER_HANDLERS": str(handlers)})
    assert says(lines, "warn", "backlog: 1 deliveries are dead", "receiver retry")
    assert says(lines, "warn", "backlog: 1 deliveries are overdue by 300 s")
    assert says(lines, "warn", "backlog: resting: paused by hand")
    assert says(lines, "warn", "backlog: failing is held back", "refused")
    assert says(
        lines, "warn", "handlers: 1 deliveries are pending for gone, which is not a handler here"
    )
    assert not [text for _, text in lines if "pending for mine" in text]


def contents(database: Database) -> dict[str, list[Any]]:
    """Return the rows of all tables and sequences, with the transactions that wrote them."""
    names = database.rows(
        "SELECT oid::regclass::text FROM pg_class WHERE relkind IN ('r', 'S') AND relnamespace"
        " NOT IN (SELECT oid FROM pg_namespace WHERE nspname ~ '^pg_|^information_schema$')"
    )
    return {name: database.rows(f"SELECT xmin::text, * FROM {name}") for (name,) in names}


async def test_postgres_with_the_latest_schema_is_ok_and_unchanged(
    env: Env, database: Database
) -> None:
    before = contents(database)
    lines = await found({**env, "RECEIVER_DATABASE_URL": database.url})
    assert says(lines, "ok", "database:", "PostgreSQL", f"schema {LATEST}")
    assert says(lines, "ok", "backlog: 0 deliveries pending")
    assert says(lines, "ok", "clock: the database server's clock agrees")
    assert before["migrations"]
    assert contents(database) == before


async def test_read_only_postgres_is_a_failure(env: Env, database: Database) -> None:
    url = database.url_with("default_transaction_read_only=on")
    lines = await found({**env, "RECEIVER_DATABASE_URL": url}, "database")
    assert says(lines, "FAIL", "database: default_transaction_read_only is on")


async def test_empty_postgres_is_a_warning_and_stays_empty(
    env: Env, bare_database: Database
) -> None:
    lines = await found({**env, "RECEIVER_DATABASE_URL": bare_database.url}, "database")
    assert says(lines, "warn", "it is empty", "makes the schema")
    [(count,)] = bare_database.rows("SELECT count(*) FROM pg_namespace WHERE nspname = 'receiver'")
    assert count == 0


async def test_postgres_role_without_rights_is_reported_with_the_missing_ones(
    env: Env, database: Database
) -> None:
    role = f"poor_{os.getpid()}"
    database.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'poor'")
    try:
        parts = urlsplit(database.url)
        url = urlunsplit(parts._replace(netloc=f"{role}:poor@{parts.netloc.rpartition('@')[2]}"))
        lines = await found({**env, "RECEIVER_DATABASE_URL": url}, "database")
        assert says(lines, "FAIL", "our role may not read and write attempts", "more", "GRANT")
    finally:
        database.execute(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


async def test_newer_schema_on_postgres_is_reported(env: Env, bare_database: Database) -> None:
    bare_database.execute(
        "CREATE SCHEMA receiver",
        "CREATE TABLE receiver.migrations (number BIGINT)",
        "INSERT INTO receiver.migrations VALUES (99)",
    )
    lines = await found({**env, "RECEIVER_DATABASE_URL": bare_database.url}, "database")
    assert says(lines, "FAIL", "schema 99")


async def test_unreachable_postgres_is_reported(env: Env) -> None:
    env["RECEIVER_DATABASE_URL"] = f"postgresql://me@127.0.0.1:{free_port()}/x"
    lines = await found(env, "database")
    assert says(lines, "FAIL", "cannot open the database", "set RECEIVER_DATABASE_URL")


async def test_unencoded_password_in_postgres_url_is_reported_without_it(env: Env) -> None:
    env["RECEIVER_DATABASE_URL"] = "postgresql://me:hu@sh@127.0.0.1/x"
    lines = await found(env, "database")
    assert says(lines, "FAIL", "is not a PostgreSQL URL", "percent-encode")
    assert not any("hu" in text or "sh@" in text for _, text in lines)


async def test_unknown_postgres_url_parameters_do_not_prevent_the_checks(
    env: Env, bare_database: Database
) -> None:
    url = bare_database.url_with("pgbouncer=true&channel_binding=prefer")
    lines = await found({**env, "RECEIVER_DATABASE_URL": url}, "database")
    assert says(lines, "warn", "it is empty")


WELL: Final = Server(
    release="16.4",
    replica=False,
    free_connections=90,
    version=LATEST,
    may_create=True,
    closed=[],
)


@pytest.mark.parametrize(
    ("change", "level", "said"),
    [
        ({"replica": True}, "FAIL", "set RECEIVER_DATABASE_URL to the primary"),
        ({"free_connections": 3}, "warn", "raise max_connections"),
        ({"version": None, "may_create": False}, "FAIL", "may not create one"),
        ({"version": 0}, "warn", "brings it up to date"),
    ],
)
def test_postgres_replica_limits_and_schema_are_reported(
    change: dict[str, Any], level: str, said: str
) -> None:
    settings = Settings(database_url="postgresql://me@host/name")
    [line] = judge(msgspec.structs.replace(WELL, **change), settings)
    assert line.level == level
    assert said in str(line)


@pytest.mark.parametrize(
    ("skew", "level", "said"),
    [
        (WRONG + 30, "FAIL", "90.0 s ahead of ours"),
        (-SKEWED - 1, "warn", "3.0 s behind ours"),
        (0.0, "ok", "agrees with ours"),
    ],
)
def test_clock_of_the_database_server_is_compared(skew: float, level: str, said: str) -> None:
    [line] = check_clocks(DatabaseState(skew=skew), {})
    assert (line.level, said in str(line)) == (level, True)


def test_pooler_in_transaction_mode_is_reported() -> None:
    settings = Settings(database_url="postgresql://me@host/name")
    [line] = judge(msgspec.structs.replace(WELL, is_pooled=True), settings)
    assert (line.level, line.says.rpartition(", ")[2]) == (
        "ok",
        "through a pooler in transaction mode",
    )


async def test_nearly_full_disk_is_a_warning(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    make_database(env)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    assert says(await found(env, "database"), "warn", "only 512 MB are free")


# --- the running receiver, and the network before it ---


@dataclass
class Place:
    """A running receiver, and the environment for a doctor that checks it."""

    env: Env
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    env = {
        "RECEIVER_SECRET_KEY": KEY,
        "RECEIVER_API_KEYS": API_KEY,
        "RECEIVER_DATABASE_URL": f"sqlite:///{tmp_path_factory.mktemp('place') / 'receiver.db'}",
        "RECEIVER_DEV": "1",
    }
    with serve(create_app(Settings.read(env), [])) as port:
        yield Place({**env, "RECEIVER_URL": f"http://127.0.0.1:{port}"}, port)


async def test_healthy_receiver_has_no_failures(place: Place) -> None:
    lines = await found({**place.env, "RECEIVER_PUBLIC_URL": place.url})
    assert says(lines, "ok", "receiver: runs at", "knows every key")
    assert says(lines, "ok", "public url:", "leads here, and bodies arrive as they were sent")
    assert says(lines, "ok", "database:", f"schema {LATEST}")
    assert not says(lines, "FAIL")


async def test_receiver_with_a_read_only_database_is_reported(
    place: Place, proxy: Callable[[Passing], str]
) -> None:
    async def passing(scope: Scope, body: bytes) -> Response:
        if scope["path"] == "/readyz":
            return JSONResponse({}, 503)
        if scope["path"].startswith("/v1"):
            return Response("[]")
        return await passed_on(place.url, scope["path"], body)

    lines = await found({**place.env, "RECEIVER_URL": proxy(passing)}, "receiver")
    assert says(lines, "FAIL", "its database takes no writes")


async def test_account_locked_by_a_provider_is_reported(
    place: Place, proxy: Callable[[Passing], str]
) -> None:
    async def passing(scope: Scope, body: bytes) -> Response:
        if scope["path"] == "/readyz":
            return JSONResponse({"status": "ok", "locked": ["fal"]})
        if scope["path"].startswith("/v1"):
            return Response("[]")
        return await passed_on(place.url, scope["path"], body)

    lines = await found({**place.env, "RECEIVER_URL": proxy(passing)})
    assert says(lines, "FAIL", "provider fal: fal has locked the account, and its submits wait")


async def test_dev_receiver_is_recognised_by_its_generated_secret(
    place: Place, env: Env, tmp_path: Path
) -> None:
    del env["RECEIVER_SECRET_KEY"]
    assert not says(await found(env), "ok", "secrets")
    env |= {"RECEIVER_DEV": "1", "RECEIVER_URL": place.url}
    lines = await found(env)
    assert says(lines, "warn", "receiver: not checked")
    assert says(lines, "ok", "secrets: made up by --dev")
    (tmp_path / "receiver.db.dev-secret").write_text(KEY)
    assert says(await found(env, "receiver"), "ok", "runs at")


async def test_key_unknown_to_the_running_receiver_is_reported(place: Place) -> None:
    env = place.env | {
        "RECEIVER_SECRET_KEY": f"{KEY},{OTHER_KEY}",
        "RECEIVER_API_KEYS": f"{API_KEY},another-long-api-key",
        "RECEIVER_PUBLIC_URL": place.url,
    }
    lines = await found(env)
    for name in ("receiver", "public url"):
        assert says(lines, "FAIL", name, "does not know number 2 of RECEIVER_SECRET_KEY")
    lines = await found({**env, "RECEIVER_SECRET_KEY": KEY}, "receiver")
    assert says(lines, "FAIL", "does not know number 2 of RECEIVER_API_KEYS", "restart")


Passing = Callable[[Scope, bytes], Awaitable[Response]]


@pytest.fixture
def proxy() -> Iterator[Callable[[Passing], str]]:
    """Return a function that starts a proxy before the receiver, and returns its URL."""
    with ExitStack() as stack:

        def start(passing: Passing, **more: Any) -> str:
            async def app(scope: Scope, receive: Receive, send: Send) -> None:
                body = await Request(scope, receive).body()
                await (await passing(scope, body))(scope, receive, send)

            port = stack.enter_context(serve(app, lifespan="off", **more))
            return f"http{'s' if more else ''}://127.0.0.1:{port}"

        yield start


async def passed_on(
    url: str, path: str, body: bytes, method: str = "POST", headers: Any = None
) -> Response:
    async with httpx.AsyncClient() as client:
        answer = await client.request(method, url + path, content=body, headers=headers)
    kind = answer.headers["content-type"]
    return Response(answer.content, answer.status_code, media_type=kind)


async def test_receiver_with_other_secrets_is_reported_and_gets_no_api_key(
    place: Place, env: Env, proxy: Callable[[Passing], str]
) -> None:
    asked: list[str] = []

    async def passing(scope: Scope, body: bytes) -> Response:
        asked.append(f"{scope['path']} {scope['headers']}")
        return await passed_on(place.url, scope["path"], body)

    env |= {"RECEIVER_SECRET_KEY": OTHER_KEY, "RECEIVER_URL": proxy(passing)}
    assert says(await found(env, "receiver"), "FAIL", "does not know this secret key")
    assert asked
    assert not [line for line in asked if API_KEY in line or "/v1" in line]


async def test_other_server_at_the_default_url_is_only_a_warning(
    env: Env, monkeypatch: pytest.MonkeyPatch, proxy: Callable[[Passing], str]
) -> None:
    caller = Caller(url=proxy(_says(Response("hello"))))
    monkeypatch.setattr(Caller, "parse", lambda _env: (caller, []))
    del env["RECEIVER_URL"]
    assert says(
        await found(env, "receiver"), "warn", "no receiver of ours answers", "is not a receiver"
    )


def _says(response: Response) -> Passing:
    async def passing(_scope: Scope, _body: bytes) -> Response:
        return response

    return passing


OBSTACLES: Final[dict[str, tuple[Passing, str]]] = {
    "redirect": (
        _says(Response(status_code=308, headers={"location": "https://www.test/"})),
        "it redirects (HTTP 308) to https://www.test/; set the URL that it redirects to",
    ),
    "landing page": (_says(Response("<html>welcome")), "but it is not a receiver"),
    "JSON of others": (_says(JSONResponse({"answer": 1, "sha256": "x"})), "it is not a receiver"),
    "not found": (_says(Response("404", 404)), "HTTP 404 from something that is not a receiver"),
    "login": (_says(Response("401", 401)), "HTTP 401 from something that is not a receiver"),
    "bad gateway": (_says(Response("502", 502)), "HTTP 502 from something that is not a receiver"),
    "takes little": (_says(Response("413", 413)), "the proxy accepts no body of this size"),
    "endless": (_says(Response(b"x" * 2_000_000)), "no answer came"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
async def test_redirect_login_and_other_obstacles_for_callbacks_are_reported(
    place: Place, proxy: Callable[[Passing], str], obstacle: str
) -> None:
    passing, said = OBSTACLES[obstacle]
    lines = await found({**place.env, "RECEIVER_PUBLIC_URL": proxy(passing)}, "public url")
    assert says(lines, "FAIL", said), lines


Change = Callable[[str, str, bytes], tuple[str, str, bytes]]
CHANGES: Final[dict[str, tuple[str, Change, str]]] = {
    "path stripped": (
        "FAIL",
        lambda m, p, b: (m, p.removeprefix("/webhooks"), b),
        "gets another path",
    ),
    "path added": ("FAIL", lambda m, p, b: (m, f"/api{p}", b), "gets another path"),
    "method": ("FAIL", lambda _, p, b: ("GET", p, b), "changes POST to another method"),
    "body trimmed": (
        "FAIL",
        lambda m, p, b: (m, p, b.strip()),
        "a callback is changed",
    ),
    "body made anew": (
        "FAIL",
        lambda m, p, b: (m, p, json.dumps(json.loads(b)).encode() if len(b) < 1000 else b),
        "a callback is changed",
    ),
    "body lost": ("FAIL", lambda m, p, _: (m, p, b""), "a callback is changed"),
    "other token": ("FAIL", lambda m, p, b: (m, p + "x", b), "does not know this secret key"),
    "large body": ("warn", lambda m, p, b: (m, p, b[:1_000_000]), "of 1.6 MB does not get through"),
}


@pytest.mark.parametrize("kind", CHANGES)
async def test_proxy_that_changes_callbacks_is_reported(
    place: Place, proxy: Callable[[Passing], str], kind: str
) -> None:
    level, change, said = CHANGES[kind]

    async def passing(scope: Scope, body: bytes) -> Response:
        method, path, content = change(scope["method"], scope["path"], body)
        return await passed_on(place.url, path, content, method)

    lines = await found({**place.env, "RECEIVER_PUBLIC_URL": proxy(passing)}, "public url")
    assert says(lines, level, said), lines


async def test_recorded_echo_answer_does_not_pass_for_a_receiver(
    place: Place, proxy: Callable[[Passing], str]
) -> None:
    """A cache, or an attacker who recorded an answer, must not pass for the receiver."""
    tokens, now = Tokens([KEY]), time.time()
    async with httpx.AsyncClient(base_url=place.url) as client:
        kept = await client.post(f"/webhooks/echo/{tokens.echoes(now)[0]}", content=b"x")
    assert kept.status_code == 200
    env = {**place.env, "RECEIVER_PUBLIC_URL": proxy(_says(JSONResponse(kept.json())))}
    assert says(await found(env, "public url"), "FAIL", "but it is not a receiver")


async def test_untrusted_certificate_is_reported(
    place: Place, proxy: Callable[..., str], tmp_path: Path
) -> None:
    public, private = write_certificate(tmp_path)
    url = proxy(_says(Response("")), ssl_certfile=public, ssl_keyfile=private)
    lines = await found({**place.env, "RECEIVER_PUBLIC_URL": url}, "public url")
    assert says(lines, "FAIL", "TLS fails", "self-signed")
    lines = await found({**place.env, "RECEIVER_PUBLIC_URL": f"https{place.url[4:]}"}, "public url")
    assert says(lines, "FAIL", "TLS fails")


async def test_unresolvable_host_and_refused_connection_are_reported(
    place: Place, env: Env
) -> None:
    nowhere = "https://receiver.invalid"
    lines = await found({**env, "RECEIVER_PUBLIC_URL": nowhere}, "public url")
    assert says(lines, "FAIL", "its name cannot be resolved")
    closed = f"http://127.0.0.1:{free_port()}"
    lines = await found({**place.env, "RECEIVER_PUBLIC_URL": closed}, "public url")
    assert says(lines, "FAIL", "connection refused")


async def test_public_url_is_only_a_warning_while_no_receiver_runs(env: Env) -> None:
    env |= {"RECEIVER_PUBLIC_URL": f"http://127.0.0.1:{free_port()}", "RECEIVER_DEV": "1"}
    lines = await found(env)
    assert says(lines, "warn", "receiver: no receiver of ours answers", "receiver serve")
    assert says(lines, "warn", "public url:", "cannot be checked while no receiver runs")
    assert not says(lines, "FAIL")


async def test_private_address_and_plain_http_are_allowed_only_in_dev_mode(
    place: Place, env: Env
) -> None:
    env["RECEIVER_PUBLIC_URL"] = place.url
    lines = await found(env, "public url")
    assert says(lines, "FAIL", "is not https")
    assert says(lines, "FAIL", "127.0.0.1 is a private address")
    lines = await found({**env, "RECEIVER_DEV": "1"}, "public url")
    assert says(lines, "warn", "only providers on this machine")


async def test_missing_public_url_is_a_warning(env: Env) -> None:
    assert says(await found(env, "public url"), "warn", "RECEIVER_PUBLIC_URL is not set")


# --- the echo route, without authentication ---


async def test_echo_rejects_forged_and_expired_tokens_and_oversized_bodies(place: Place) -> None:
    tokens, now = Tokens([KEY]), time.time()
    good = tokens.echoes(now)[0]
    bad = {
        "another's": Tokens([OTHER_KEY]).echoes(now)[0],
        "a callback's": tokens.callback("fal", f"{int(now)}-0"),
        "old": tokens.echoes(now - 90)[0],
        "of the future": tokens.echoes(now + 90)[0],
        "changed": good[:-1] + ("A" if good[-1] != "A" else "B"),
        "long": "a" * 5000,
        "no token": "x",
        "not ASCII": "é.é",
    }
    async with httpx.AsyncClient(base_url=place.url) as client:
        for name, token in bad.items():
            answer = await client.post(f"/webhooks/echo/{token}", content=b"x")
            assert answer.status_code == 401, name
            assert answer.json()["type"] == "urn:receiver:problem:unproved"
        assert (await client.get(f"/webhooks/echo/{good}")).status_code == 405
        one, two = [
            (await client.post(f"/webhooks/echo/{good}", content=b"x")).json() for _ in "ab"
        ]
        assert one == two
        assert set(one) == {"sha256", "answer"}
        much = await client.post(f"/webhooks/echo/{good}", content=b"x" * (4 * 2**20 + 1))
        assert much.status_code == 413


# --- providers ---


@pytest.fixture(scope="module")
def providers() -> Iterator[Env]:
    options = msgspec.structs.replace(FAST, api_keys=frozenset({PROVIDER_KEY}))
    with serve(create_emulator(options)) as port:
        keys = dict.fromkeys((each.key for each in DECLARED.values()), PROVIDER_KEY)
        yield {**settings_for(f"http://127.0.0.1:{port}"), **keys}


async def test_valid_and_invalid_provider_keys_are_distinguished_without_submits(
    env: Env, providers: Env
) -> None:
    lines = await found(env | providers)
    for name in DECLARED:
        assert says(lines, "ok", f"provider {name}: the key is good")
    assert not says(lines, "warn", "none has a key")
    assert says(lines, "ok", "clock: the clock of", "agrees")
    bad = dict.fromkeys((each.key for each in DECLARED.values()), "wrong")
    lines = await found(env | providers | bad)
    for name in DECLARED:
        assert says(lines, "FAIL", f"provider {name}: the key is refused (HTTP 40")
    base = providers["OXEN_BASE_URL"].removesuffix("/oxen")
    async with httpx.AsyncClient(base_url=base) as client:
        assert (await client.get("/_emulator/ledger")).json()["predictions"] == []


async def test_disabled_unreachable_and_wrong_provider_urls_are_reported(
    env: Env, providers: Env, proxy: Callable[[Passing], str]
) -> None:
    wrong = {
        "OXEN_API_KEY": "",
        "EACHLABS_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "FAL_JWKS_URL": proxy(_says(Response("<html>"))),
        "REPLICATE_BASE_URL": proxy(_says(Response("<html>"))),
        "FAL_QUEUE_URL": proxy(_says(Response(status_code=302, headers={"location": "/x"}))),
    }
    lines = await found(env | providers | wrong)
    assert says(lines, "ok", "provider oxen: off")
    assert says(lines, "FAIL", "provider eachlabs: cannot be reached", "connection refused")
    assert says(lines, "FAIL", "provider fal: it redirects (HTTP 302)")
    for name in ("fal", "replicate"):
        assert says(lines, "FAIL", f"{name}: the keys that prove its callbacks cannot be fetched")
    secret = {"REPLICATE_WEBHOOK_SIGNING_SECRET": "whsec_c2VjcmV0"}
    lines = await found(env | providers | wrong | secret)
    assert not says(lines, "FAIL", "provider replicate")


@pytest.mark.parametrize(
    ("ahead", "level", "said"),
    [(0, "ok", "agrees with ours"), (30, "warn", "behind ours"), (-3600, "FAIL", "ahead of ours")],
)
async def test_clock_skew_against_the_providers_is_reported(
    env: Env, providers: Env, ahead: float, level: str, said: str
) -> None:
    lines = await examine(env | providers, clock=lambda: time.time() + ahead)
    [clock] = [line for line in lines if line.name == "clock"]
    assert (clock.level, said in clock.says) == (level, True), clock


# --- handlers ---


async def test_every_handler_file_that_cannot_be_loaded_is_reported(
    env: Env, tmp_path: Path
) -> None:
    for name, content in {
        "broken.py": "from receiver import on\n1/0\n",
        "leaves.py": "import sys\nsys.exit(3)\n",
        "empty.py": "",
        "good.py": "from receiver import on\n@on('*', name='good', after='x')\ndef f(e): ...\n",
        "twin.py": "from receiver import on\n@on('*', name='good')\ndef f(e): ...\n",
    }.items():
        (tmp_path / name).write_text(content)
    names = ["broken.py", "leaves.py", "empty.py", "good.py", "twin.py", "absent.py"]
    lines = await found(
        {**env, "RECEIVER_HANDLERS": ",".join(str(tmp_path / name) for name in names)}, "handlers"
    )
    assert says(lines, "FAIL", "broken.py:2", "ZeroDivisionError", "would not start")
    assert says(lines, "FAIL", "leaves.py:2", "SystemExit(3)")
    assert says(lines, "FAIL", "empty.py", "has no handler")
    assert says(lines, "FAIL", "twin.py:2", "'good' is taken")
    assert says(lines, "FAIL", "absent.py", "no such file")
    assert says(lines, "warn", "good is to run after x", "will not wait")


async def test_handlers_imported_by_another_file_are_loaded_once(env: Env, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("from receiver import on\n@on('*')\ndef f(event): ...\n")
    (tmp_path / "all.py").write_text("from one import f\n")
    files = ",".join(str(tmp_path / name) for name in ("one.py", "all.py", "one.py"))
    lines = await found({**env, "RECEIVER_HANDLERS": files}, "handlers")
    assert lines == [("ok", "handlers: one:f: loaded")]


async def test_missing_handlers_are_a_warning(env: Env) -> None:
    assert says(await found(env, "handlers"), "warn", "no handler is registered")


async def test_syntax_error_in_a_handler_file_is_one_finding(env: Env, tmp_path: Path) -> None:
    handlers = tmp_path / "broken.py"
    handlers.write_text("def draw(:\n")
    lines = await found(env | {"RECEIVER_HANDLERS": str(handlers)}, "handlers")
    assert [text for level, text in lines if level == "FAIL"] == [
        f"handlers: {handlers}:1:10: invalid syntax; fix it: `receiver serve` would not start"
    ]


async def test_short_lived_results_without_the_save_handler_are_a_warning(env: Env) -> None:
    env |= {"BFL_API_KEY": "key-of-mine", "HTTPS_PROXY": f"http://127.0.0.1:{free_port()}"}
    assert says(await found(env, "handlers"), "warn", "bfl are gone after 10 minutes", "`save`")
    lines = await found(env | {"RECEIVER_HANDLERS": "save"}, "handlers")
    assert lines == [("ok", "handlers: save: loaded")]


async def test_chat_without_recipes_or_an_allow_rule_is_a_warning(
    env: Env, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLACK_TOKEN", "xoxb-1")
    monkeypatch.setenv("SLACK_SIGNING_SECRET", "0123456789abcdef" * 2)
    env |= {"RECEIVER_HANDLERS": "slack-in"}
    assert says(await found(env, "handlers"), "warn", "by slack-in: RECEIVER_RECIPES has no recipe")
    (book := tmp_path / "recipes.toml").write_text('[imagine]\nprovider = "fal"\nmodel = "a/b"\n')
    env |= {"RECEIVER_RECIPES": str(book)}
    assert says(await found(env, "handlers"), "warn", "RECEIVER_RECIPES has no [[allow]]")
    book.write_text(f"{book.read_text()}[[allow]]\n")
    assert not says(await found(env, "handlers"), "warn", "RECEIVER_RECIPES")


# --- all checks together ---


async def test_failing_or_hanging_check_does_not_stop_the_others(
    env: Env, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    time_now, is_checked = loop.time, asyncio.Event()

    def breaks(*_: object) -> None:
        raise RuntimeError("unforeseen")

    async def hangs(*_: object) -> None:
        await is_checked.wait()
        monkeypatch.setattr(loop, "time", lambda: time_now() + PATIENCE)
        await asyncio.Event().wait()

    def check(*given: Any) -> Any:
        is_checked.set()
        return check_backlog(*given)

    monkeypatch.setattr("receiver.cli.doctor._LONGEST", PATIENCE)
    monkeypatch.setattr("receiver.cli.doctor.check_secrets", breaks)
    monkeypatch.setattr("receiver.cli.doctor.check_provider", hangs)
    monkeypatch.setattr("receiver.cli.doctor.check_backlog", check)
    lines = await found({**env, "FAL_KEY": "fal-key-of-mine"})
    assert says(lines, "FAIL", "secrets: the check itself failed: RuntimeError: unforeseen")
    assert says(lines, "FAIL", f"provider fal: the check did not end within {PATIENCE:g} s")
    assert says(lines, "ok", "database:")


def test_worst_level_of_no_findings_is_ok() -> None:
    assert worst([]) == "ok"
    assert worst([Finding("ok", "a", ""), Finding("FAIL", "b", ""), Finding("warn", "c", "")]) == (
        "FAIL"
    )


def doctor(env: Env, cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env = {**kept, "PYTHONPATH": str(Path(__file__).parent.parent.parent), **env}
    return run_to_end(["-m", "receiver", "doctor", *args], cwd, env)


def test_doctor_command_prints_text_or_json_and_sets_the_exit_code(
    env: Env, tmp_path: Path
) -> None:
    (tmp_path / "a,b.py").write_text(
        "from receiver import on\nprint('loud')\n@on('*', name='mine')\ndef f(event): ...\n"
    )
    weak = {**env, "RECEIVER_SECRET_KEY": "a" * 32}
    with ThreadPoolExecutor() as threads:
        plain = threads.submit(doctor, env, tmp_path, "a,b.py")
        strict = threads.submit(doctor, env, tmp_path, "a,b.py", "--strict", "--json")
        failed = threads.submit(doctor, weak, tmp_path, "--dev")
    ran = plain.result()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "ok    handlers: mine: loaded\n" in ran.stdout
    assert "warn  providers: none has a key; to submit, set one of OXEN_API_KEY, " in ran.stdout
    assert "\x1b" not in ran.stdout
    assert strict.result().returncode == 2
    report = json.loads(strict.result().stdout)
    assert report["worst"] == "warn"
    assert {"level", "name", "says", "fix"} == set(report["data"][0])
    assert failed.result().returncode == 1
    assert "FAIL  secrets: RECEIVER_SECRET_KEY repeats a few characters" in failed.result().stdout


def test_clock_is_ok_if_one_provider_agrees() -> None:
    [line] = check_clocks(DatabaseState(), {"oxen": -17649.4, "eachlabs": 0.5})
    assert (line.level, line.says) == ("ok", "the clock of eachlabs agrees with ours")
    assert check_clocks(DatabaseState(), {}) == []
