"""The list of discarded callbacks and events, `/v1/discarded`, on both engines."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from receiver import Event, on
from receiver.http.rejections import Rejections
from receiver.model.errors import StoreUnavailable
from receiver.store.discarded import OTHER, Rejection
from tests.conftest import Logged, Start
from tests.receiving import API_KEY, STRANGER, Station, eventually, write

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]


async def listed(station: Station, query: str = "") -> list[dict[str, Any]]:
    answer = await station.http.get(f"/v1/discarded?{query}")
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


async def test_discarded_callbacks_and_events_are_listed_with_their_reasons(start: Start) -> None:
    @on("failed")
    async def failures_only(_: Event) -> None: ...

    async with start(failures_only) as station:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent)
        for _ in range(3):
            assert (await station.post(letter)).status_code == 200
        await station.push(sent, ok=False)
        forged = write(station.network, sent)
        forged.headers[-1] = ("x-webhook-secret", "guessed")
        for _ in range(4):
            assert (await station.post(forged)).status_code == 401
        await station.world.post("/webhooks/fal/anything", content=b"{}")

        seen = await eventually(lambda: listed(station), lambda found: len(found) == 5)
        by_kind = {one["kind"]: one for one in seen if one["provider"] == "eachlabs"}
        assert {kind: one["times"] for kind, one in by_kind.items()} == {
            "rejected": 4,
            "late": 1,
            "duplicate": 2,
            "unmatched": 1,
        }
        for kind in ("late", "duplicate", "unmatched"):
            assert by_kind[kind]["prediction_id"] == sent.prediction_id
            assert by_kind[kind]["event_id"] == f"evt_{sent.prediction_id[5:]}"
        assert by_kind["rejected"]["source"] == STRANGER[0]
        assert by_kind["rejected"]["reason"] == "bad_secret"
        [at_fal] = await listed(station, "kind=rejected&provider=fal")
        assert (at_fal["reason"], at_fal["times"]) == ("bad_token", 1)

        first = (await station.http.get("/v1/discarded?limit=2")).json()
        rest = f"/v1/discarded?limit=100&cursor={first['next_cursor']}"
        second = (await station.http.get(rest)).json()
        assert [*first["data"], *second["data"]] == seen
        assert second["next_cursor"] is None


@pytest.mark.parametrize(
    "query",
    [
        "kind=strange",
        "limit=0",
        "limit=101",
        "cursor=%00",
        "cursor=WzEsMl0=",
        "cursor=1_00%0A",
        "color=red",
    ],
)
async def test_invalid_list_query_returns_422(start: Start, query: str, on_sqlite: None) -> None:  # noqa: ARG001
    async with start() as station:
        answer = await station.http.get(f"/v1/discarded?{query}")
        assert (answer.status_code, answer.json()["type"]) == (
            422,
            "urn:receiver:problem:invalid-request",
        )


async def test_first_unmatched_event_of_each_model_and_type_logs_a_warning(
    start: Start,
    logged: Logged,
    on_sqlite: None,  # noqa: ARG001
) -> None:
    async with start() as station:
        for number in range(3):
            sent = await station.submitted("eachlabs", f"picture {number}")
            await station.push(sent, ok=number < 2)
        other = await station.submitted("eachlabs", "another model", model="other")
        await station.push(other)
    warned = [line for line in logged if line["event"] == "event.unmatched"]
    assert [(line["model"], line["type"]) for line in warned] == [
        ("nano-banana", "prediction.succeeded"),
        ("nano-banana", "prediction.failed"),
        ("other", "prediction.succeeded"),
    ]


async def test_flood_of_unverified_callbacks_is_one_row_after_shutdown(start: Start) -> None:
    async with start() as station:
        flood = [station.world.post(f"/webhooks/fal/{n}", content=b"x") for n in range(300)]
        assert {answer.status_code for answer in await asyncio.gather(*flood)} == {401}
    async with start() as station:
        [one] = await listed(station, "kind=rejected")
        assert (one["times"], one["source"], one["prediction_id"]) == (300, STRANGER[0], None)
        answer = await station.world.get("/v1/discarded")
        assert answer.status_code == 401
        key = {"authorization": f"Bearer {API_KEY}"}
        assert (await station.world.get("/v1/discarded", headers=key)).status_code == 200


class Shelf:
    """A store of counts that is unavailable while it is closed."""

    def __init__(self) -> None:
        self.closed = False
        self.kept: list[Rejection] = []

    async def keep(self, rejections: Any) -> None:
        if self.closed:
            raise StoreUnavailable("closed")
        self.kept += rejections


async def test_rejection_counts_that_failed_to_write_are_kept_for_the_next_write() -> None:
    shelf = Shelf()
    shelf.closed = True
    rejections = Rejections(shelf.keep, lambda: 7.0)
    rejections.count("fal", "bad_token", "1.1.1.1")
    await rejections.stop()
    rejections.count("fal", "bad_token", "1.1.1.1")
    shelf.closed = False
    await rejections.stop()
    await rejections.stop()
    assert shelf.kept == [Rejection("fal", "bad_token", "1.1.1.1", 2, 7.0, 7.0)]


async def test_rejection_counts_of_many_addresses_use_bounded_memory() -> None:
    shelf = Shelf()
    rejections = Rejections(shelf.keep, lambda: 7.0)
    for number in range(1500):
        rejections.count("fal", "bad_token", f"host-{number}")
    rejections.count("fal", "bad_token", "\x1b[31m" + "x" * 1000)
    await rejections.stop()
    assert len(shelf.kept) == 1001
    assert {one.source: one.times for one in shelf.kept}[OTHER] == 501
    assert sum(one.times for one in shelf.kept) == 1501


def test_long_client_address_is_truncated() -> None:
    shelf = Shelf()
    rejections = Rejections(shelf.keep, lambda: 7.0)
    rejections.count("fal", "bad_token", "x" * 1000)
    asyncio.run(rejections.stop())
    assert [one.source for one in shelf.kept] == ["x" * 64]
