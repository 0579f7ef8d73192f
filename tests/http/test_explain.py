"""`explain` says which handlers run for an event, and why the others do not."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from receiver import Event, on
from receiver.cli.commands import main
from tests.conftest import Start
from tests.receiving import Json, Station

pytestmark = pytest.mark.anyio


@on("succeeded", name="save")
def save(_: Event) -> None: ...


@on("succeeded", name="post", after=("save", "nobody"))
def post(_: Event) -> None: ...


@on("failed", name="sorry")
def sorry(_: Event) -> None: ...


@on("*", name="avatars", metadata={"kind": "avatar"})
def avatars(_: Event) -> None: ...


@on("*", name="flux", provider="fal", model="fal-ai/flux*")
def flux(_: Event) -> None: ...


ALL = (save, post, sorry, avatars, flux)


async def explained(station: Station, name: str, query: str = "") -> Json:
    answer = await station.http.get(f"/v1/predictions/{name}/explain{query}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def told(found: Json) -> dict[str, Any]:
    return {
        row["handler"]: row["after"] if row["runs"] else row["reason"] for row in found["handlers"]
    }


async def test_explain_accepts_a_prediction_id_or_an_event_id(start: Start) -> None:
    async with start(*ALL) as station:
        sent = await station.submitted("eachlabs", metadata={"kind": "logo"})
        await station.push(sent)
        await station.until(sent.prediction_id, "succeeded")
        found = await explained(station, sent.prediction_id)
        event = f"evt_{sent.prediction_id[5:]}"
        assert (await explained(station, event))["handlers"][2:] == found["handlers"][2:]

    assert (found["type"], found["assumed"]) == ("prediction.succeeded", False)
    assert told(found) == {
        "save": [],
        "post": ["save"],
        "sorry": "type is prediction.succeeded",
        "avatars": "metadata kind is 'logo'",
        "flux": "provider is eachlabs",
    }
    states = {row["handler"]: row["delivery"] is not None for row in found["handlers"]}
    assert states == {name: name in {"save", "post"} for name in states}


async def test_explain_assumes_an_outcome_for_an_unfinished_prediction(start: Start) -> None:
    async with start(*ALL) as station:
        prediction = await station.submit("fal", metadata={"kind": "avatar"})
        found = await explained(station, prediction["id"])
        failed = await explained(station, prediction["id"], "?type=failed")
    assert (found["type"], found["assumed"]) == ("prediction.succeeded", True)
    assert told(found)["avatars"] == []
    assert told(found)["flux"] == "model is fal-ai/nano-banana"
    assert told(failed)["sorry"] == []
    assert told(failed)["save"] == "type is prediction.failed"


async def test_explain_includes_a_delivery_to_an_unregistered_handler(start: Start) -> None:
    async with start(save) as station:
        sent = await station.submitted("eachlabs")
        await station.push(sent)
    async with start(sorry) as station:
        found = await explained(station, sent.prediction_id)
    assert told(found)["save"] == "no such handler is registered here any more"
    assert found["handlers"][-1]["delivery"]["handler"] == "save"


@pytest.mark.parametrize(
    ("path", "status"),
    [("pred_none", 404), ("evt_none", 404), ("nonsense", 404), ("{}?type=odd", 422)],
)
async def test_explain_rejects_an_unknown_id_or_type_and_a_missing_key(
    start: Start, path: str, status: int
) -> None:
    async with start(*ALL) as station:
        prediction = await station.submit()
        name, mark, query = path.format(prediction["id"]).partition("?")
        answer = await station.http.get(f"/v1/predictions/{name}/explain{mark}{query}")
        stranger = await station.world.get(f"/v1/predictions/{name}/explain")
    assert (answer.status_code, stranger.status_code) == (status, 401)


def test_explain_command_prints_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "handler": "post",
        "runs": True,
        "reason": None,
        "after": ["save"],
        "held": None,
        "delivery": None,
    }
    other = {**row, "handler": "sorry", "runs": False, "reason": "type is x", "after": []}
    answer: Json = {
        "prediction": "pred_1",
        "type": "prediction.succeeded",
        "assumed": True,
        "handlers": [row, other],
    }
    asked: list[str] = []

    def call(_: object, method: str, path: str) -> Json:
        asked.append(f"{method} {path}")
        return answer

    monkeypatch.setattr("receiver.cli.client.Client.call", call)
    result = CliRunner().invoke(main, ["explain", f"evt_{1:032x}", "--type", "succeeded"])
    assert result.exit_code == 0, result.output
    assert asked == [f"GET /v1/predictions/pred_{1:032x}/explain?type=succeeded"]
    for words in ("pred_1: prediction.succeeded (if it ends so)", "after save", "type is x"):
        assert words in result.output
