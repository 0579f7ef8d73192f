"""The app as other servers find it: what it costs to import, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from receiver.emulator import settings_for
from tests.journey.parts import ROOT
from tests.postgres import Database
from tests.receiving import ENV

FORBIDDEN: Final = ("rich", "typer", "click", "pygments", "uvicorn", "httpx._main")
"""Modules that a function pays for at each cold start, and has no use for."""
NO_QUEUE: Final = ("pydantic", "pydantic_settings", "pgqueuer", "asyncpg")
NOT_OF_THE_QUEUE: Final = ("pgqueuer.adapters.cli", "pgqueuer.adapters.inmemory", "pgqueuer.qm")
LISTED: Final = """
import asyncio, json, sys
from receiver.asgi import app
async def main():
    async with app.router.lifespan_context(app):
        print(json.dumps([*sys.modules]))
if sys.argv[1:]:
    asyncio.run(main())
else:
    print(json.dumps([*sys.modules]))
"""


def run(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **ENV, **settings_for("http://127.0.0.1:1"), **env}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=given,
        capture_output=True,
        text=True,
        check=False,
    )


def imported(folder: Path, *arguments: str, **env: str) -> list[str]:
    done = run(LISTED, *arguments, **{"RECEIVER_DATABASE_URL": f"sqlite:///{folder}/r.db", **env})
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("arguments", [(), ("start",)])
def test_a_cold_start_imports_nothing_that_only_terminals_need(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert not set(imported(tmp_path, *arguments)) & {*FORBIDDEN, *NO_QUEUE}


def test_nor_does_it_on_postgresql(tmp_path: Path, database: Database) -> None:
    found = set(imported(tmp_path, RECEIVER_DATABASE_URL=database.url))
    assert not found & {*FORBIDDEN, *NOT_OF_THE_QUEUE}


def test_what_was_left_out_can_be_had_later(tmp_path: Path) -> None:
    code = "import receiver.asgi, rich.console, pgqueuer; print(pgqueuer.PgQueuer.__name__)"
    done = run(code, RECEIVER_DATABASE_URL=f"sqlite:///{tmp_path}/r.db")
    assert (done.stdout, done.returncode) == ("PgQueuer\n", 0)


def test_logs_are_ours_unless_the_program_has_its_own(tmp_path: Path) -> None:
    talk = "import logging, structlog; import receiver.asgi\n"
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


def test_all_that_is_wrong_with_the_settings_is_said_at_once(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {"RECEIVER_SECRET_KEY": "short", "RECEIVER_MAX_BODY_BYTES": "many"}
    done = run("import receiver.asgi", RECEIVER_DATABASE_URL=f"sqlite:///{tmp_path}/r.db", **wrong)
    assert done.returncode == 1
    assert all(name in done.stderr for name in wrong)
