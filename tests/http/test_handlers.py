"""`/v1/handlers`: registered handlers and their pending deliveries; pause and resume."""

from __future__ import annotations

from typing import Any

import pytest

from receiver import Event, on
from tests.conftest import Logged, Start
from tests.receiving import Json, Station, eventually

pytestmark = pytest.mark.anyio

ran: list[str] = []


@on("*", name="files.py:greet/all")
def greet(event: Event) -> None:
    ran.append(event.prediction.id)


async def states(station: Station) -> dict[str, Json]:
    answer = await station.http.get("/v1/handlers")
    assert answer.status_code == 200
    return {state["name"]: state for state in answer.json()["data"]}


async def post(station: Station, name: str, command: str) -> Any:
    return await station.http.post(f"/v1/handlers/{name}/{command}")


async def test_paused_handler_keeps_deliveries_pending_until_resumed(
    start: Start, logged: Logged
) -> None:
    name = "files.py%3Agreet%2Fall"
    async with start(greet) as station:
        assert await states(station) == {
            "files.py:greet/all": {
                "name": "files.py:greet/all",
                "state": "running",
                "registered": True,
                "pending": 0,
                "paused_at": None,
                "open_until": None,
                "reason": "",
            }
        }
        answer = await post(station, name, "pause")
        assert (answer.status_code, answer.json()["state"]) == (200, "paused")
        assert answer.json()["paused_at"].endswith("Z")
        again = await post(station, name, "pause")
        assert again.json()["paused_at"] == answer.json()["paused_at"]
        sent = await station.submitted("eachlabs")
        await station.push(sent)
        [delivery] = (await station.http.get("/v1/deliveries")).json()["data"]
        assert delivery["state"] == "pending"
        await station.http.post("/v1/drain?seconds=1")
        explained = await station.http.get(f"/v1/predictions/{sent.prediction_id}/explain")
        assert [row["held"] for row in explained.json()["handlers"]] == ["paused"]
        assert ran == []
    async with start(greet) as station:
        assert (await states(station))["files.py:greet/all"]["pending"] == 1
        assert (await post(station, name, "resume")).json()["state"] == "running"
        await eventually(lambda: ran == [sent.prediction_id])
    said = [line["event"] for line in logged if str(line["event"]).startswith("handler.")]
    assert said.count("handler.paused") == 2
    assert {"handler.waiting", "handler.resumed"} <= set(said)


async def test_unregistered_handler_with_deliveries_is_listed_and_unknown_is_404(
    start: Start,
) -> None:
    async with start(greet, dispatch=False) as station:
        await station.push(await station.submitted("eachlabs"))
    async with start() as station:
        found = (await states(station))["files.py:greet/all"]
        assert (found["registered"], found["pending"]) == (False, 1)
        for command in ("pause", "resume"):
            answer = await post(station, "nobody", command)
            assert (answer.status_code, answer.json()["type"]) == (
                404,
                "urn:receiver:problem:not-found",
            )
        assert (await station.world.post("/v1/handlers/x/pause")).status_code == 401


async def test_unknown_query_parameter_returns_422(start: Start) -> None:
    """A client that sends `?wait=30` needs the header Prefer instead, so it must get an error."""
    prediction = f"/v1/predictions/pred_{'0' * 32}"
    async with start(greet) as station:
        for method, path in (
            *(("GET", "/v1/handlers"), ("GET", "/v1/recipes"), ("GET", prediction)),
            *(("POST", "/v1/predictions"), ("POST", f"{prediction}/cancel")),
        ):
            answer = await station.http.request(method, f"{path}?wait=30")
            assert (answer.status_code, "`wait`" in answer.json()["detail"]) == (422, True)
        assert (await station.http.get("/readyz?by=prober")).status_code == 200
