"""Orders through /v1/recipes, on both engines: permissions, limits, idempotency, deadlines."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver import Event, on
from tests.conftest import Disk, Start
from tests.postgres import Database
from tests.receiving import Clock, Json, Network, Station, eventually, hangs, receiving

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

RECIPES = """
[imagine]
about = "A picture"
provider = "eachlabs"
model = "nano-banana"
input = { prompt = "{prompt}", num_images = "{count}" }
metadata = { kind = "picture" }
price = 0.4

[imagine.options.prompt]
required = true
rest = true

[imagine.options.count]
kind = "integer"
most = 4

[imagine.buttons]
Again = "imagine"
Larger = { recipe = "upscale", result = "image" }

[upscale]
provider = "fal"
model = "fal-ai/upscale"
input = { image_url = "{image}" }

[upscale.options.image]
kind = "picture"
required = true

[soon]
provider = "eachlabs"
model = "nano-banana"
input = { prompt = "soon" }
latest = 0.3

[[allow]]
place = "club/*"

"""
COUNTS = """
[[limits]]
by = "person"
per = "month"
count = 15

[[limits]]
by = "all"
per = "month"
count = 20

[[limits]]
by = "metadata.team"
per = "month"
count = 12
"""
MONEY = """
[[limits]]
by = "place"
per = "month"
cost = 1.00
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    return written(tmp_path / "recipes.toml", RECIPES)


def written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


async def order(
    station: Station, name: str = "imagine", key: str = "", **body: Any
) -> httpx.Response:
    body = {"options": {"prompt": "a fox"} if name == "imagine" else {}, **body}
    headers = {"Idempotency-Key": key} if key else {}
    return await station.http.post(f"/v1/recipes/{name}", json=body, headers=headers)


@asynccontextmanager
async def both(start: Start, **env: str) -> AsyncIterator[tuple[Station, Station]]:
    """Run two servers on one database; SQLite allows only one, which is then yielded twice."""
    async with start(**env) as one:
        if isinstance(one.database, Path):
            yield one, one
            return
        async with start(**env) as two:
            yield one, two


def problem_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].rpartition(":")[2]


async def test_order_makes_a_prediction_that_names_recipe_person_and_place(
    start: Start, recipes: Path
) -> None:
    seen: list[Event] = []

    @on("succeeded")
    async def keep(event: Event) -> None:
        seen.append(event)

    about = {"person": "ada", "place": "club/1"}
    async with start(keep, RECEIVER_RECIPES=str(recipes)) as station:
        listed = (await station.http.get("/v1/recipes")).json()["data"]
        assert [recipe["name"] for recipe in listed] == ["imagine", "upscale", "soon"]
        assert listed[0]["options"]["properties"]["count"] == {"type": "integer", "maximum": 4}
        options = {"prompt": "a fox", "count": 2}
        answer = await order(station, options=options, metadata={"a": 1, "kind": "x"}, **about)
        made = answer.json()
        assert answer.status_code == 202
        assert answer.headers["location"] == f"../predictions/{made['id']}"
        assert made["input"] == {"prompt": "a fox", "num_images": 2}
        assert made["metadata"] == {"a": 1, "kind": "picture"}
        assert made["order"] == {"recipe": "imagine", **about, "via": "api"}
        await eventually(lambda: station.network.sent)
        await station.push(station.network.of("a fox"))
        await eventually(lambda: seen)
        assert seen[0].prediction.order is not None
        assert seen[0].prediction.order.person == "ada"
        assert station.one("SELECT price FROM orders") == 400_000

        # an erased prediction does not name the person
        path = f"/v1/predictions/{made['id']}/erase"
        erased = await eventually(lambda: station.http.post(path), lambda it: it.is_success)
        assert erased.json()["order"] is None
        assert station.one("SELECT options FROM orders") == "{}"


@pytest.mark.parametrize("bad", [{"person": "u\n"}, {"person": "u\0v"}, {"place": "club/\x1b[2J"}])
async def test_control_characters_in_person_or_place_return_422(
    start: Start, recipes: Path, bad: dict[str, str]
) -> None:
    async with start(RECEIVER_RECIPES=str(recipes)) as station:
        answer = await order(station, **{"person": "ada", "place": "club/1", **bad})
        assert problem_of(answer) == (422, "invalid-request")
        assert station.count("predictions") == 0


async def test_idempotency_key_of_an_order_never_expires(start: Start, recipes: Path) -> None:
    async with start(RECEIVER_RECIPES=str(recipes), EACHLABS_MAX_IN_FLIGHT="1") as station:
        answers = await asyncio.gather(
            *(order(station, key="order-1", options={"prompt": f"fox {n}"}) for n in range(8))
        )
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert station.count("orders") == station.count("predictions") == 1
        [first, *_] = [answer.json() for answer in answers]
        other = (await order(station, key="order-2")).json()
        assert other["id"] != first["id"]
        await station.until(first["id"], "processing")
    written(recipes, RECIPES.replace("[imagine", "[draw").replace('"imagine"', '"draw"'))
    async with start(RECEIVER_RECIPES=str(recipes), EACHLABS_MAX_IN_FLIGHT="1") as station:
        again = await order(station, key="order-1")
        assert again.json()["id"] == first["id"]
        assert again.json()["input"] == first["input"]
        assert problem_of(await order(station, key="order-3")) == (404, "unknown-recipe")
        # if its prediction was deleted, the key orders nothing in its place
        station.edit(f"DELETE FROM predictions WHERE id = '{other['id']}'")
        assert problem_of(await order(station, key="order-2")) == (409, "too-late")
        assert station.count("predictions") == 1


REFUSED: list[tuple[str, Json, int, str, str]] = [
    ("imagin", {}, 404, "unknown-recipe", "did you mean imagine?"),
    ("imagine", {"options": {}}, 422, "bad-option", "prompt is missing"),
    ("imagine", {"options": {"prompt": "x", "count": 9}}, 422, "bad-option", "--count 4"),
    ("imagine", {"options": {"prompt": ["x"]}}, 422, "bad-option", "prompt must be a text"),
    ("imagine", {"options": {"prompt": "x", "count": 2**70}}, 422, "bad-option", "whole"),
    ("imagine", {"person": "eve"}, 403, "not-allowed", "you may not order here"),
    ("imagine", {"place": "bar/1", "person": "ada"}, 403, "not-allowed", "may not"),
    ("upscale", {"options": {"image": "file:///etc/passwd"}}, 422, "bad-option", "https://…"),
]


async def test_rejected_order_makes_no_prediction_and_is_counted_as_discarded(
    start: Start, recipes: Path
) -> None:
    counted: Counter[str] = Counter()
    async with start(RECEIVER_RECIPES=str(recipes)) as station:
        for name, body, status, code, words in REFUSED:
            for _ in range(2):
                answer = await order(station, name, **body)
                assert problem_of(answer) == (status, code), words
                assert words in answer.json()["detail"]
            counted[code] += 2
            assert station.count("predictions") == station.count("orders") == 0, words
            listed: Counter[str] = Counter()
            for one in (await station.http.get("/v1/discarded?kind=rejected")).json()["data"]:
                listed[one["reason"]] += one["times"]
            assert listed == counted, words
        page = (await station.http.get("/v1/discarded?kind=rejected")).json()["data"]
        assert {one["source"] for one in page} == {
            "api",
            "api imagine",
            "api imagine eve",
            "api imagine bar/1 ada",
            "api upscale",
        }


async def test_fifty_concurrent_orders_at_two_servers_stay_within_limits(
    start: Start, recipes: Path
) -> None:
    """Each order counts for three limits, which it shares with different other orders."""
    written(recipes, RECIPES + COUNTS)
    env = {"RECEIVER_RECIPES": str(recipes), "EACHLABS_MAX_IN_FLIGHT": "1"}

    def body(number: int) -> Json:
        about = {"person": ("ada", "bob", "cid")[number % 3], "place": "club/1"}
        return {**about, "metadata": {"team": number % 2}}

    async with both(start, **env) as servers:
        one = servers[0]
        answers = await asyncio.gather(*(order(servers[n // 3 % 2], **body(n)) for n in range(50)))
        results = Counter(answer.status_code for answer in answers)
        assert results == {202: 20, 429: 30}
        assert one.count("predictions") == one.count("orders") == 20
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert problem_of(refused) == (429, "over-limit")
        assert 0 < int(refused.headers["retry-after"]) <= 31 * 86400
        assert "try again in" in refused.json()["detail"]
        # a new month starts at zero; here only the limit of a person applies
        one.clock.ahead += int(refused.headers["retry-after"]) + 1
        statuses = [(await order(one, person="ada", place="club/2")).status_code for _ in range(16)]
        assert statuses == [202] * 15 + [429]
        assert (await order(one, person="bob", place="club/2")).status_code == 202


@pytest.mark.parametrize("per", ["hour", "day", "month"])
async def test_server_clock_far_ahead_does_not_change_the_limits_of_today(
    start: Start, recipes: Path, per: str
) -> None:
    """Each hour, day or month has its own count, even if one server's clock stays ahead."""
    written(recipes, f'{RECIPES}[[limits]]\nby = "all"\nper = "{per}"\ncount = 3\n')
    async with both(start, RECEIVER_RECIPES=str(recipes)) as (one, other):
        right = 600 - time.time() % 3600  # ten minutes past an hour: no period ends meanwhile

        async def statuses(*days_ahead: int) -> list[int]:
            found = []
            for number, days in enumerate(days_ahead):
                server = (one, other)[number % 2]
                server.clock.ahead = right + 86400 * days
                found.append((await order(server)).status_code)
            return found

        assert await statuses(0, 400, 0, 400, 0, 400) == [202] * 6
        assert await statuses(0, 400, 0, 400) == [429] * 4
        assert one.count("orders") == 6


async def test_order_over_budget_or_of_unknown_price_returns_402(
    start: Start, recipes: Path
) -> None:
    written(recipes, RECIPES + MONEY)
    async with start(RECEIVER_RECIPES=str(recipes)) as station:
        answers = await asyncio.gather(*(order(station, place="club/1") for _ in range(5)))
        assert Counter(answer.status_code for answer in answers) == {202: 2, 402: 3}
        over = next(answer for answer in answers if answer.status_code == 402)
        assert problem_of(over) == (402, "over-budget")
        assert "$1 a month in each place" in over.json()["detail"]
        assert problem_of(await order(station, "soon", place="club/1")) == (402, "price-unknown")
        # The limit is only for orders with a place.
        assert (await order(station, "soon")).status_code == 202
        assert (await order(station, place="club/2")).status_code == 202


async def test_order_not_submitted_before_its_deadline_expires(start: Start, recipes: Path) -> None:
    ends: list[Event] = []

    @on("failed")
    async def failed(event: Event) -> None:
        ends.append(event)

    async with start(failed, RECEIVER_RECIPES=str(recipes), EACHLABS_MAX_IN_FLIGHT="1") as station:
        await station.submitted("eachlabs")  # the provider has no room for more
        late = (await order(station, "soon")).json()
        ended = await station.until(late["id"], "failed")
        assert ended["error"]["code"] == "expired"
        await eventually(lambda: ends)
        assert ends[0].prediction.id == late["id"]


async def queued_past_its_deadline(start: Start, env: dict[str, str]) -> tuple[str, Clock]:
    """Leave an order in the queue; return its id, and a clock that is past its deadline."""
    async with start(**env, EACHLABS_MAX_IN_FLIGHT="1") as station:
        await station.submitted("eachlabs")  # the provider has no room for more
        late = (await order(station, "soon")).json()
    clock = Clock()
    clock.ahead = 601
    return late["id"], clock


async def test_order_expires_if_there_is_room_only_after_its_deadline(
    start: Start, recipes: Path
) -> None:
    env = {"RECEIVER_RECIPES": str(written(recipes, RECIPES.replace("0.3", "600")))}
    late, clock = await queued_past_its_deadline(start, env)
    async with start(**env, EACHLABS_MAX_IN_FLIGHT="2", clock=clock) as station:
        ended = await station.until(late, "failed")
        assert ended["error"]["code"] == "expired"
    assert station.network.count("eachlabs.submit") == 1


async def test_queued_order_expires_even_if_its_provider_is_disabled(
    start: Start, recipes: Path
) -> None:
    env = {"RECEIVER_RECIPES": str(written(recipes, RECIPES.replace("0.3", "600")))}
    late, clock = await queued_past_its_deadline(start, env)
    async with start(**env, EACHLABS_API_KEY=None, clock=clock) as station:
        ended = await station.until(late, "failed")
        assert ended["error"]["code"] == "expired"
        assert "too late" in ended["error"]["message"]
        assert problem_of(await order(station, "soon")) == (422, "provider-off")


async def test_same_idempotency_key_at_two_servers_is_one_order(
    database: Database, network: Network, recipes: Path
) -> None:
    async with (
        receiving(database, network, RECEIVER_RECIPES=str(recipes)) as one,
        receiving(database, network, RECEIVER_RECIPES=str(recipes)) as two,
    ):
        servers = (one, two)
        ordering = [order(servers[n % 2], key=f"k{n // 10}") for n in range(40)]
        answers = await asyncio.gather(*ordering)
        assert len({answer.json()["id"] for answer in answers}) == 4
        assert servers[0].count("predictions") == servers[0].count("orders") == 4


@pytest.mark.usefixtures("stops_soon")
async def test_order_is_answered_without_waiting_for_the_provider(
    start: Start, recipes: Path
) -> None:
    async with start(RECEIVER_RECIPES=str(recipes)) as station:
        station.network.always("eachlabs.submit", hangs)
        assert (await order(station)).status_code == 202
        await eventually(lambda: station.network.count("eachlabs.submit") == 1)


async def test_order_with_prefer_wait_waits_for_the_outcome(start: Start, recipes: Path) -> None:
    async with start(RECEIVER_RECIPES=str(recipes)) as station:
        ordering = asyncio.create_task(
            station.http.post(
                "/v1/recipes/imagine",
                json={"options": {"prompt": "a fox"}},
                headers={"Prefer": "wait=60"},
            )
        )
        await eventually(lambda: station.network.sent)
        await station.push(station.network.of("a fox"))
        answer = await ordering
        assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
        assert answer.headers["preference-applied"] == "wait=60"


async def test_full_disk_returns_503_and_orders_nothing(
    start: Start, recipes: Path, disk: Disk
) -> None:
    async with start(RECEIVER_RECIPES=str(recipes)) as station:
        disk.full = True
        assert (await order(station, key="k")).status_code == 503
        disk.full = False
        assert (await order(station, key="k")).status_code == 202
        assert station.count("orders") == 1
