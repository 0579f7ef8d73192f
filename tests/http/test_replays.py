"""Bulk replays over /v1/replays, on both engines: counted first, then run."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from receiver import Context, Dead, Event, on
from tests.conftest import Start
from tests.patience import PATIENCE
from tests.receiving import Json, Station, eventually

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

KEYS: list[str] = []


@on("succeeded", name="replays.save")
async def save(_: Event, ctx: Context) -> None:
    KEYS.append(ctx.idempotency_key)


@on("succeeded", name="replays.refuse")
async def refuse(_: Event) -> None:
    raise Dead("no")


@on("failed", model="other*", name="replays.late")
async def late(_: Event) -> None: ...


async def push_all(station: Station) -> list[str]:
    """Let four predictions end: two of one model, one of another, and one that failed."""
    found = []
    for number, (model, ok) in enumerate(
        [("nano-banana", True), ("nano-banana", True), ("other/model", True), ("other/two", False)]
    ):
        metadata = {"number": number, "kind": "avatar" if number else "logo"}
        sent = await station.submitted("eachlabs", f"{number}", model=model, metadata=metadata)
        await station.push(sent, ok=ok)
        found.append(sent.prediction_id)
    await settled(station)
    return found


async def settled(station: Station) -> None:
    pending = "SELECT id FROM deliveries WHERE state IN ('pending', 'running')"
    await eventually(lambda: station.rows(pending), lambda rows: not rows)


async def count(station: Station, **wanted: Any) -> Json:
    answer = await station.http.post("/v1/replays", json=wanted)
    assert answer.status_code == 201, answer.text
    replay = dict(answer.json())
    made = answer.url.join(answer.headers["location"])
    assert (await station.http.get(made)).json() == replay
    assert (replay["state"], replay["replayed"], replay["ended_at"]) == ("counted", 0, None)
    return replay


async def start_replay(station: Station, replay: Json) -> None:
    answer = await station.http.post(f"/v1/replays/{replay['id']}/start")
    assert answer.status_code == 202, answer.text


async def read(station: Station, replay: Json) -> Json:
    return dict((await station.http.get(f"/v1/replays/{replay['id']}")).json())


async def done(station: Station, replay: Json) -> Json:
    """Start a replay, and return it when it is done."""
    await start_replay(station, replay)
    return await eventually(lambda: read(station, replay), lambda found: found["state"] == "done")


async def test_replay_counts_its_matches_and_then_replays_exactly_those(start: Start) -> None:
    KEYS.clear()
    async with start(save, refuse) as station:
        predictions = await push_all(station)
        hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
        later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
        for wanted, events, matched in (
            ({"since": hour_ago}, 3, 6),
            ({"since": later}, 0, 0),
            ({"until": hour_ago}, 0, 0),
            ({"provider": "eachlabs", "state": "done"}, 3, 3),
            ({"provider": "fal"}, 0, 0),
            ({"model": "other/*"}, 1, 2),
            ({"model": "[nano"}, 0, 0),
            ({"handler": "replays.refuse"}, 3, 3),
            ({"handler": "replays.gone"}, 0, 0),
            ({"state": "dead"}, 3, 3),
            ({"state": "skipped"}, 0, 0),
            ({"metadata": {"kind": "ava*"}}, 2, 4),
            ({"metadata": {"number": "0"}}, 1, 2),
            ({"metadata": {"color": "*"}}, 0, 0),
            ({"state": "dead", "model": "nano*", "metadata": {"kind": "avatar"}}, 1, 1),
        ):
            replay = await count(station, **wanted)
            assert (replay["events"], replay["matched"]) == (events, matched), wanted
            assert replay["wanted"] == wanted or "since" in wanted or "until" in wanted
        assert station.one("SELECT count(*) FROM deliveries WHERE round > 0") == 0

        replay = await count(station, handler="replays.save", model="nano*")
        found = await done(station, replay)
        assert (found["matched"], found["replayed"]) == (2, 2)
        await settled(station)
        answer = await station.http.get("/v1/deliveries?handler=replays.save")
        lineage = {one["prediction_id"]: one for one in answer.json()["data"]}
        for prediction in predictions[:2]:
            assert (lineage[prediction]["replay_id"], lineage[prediction]["round"]) == (
                replay["id"],
                1,
            )
            assert len(lineage[prediction]["history"]) == 2
        assert lineage[predictions[2]]["replay_id"] is None
        assert Counter(len(key.split(".")) for key in KEYS) == {1: 3, 2: 2}
        # A second start changes nothing; a finished replay cannot be canceled.
        again = await station.http.post(f"/v1/replays/{replay['id']}/start")
        assert (again.status_code, again.json()) == (202, found)
        refused = await station.http.post(f"/v1/replays/{replay['id']}/cancel")
        assert (refused.status_code, refused.json()["type"]) == (
            409,
            "urn:receiver:problem:replay-ended",
        )


async def test_new_handler_gets_unmatched_events_by_a_replay(start: Start) -> None:
    async with start(save) as station:
        await push_all(station)
        assert station.one("SELECT count(*) FROM events WHERE unmatched = 1") == 1
    async with start(late) as station:  # the handler of the first run is not registered now
        replay = await count(station, provider="eachlabs")
        assert (replay["events"], replay["matched"]) == (1, 1)
        assert (await count(station, state="done"))["matched"] == 0
        await done(station, replay)
        await settled(station)
        rows = station.rows("SELECT handler, round, replay_id FROM deliveries WHERE round = 0")
        assert ("replays.late", 0, replay["id"]) in rows
        assert station.one("SELECT count(*) FROM events WHERE unmatched = 1") == 0
        listed = (await station.http.get("/v1/replays")).json()
        assert [one["state"] for one in listed["data"]] == ["counted", "done"]


async def test_counted_replay_can_be_canceled_and_then_not_started(start: Start) -> None:
    async with start(save) as station:
        await push_all(station)
        replay = await count(station, state="done")
        path = f"/v1/replays/{replay['id']}"
        for _ in range(2):
            answer = await station.http.post(f"{path}/cancel")
            assert (answer.status_code, answer.json()["state"]) == (200, "canceled")
        answer = await station.http.post(f"{path}/start")
        assert (answer.status_code, answer.json()["type"]) == (
            409,
            "urn:receiver:problem:replay-canceled",
        )
        assert station.one("SELECT max(round) FROM deliveries") == 0
        for method, tail in (("GET", ""), ("POST", "/start"), ("POST", "/cancel")):
            answer = await station.http.request(method, f"/v1/replays/rep_none{tail}")
            assert answer.status_code == 404


async def count_dead_deliveries(station: Station, times: int) -> list[Json]:
    """Make three deliveries dead, and count a replay of them so many times."""
    for number in range(3):
        await station.push(await station.submitted("eachlabs", f"{number}"))
    station.edit("UPDATE deliveries SET state = 'dead', due_at = NULL, ended_at = 1, reason = 'x'")
    return [await count(station, state="dead") for _ in range(times)]


async def test_running_replay_continues_after_a_restart(start: Start) -> None:
    async with start(save, dispatch=False) as station:
        first, second = await count_dead_deliveries(station, 2)
        # As if it had been started just before the process stopped.
        station.edit(f"UPDATE replays SET state = 'running' WHERE id = '{first['id']}'")
    async with start(save, dispatch=False) as station:
        found = await eventually(
            lambda: read(station, first), lambda found: found["state"] == "done"
        )
        assert found["replayed"] == 3
        # Deliveries that are pending already are not replayed again.
        assert (await done(station, second))["replayed"] == 0
        assert station.rows("SELECT DISTINCT round, replay_id FROM deliveries") == [
            (1, first["id"])
        ]


async def test_canceled_replay_replays_no_further_deliveries(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It replays one delivery, then waits for handlers.
    monkeypatch.setattr("receiver.deliveries.replay._STEP", 1)
    monkeypatch.setattr("receiver.deliveries.replay._LONGEST_WAIT", 2 * PATIENCE)
    async with start(save, dispatch=False) as station:
        first, second = await count_dead_deliveries(station, 2)
        with monkeypatch.context() as patch:
            patch.setattr("receiver.deliveries.replay._MOST_DUE", 1)
            await start_replay(station, first)
            await eventually(lambda: read(station, first), lambda found: found["replayed"] == 1)
            answer = await station.http.post(f"/v1/replays/{first['id']}/cancel")
            assert (answer.status_code, answer.json()["state"]) == (200, "canceled")
        # The same task runs the other replay, and so has had time to go on with the canceled one.
        assert (await done(station, second))["replayed"] == 2
        found = await read(station, first)
        assert (found["state"], found["replayed"]) == ("canceled", 1)
        assert station.rows("SELECT count(*), replay_id FROM deliveries GROUP BY 2 ORDER BY 1") == [
            (1, first["id"]),
            (2, second["id"]),
        ]


BAD: list[tuple[bytes, int]] = [
    (b"{}", 422),
    (b'{"metadata":{}}', 422),
    (b'{"since":null}', 422),
    (b'{"model":""}', 422),
    (b'{"state":"pending"}', 422),
    (b'{"state":["dead"]}', 422),
    (b'{"provider":"acme"}', 422),
    (b'{"color":"red"}', 422),
    (b'{"since":"24h"}', 422),
    (b'{"since":"2025-06-15T12:00:00"}', 422),
    (b'{"since":1750000000}', 422),
    (b'{"metadata":{"a":1}}', 422),
    (b'{"metadata":{"":"a"}}', 422),
    (b'{"model":"%s"}' % (b"*a" * 200), 422),
    (b"[]", 422),
    (b'"dead"', 422),
    (b"", 400),
    (b"{", 400),
    (b'{"model":"\xff"}', 400),
    (b'{"model":"\\ud800"}', 400),
    (b"[" * 100_000, 422),
    (b'{"metadata":' * 100_000, 422),
]
UNUSUAL: list[Json] = [
    {"handler": "a\0b", "state": "dead"},
    {"model": "[!z-a]*[[\\?"},
    {"model": "*a" * 100 + "b"},
    {"metadata": {"\0": "*", "b": ""}},
    {"since": "0001-01-01T00:00:00+23:59"},
    {"until": "9999-12-31T23:59:59.999999-23:59"},
]


async def test_invalid_replay_filter_returns_4xx_and_an_unusual_one_works(start: Start) -> None:
    async with start(save) as station:
        await push_all(station)
        for body, status in BAD:
            headers = {"content-type": "application/json"}
            answer = await station.http.post("/v1/replays", content=body, headers=headers)
            assert answer.status_code == status, (body[:50], answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
        assert station.count("replays") == 0
        for wanted in UNUSUAL:
            await done(station, await count(station, **wanted))
        assert (await station.http.post("/v1/replays", content=b"{}")).status_code == 415
        answer = await station.http.get("/v1/replays?limit=2")
        assert len(answer.json()["data"]) == 2
        rest = await station.http.get(f"/v1/replays?cursor={answer.json()['next_cursor']}")
        assert len(rest.json()["data"]) == len(UNUSUAL) - 2
