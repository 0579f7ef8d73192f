"""The receiver on Azure Functions, called by Azure's library: start, client addresses, timer."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import azure.functions as func
import pytest

from receiver.emulator import settings_for
from tests.conftest import Logged
from tests.postgres import Database
from tests.receiving import API_KEY, ENV

pytestmark = pytest.mark.anyio

SITE = "https://receiver.azurewebsites.net"


CALLERS = [
    ({"X_Forwarded_For": "6.6.6.6, 203.0.113.7:50123"}, "203.0.113.7"),
    ({"X_Azure_ClientIP": "203.0.113.8"}, "203.0.113.8"),
    ({"X_Forwarded_For": "203.0.113.7:1", "X_Azure_ClientIP": "6.6.6.6"}, "203.0.113.7"),
]


@pytest.fixture(params=[""])
def prefix(request: pytest.FixtureRequest) -> str:
    return str(request.param)


both = pytest.mark.parametrize("prefix", ["", "/api"], indirect=True)


@pytest.fixture
def module(
    tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> Iterator[ModuleType]:
    env = {**ENV, **settings_for("http://127.0.0.1:1"), "RECEIVER_DATABASE_URL": database.url}
    for name, value in {**env, "RECEIVER_PUBLIC_URL": SITE + prefix}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("receiver.azure", None)
    found: Any = import_module("receiver.azure")
    found.functions = found.app.get_functions()  # the library returns them only once
    yield found
    del sys.modules["receiver.azure"]
    gc.collect()  # the library's app ends by its own event loop, which must not run inside another


async def ask(module: ModuleType, method: str, path: str, **headers: str) -> func.HttpResponse:
    """Return the function's answer to a request, called as Azure's worker calls it."""
    request = func.HttpRequest(
        method,
        SITE + path,
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        body=b"{}" if method == "POST" else b"",
    )
    answer: func.HttpResponse = await module.functions[0].get_user_function()(request, None)
    return answer


@both
async def test_two_concurrent_first_requests_start_the_app_once(
    module: ModuleType, prefix: str, logged: Logged
) -> None:
    key = f"Bearer {API_KEY}"
    first, second = await asyncio.gather(
        ask(module, "GET", f"{prefix}/ready"),
        ask(module, "GET", f"{prefix}/v1/predictions?limit=1", authorization=key),
    )
    assert (first.status_code, second.status_code) == (200, 200)
    assert json.loads(second.get_body()) == {"data": [], "next_cursor": None}
    document = json.loads((await ask(module, "GET", f"{prefix}/openapi.json")).get_body())
    assert document["servers"] == [{"url": SITE + prefix}]
    assert (await ask(module, "GET", f"{prefix}/nowhere")).status_code == 404
    assert (await ask(module, "GET", prefix or "/")).status_code == 200
    assert sum(line["event"] == "receiver.started" for line in logged) == 1
    await module._STARTING.stop()  # noqa: SLF001 - Azure ends the process instead


@both
async def test_client_address_is_read_from_the_azure_headers(
    module: ModuleType, prefix: str, logged: Logged
) -> None:
    for headers, _ in CALLERS:
        answer = await ask(module, "POST", f"{prefix}/webhooks/fal/pred_x.y", **headers)
        assert answer.status_code == 401
    lines = [line for line in logged if line["event"] == "request.handled"]
    assert [line["client"] for line in lines] == [client for _, client in CALLERS]
    await module._STARTING.stop()  # noqa: SLF001


async def test_timer_function_runs_a_drain_every_minute(module: ModuleType, logged: Logged) -> None:
    [_, timer] = module.functions
    [binding] = json.loads(str(timer))["bindings"]
    assert (timer.get_function_name(), binding["type"], binding["schedule"]) == (
        *("drain", "timerTrigger"),
        "0 * * * * *",
    )
    await timer.get_user_function()(None)
    assert [line["event"] for line in logged].count("receiver.started") == 1
    await module._STARTING.stop()  # noqa: SLF001


async def test_failed_start_returns_503_and_is_retried(
    module: ModuleType, prefix: str, database: Database
) -> None:
    with database.refusing():
        answers: list[Any] = [await ask(module, "GET", f"{prefix}/ready") for _ in range(2)]
        assert [each.status_code for each in answers] == [503, 503]
    assert (await ask(module, "GET", f"{prefix}/ready")).status_code == 200
    await module._STARTING.stop()  # noqa: SLF001
