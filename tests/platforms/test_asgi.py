"""The ASGI app: imported modules, logs, path prefix, and listening address."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

import pytest

from receiver.emulator import settings_for
from receiver.model.errors import SettingsError
from receiver.settings import Listening
from tests.cli.running import SECRET, environment, receiver
from tests.conftest import Start
from tests.journey.parts import ROOT
from tests.postgres import Database
from tests.receiving import ENV

FORBIDDEN: Final = (
    *("rich", "typer", "click", "pygments", "uvicorn", "httpx._main"),
    *("jinja2", "markupsafe", "PIL", "receiver.dashboard.site"),
    *("cryptography", "tomllib", "pydantic", "pydantic_settings", "pgqueuer"),
)
"""Modules that a function does not use, and should not import at each cold start."""
OUTWARD: Final = ("httpcore", "h11", "certifi")
"""Modules for outgoing requests, which accepting callbacks does not need."""
LISTED: Final = """
import asyncio, json, sys
from receiver.asgi import app
print(json.dumps([*sys.modules]))
async def main():
    async with app.router.lifespan_context(app):
        print(json.dumps([*sys.modules]))
asyncio.run(main())
import rich.console, pgqueuer
print(json.dumps(pgqueuer.PgQueuer.__name__))
"""


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **ENV, **settings_for("http://127.0.0.1:1"), **env}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )


def listed(url: str) -> list[Any]:
    """Return the modules after the import and after the start; then a name imported later."""
    done = run(LISTED, RECEIVER_DATABASE_URL=url, RECEIVER_DASHBOARD="on")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if not line.startswith("{")]


def test_cold_start_does_not_import_unneeded_modules(tmp_path: Path) -> None:
    imported, started, later = listed(f"sqlite:///{tmp_path}/r.db")
    assert not {*imported, *started} & {*FORBIDDEN, "asyncpg"}
    assert later == "PgQueuer"


def test_app_import_for_postgresql_does_not_import_unneeded_modules(database: Database) -> None:
    imported, *_ = listed(database.url)
    assert not {*imported} & {*FORBIDDEN}


def test_migration_check_of_a_current_schema_does_not_import_pgqueuer(database: Database) -> None:
    code = "import asyncio, json, os, sys\n"
    code += "from receiver.app import migrate; from receiver.settings import Settings\n"
    code += "asyncio.run(migrate(Settings.read(os.environ))); print('pgqueuer' in sys.modules)"
    assert run(code, RECEIVER_DATABASE_URL=database.url).stdout == "False\n"


def test_server_start_does_not_import_modules_for_outgoing_requests(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "receiver", "serve", "--port", "0"]
    env = environment({"RECEIVER_SECRET_KEY": SECRET, "SSL_CERT_FILE": "", "SSL_CERT_DIR": ""})
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as one:
        assert one.stderr is not None
        said = [*takewhile(lambda line: "receiver.started" not in line, one.stderr)]
        one.terminate()
        one.communicate()
    imported = {line.rpartition("|")[2].strip() for line in said if line.startswith("import time:")}
    assert "receiver.app" in imported
    # uvicorn is the server and imports click; rich and httpx._main are tried but hidden.
    assert imported & {*FORBIDDEN, *OUTWARD} == {"uvicorn", "click", "rich", "httpx._main"}


def test_garbage_collector_does_not_run_during_the_import() -> None:
    code = "import gc, receiver.asgi\nbefore = gc.get_stats()[2]['collections']\n"
    code += "receiver.asgi.import_app(); after = gc.get_stats()[2]['collections']\n"
    code += "print(after - before, gc.isenabled(), gc.get_freeze_count() > len(gc.get_objects()))"
    assert run(code).stdout == "0 True True\n"


def test_logging_is_configured_unless_the_program_has_its_own(tmp_path: Path) -> None:
    talk = "import logging, structlog; from receiver.asgi import app\n"
    talk += "structlog.get_logger().info('one'); logging.getLogger('other').warning('two')\n"
    url = f"sqlite:///{tmp_path}/r.db"
    lines = [json.loads(line) for line in run(talk, RECEIVER_DATABASE_URL=url).stderr.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("one", "info"),
        ("two", "warning"),
    ]
    own = "import logging, structlog; structlog.configure(processors=[lambda *_: 'mine'])\n"
    own += "logging.basicConfig(format='ours %(message)s')\n"
    done = run(own + talk, RECEIVER_DATABASE_URL=url)
    assert (done.stdout, done.stderr) == ("mine\n", "ours two\n")


# --- a path prefix ---


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("settings", "asked", "status"),
    [
        ({}, "/health", 200),
        ({}, "/prod/health", 404),
        ({"RECEIVER_ROOT_PATH": "/prod"}, "/prod/health", 200),
        ({"RECEIVER_ROOT_PATH": "/prod"}, "/prod", 200),
        ({"RECEIVER_ROOT_PATH": "/prod"}, "/health", 200),
        ({"RECEIVER_ROOT_PATH": "/prod"}, "/production/health", 404),
        ({"RECEIVER_ROOT_PATH": "/prod"}, "/prod/prod/health", 404),
        ({"RECEIVER_ROOT_PATH": "/v1"}, "/v1/predictions", 401),
        ({"RECEIVER_ROOT_PATH": "/v1"}, "/v1/v1/predictions", 401),
        ({"RECEIVER_ROOT_PATH": "/webhooks"}, "/webhooks/fal/pred_x.y", 401),
        ({"RECEIVER_PUBLIC_URL": "https://x.test/a/b"}, "/a/b/webhooks/fal/pred_x.y", 401),
        ({"RECEIVER_PUBLIC_URL": "https://x.test/a/b"}, "/webhooks/fal/pred_x.y", 401),
        ({"RECEIVER_PUBLIC_URL": "https://x.test/a/b"}, "/a/webhooks/fal/pred_x.y", 404),
        ({}, "/metrics%0A", 404),
        ({}, "/webhooks/fal/pred_x.y%0A", 404),
        ({"RECEIVER_ROOT_PATH": "/prod"}, "/prod/metrics%0A", 404),
        ({"RECEIVER_PUBLIC_URL": "https://x.test/a%20b"}, "/a%20b/health", 200),
        (
            {"RECEIVER_PUBLIC_URL": "https://x.test/a", "RECEIVER_ROOT_PATH": "none"},
            "/a/health",
            404,
        ),
    ],
)
async def test_path_prefix_is_removed_if_the_request_has_it(
    settings: dict[str, str], asked: str, status: int, start: Start
) -> None:
    async with start(**settings) as station:
        method = "POST" if "webhooks" in asked else "GET"
        answer = await station.world.request(method, asked)
        assert answer.status_code == status, answer.text


# --- the listening address ---


@pytest.mark.parametrize(
    ("env", "given", "where"),
    [
        ({}, (None, None), ("127.0.0.1", 8000)),
        ({"PORT": "9555"}, (None, None), ("0.0.0.0", 9555)),
        ({"PORT": "9555"}, (None, 8080), ("0.0.0.0", 8080)),
        ({"PORT": "9555", "HOST": "::"}, (None, None), ("::", 9555)),
        ({"PORT": "9555", "HOST": "::"}, ("127.0.0.1", 1), ("127.0.0.1", 1)),
        ({"HOST": "10.0.0.1"}, (None, None), ("10.0.0.1", 8000)),
        ({"PORT": "nonsense"}, ("::1", 1), ("::1", 1)),
    ],
)
def test_listening_address_is_read_from_arguments_then_port_and_host(
    env: dict[str, str], given: tuple[str | None, int | None], where: tuple[str, int]
) -> None:
    found = Listening.read(env, *given)
    assert (found.host, found.port) == where


def test_dev_mode_with_port_still_listens_on_loopback_only() -> None:
    assert Listening.read({"PORT": "9555"}, None, None, dev=True).host == "127.0.0.1"


def test_invalid_port_or_host_is_reported_without_a_traceback(tmp_path: Path) -> None:
    for env in ({"PORT": "tcp://10.0.0.1:80"}, {"PORT": "65536"}, {"HOST": "a/b"}):
        [name] = env
        with pytest.raises(SettingsError, match=f"{name}: must be a"):
            Listening.read(env, None, None)
    done = receiver("serve", cwd=tmp_path, PORT="65536", RECEIVER_POLL_AFTER="soon")
    assert done.returncode != 0
    assert "PORT: must be a" in done.stderr
    assert "RECEIVER_POLL_AFTER: must be a" in done.stderr
    assert "Traceback" not in done.stderr
