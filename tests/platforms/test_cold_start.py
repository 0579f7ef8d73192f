"""The CPU seconds of a cold start, compared with Starlette and an empty route."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from receiver.emulator import settings_for
from tests.conftest import Start
from tests.journey.parts import ROOT
from tests.receiving import ENV, write

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

ROUNDS: Final = 4
"""Number of runs; the first one compiles the modules."""
MOST: Final = 4.0
"""Maximum ratio to the empty route; measured here: 2.8 on SQLite, 2.4 on PostgreSQL."""
EMPTY: Final = """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

async def empty(request):
    await request.body()
    return PlainTextResponse("")

app = Starlette(routes=[Route("/{path:path}", empty, methods=["POST"])])
"""
OURS: Final = "from receiver.asgi import app\n"
TAKEN: Final = """
import asyncio, sys

async def main():
    path, body, *headers = sys.argv[1:]
    told = []
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "https", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "client": ("203.0.113.9", 1), "server": ("hooks.test", 443),
        "headers": [tuple(part.encode() for part in each.split(":", 1)) for each in headers],
    }
    async def receive():
        return {"type": "http.request", "body": body.encode()}
    async def send(message):
        told.append(message)
    async with app.router.lifespan_context(app):
        await app(scope, receive, send)
    assert told[0]["status"] == 200, told

asyncio.run(main())
"""


def cpu_seconds(code: str, args: list[str], env: dict[str, str]) -> float:
    """Run a program to its end; return its CPU seconds, which exclude those of other processes."""
    process = subprocess.Popen(
        [sys.executable, "-c", code + TAKEN, *args], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return used.ru_utime + used.ru_stime


async def test_cold_start_with_one_callback_stays_below_the_cpu_limit(start: Start) -> None:
    async with start() as station:
        letter = write(station.network, await station.submitted("bfl"))
        database: Any = station.database
    url = f"sqlite:///{database}" if isinstance(database, Path) else database.url
    env = {  # bytecode may be written, because deployed packages are compiled
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        **ENV,
        **settings_for("http://127.0.0.1:1"),
        "RECEIVER_DATABASE_URL": url,
        "RECEIVER_MODE": "serverless",
    }
    headers = [":".join(map(str, pair)) for pair in letter.headers]
    args = [letter.path, letter.body.decode(), *headers]
    rounds = [[cpu_seconds(code, args, env) for code in (EMPTY, OURS)] for _ in range(ROUNDS)]
    empty, ours = map(min, zip(*rounds, strict=True))
    assert ours / empty < MOST, rounds
