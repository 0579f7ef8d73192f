"""Costs and budgets through the whole receiver: prices, limits, sums and reports."""

from __future__ import annotations

import asyncio
import csv
import io
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from receiver import Context, Event, on
from receiver.model.answers import CostReport, CostRow
from receiver.predictions import bills
from receiver.predictions.costs import as_csv
from tests.conftest import Start
from tests.receiving import API_KEY, OTHER_API_KEY, Json, Station, eventually, reply

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

PRICES: Final = """
["fal/fal-ai/nano-banana"]
image = 0.05

["fal/*video*"]
second = 0.1
least = 0.3
"""
NAMED: Final = f"web:{API_KEY},bot:{OTHER_API_KEY}"
PROBLEM: Final = "urn:receiver:problem:"
BOT: Final = {"authorization": f"Bearer {OTHER_API_KEY}"}


@pytest.fixture
def prices(tmp_path: Path) -> str:
    file = tmp_path / "prices.toml"
    file.write_text(PRICES)
    return str(file)


@pytest.fixture
def asked_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask providers for costs soon after a test moves the clock: this pause runs on real time."""
    monkeypatch.setattr(bills, "_NAP", 0.1)


async def ask(station: Station, provider: str = "fal", **given: Any) -> httpx.Response:
    """Submit a prediction; return the answer, also if it is an error."""
    headers = given.pop("headers", None)
    body = {"provider": provider, "model": "fal-ai/nano-banana", "input": {"prompt": "x"}, **given}
    return await station.http.post("/v1/predictions", json=body, headers=headers)


def refused(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["type"].removeprefix(PROBLEM)


async def costs(station: Station, by: str = "day", **given: str) -> dict[tuple[Any, ...], Json]:
    """Return the rows of the cost report by their groups."""
    answer = await station.http.get("/v1/costs", params={"by": by, **given})
    assert answer.status_code == 200, answer.text
    return {tuple(row["of"].values()): row for row in answer.json()["data"]}


async def cost_of(station: Station, prediction_id: str) -> Json | None:
    found: Json | None = (await station.read(prediction_id))["cost"]
    return found


@pytest.mark.usefixtures("asked_soon")
async def test_cost_is_computed_until_the_provider_reports_it(start: Start, prices: str) -> None:
    async with start(RECEIVER_PRICES=prices, FAL_ADMIN_KEY="an-admin-key") as station:
        sent = await station.submitted("fal", "one")
        assert await cost_of(station, sent.prediction_id) is None
        station.network.emulator.end(sent.prediction)
        await station.push(sent)
        assert await cost_of(station, sent.prediction_id) == {
            "amount": 0.05,
            "currency": "USD",
            "source": "computed",
        }
        asked = await station.submitted("eachlabs", "two")
        station.network.emulator.end(asked.prediction)
        await station.push(asked)
        assert await cost_of(station, asked.prediction_id) is None
        found = await costs(station, "provider")
        assert found["fal",]["amount"] == 0.05
        assert (found["eachlabs",]["amount"], found["eachlabs",]["unknown"]) == (0, 1)
        station.clock.ahead += 1000
        for one in (sent, asked):
            assert await eventually(
                lambda one=one: cost_of(station, one.prediction_id),  # type: ignore[misc]
                lambda cost: cost and cost["source"] == "provider",
            ) == {"amount": 0.039, "currency": "USD", "source": "provider"}
        found = await costs(station, "provider,model")
        assert {(row["amount"], row["predictions"], row["unknown"]) for row in found.values()} == {
            (0.039, 1, 0)
        }
        assert station.count("cost_questions") == 0


@pytest.mark.usefixtures("asked_soon")
async def test_cost_is_units_times_list_price_if_nothing_else_is_known(start: Start) -> None:
    """After a callback the units are read from the result; a poll's answer contains them."""
    async with start() as station:
        fal = station.network.emulator
        pushed = await station.submitted("fal", "pushed")
        polled = await station.submitted("fal", "polled")
        for one in (pushed, polled):
            one.prediction.billed = 2
            fal.end(one.prediction)
        await station.push(pushed)
        await station.push(polled, body=b"unreadable, so it is asked")
        found = await station.until(polled.prediction_id, "succeeded")
        assert found["cost"] is None
        reads = station.network.count("fal.result")
        station.clock.ahead += 100
        for one in (pushed, polled):
            assert await eventually(lambda one=one: cost_of(station, one.prediction_id)) == {  # type: ignore[misc]
                "amount": 0.078,
                "currency": "USD",
                "source": "computed",
            }
        assert station.network.count("fal.result") == reads + 1
        assert station.network.count("fal.price") == 1
        [row] = (await costs(station, "provider")).values()
        assert (row["amount"], row["predictions"], row["unknown"]) == (0.156, 2, 0)
        assert station.count("cost_questions") == 0


async def test_configured_price_overrides_the_providers_price_list(
    start: Start, prices: str
) -> None:
    async with start(RECEIVER_PRICES=prices) as station:
        sent = await station.submitted("fal")
        station.network.emulator.end(sent.prediction)
        await station.push(sent)
        assert (await cost_of(station, sent.prediction_id) or {})["amount"] == 0.05
        assert station.count("cost_questions") == 0


async def test_poll_result_can_include_the_cost(start: Start) -> None:
    async with start(EACHLABS_CONFIRM="1") as station:
        sent = await station.submitted("eachlabs")
        station.network.emulator.end(sent.prediction)
        await station.push(sent)
        found = await station.until(sent.prediction_id, "succeeded")
        assert found["cost"] == {"amount": 0.039, "currency": "USD", "source": "provider"}
        assert station.count("cost_questions") == 0


async def test_rejected_or_never_submitted_prediction_costs_nothing(
    start: Start, prices: str
) -> None:
    limits = '[{"by": "all", "per": "month", "cost": 0.12}]'
    async with start(RECEIVER_PRICES=prices, RECEIVER_LIMITS=limits) as station:
        station.network.script("fal.submit", reply({"detail": "no"}, 400))
        first = (await ask(station)).json()
        assert (first["status"], first["cost"]["amount"]) == ("failed", 0)
        station.network.always("fal.submit", reply({"detail": "busy"}, 429))
        second = (await ask(station)).json()
        third = (await ask(station)).json()
        assert refused(await ask(station)) == (402, "over-budget")
        for one in (second, third):
            await eventually(lambda one=one: cancel(station, one), lambda s: s == "canceled")  # type: ignore[misc]
            assert (await cost_of(station, one["id"]) or {})["amount"] == 0
        assert (await ask(station)).status_code == 202
        entries = Counter(entry for (entry,) in station.rows("SELECT entry FROM ledger"))
        assert entries == {"reserved": 4, "released": 3}


async def cancel(station: Station, prediction: Json) -> str:
    answer = await station.http.post(f"/v1/predictions/{prediction['id']}/cancel")
    return str(answer.json().get("status"))


async def test_ambiguous_submit_keeps_its_budget_reservation(start: Start, prices: str) -> None:
    limits = '[{"by": "all", "per": "month", "cost": 0.05}]'
    async with start(RECEIVER_PRICES=prices, RECEIVER_LIMITS=limits) as station:
        station.network.script("fal.submit", reply("gone", 200))
        asked = (await ask(station)).json()
        await station.until(asked["id"], "unconfirmed")
        assert refused(await ask(station)) == (402, "over-budget")
        assert station.rows("SELECT entry FROM ledger") == [("reserved",)]


async def test_limits_count_submits_by_api_key_but_not_idempotent_repeats(start: Start) -> None:
    limits = '[{"by": "key", "per": "hour", "count": 2}, {"by": "all", "per": "month", "count": 3}]'
    async with start(RECEIVER_API_KEYS=NAMED, RECEIVER_LIMITS=limits) as station:
        for _ in range(2):
            again = await ask(station, headers={"idempotency-key": "k"})
            assert again.status_code == 202
        assert (await ask(station)).status_code == 202
        answer = await ask(station)
        assert refused(answer) == (429, "over-limit")
        assert "2 an hour for each API key" in answer.json()["detail"]
        assert int(answer.headers["retry-after"]) > 0
        assert (await ask(station, headers=BOT)).status_code == 202
        assert refused(await ask(station, headers=BOT)) == (429, "over-limit")
        assert (await ask(station, headers={"idempotency-key": "k"})).status_code == 202
        assert station.count("predictions") == 3


async def test_budget_refuses_submits_of_unknown_price_or_over_the_amount(
    start: Start, prices: str
) -> None:
    limits = '[{"by": "provider", "per": "month", "cost": 0.7}]'
    async with start(RECEIVER_PRICES=prices, RECEIVER_LIMITS=limits) as station:
        assert refused(await ask(station, model="fal-ai/other")) == (402, "price-unknown")
        # The video's duration is missing, so its price is unknown.
        assert refused(await ask(station, model="fal-ai/video")) == (402, "price-unknown")
        long: Json = {"model": "fal-ai/video", "input": {"prompt": "x", "duration": "5s"}}
        assert (await ask(station, **long)).status_code == 202
        assert refused(await ask(station, **long)) == (402, "over-budget")
        many: Json = {"input": {"prompt": "x", "num_images": 5}}
        assert refused(await ask(station, **many)) == (402, "over-budget")
        assert (await ask(station)).status_code == 202
        assert station.count("predictions") == 2


@on("succeeded", provider="fal", name="again")
async def again(event: Event, ctx: Context) -> None:
    await ctx.submit("eachlabs", "nano-banana", {"prompt": f"{event.prediction.input['prompt']}2"})


async def test_prediction_submitted_by_a_handler_counts_for_the_first_api_key(start: Start) -> None:
    limits = '[{"by": "key", "per": "month", "count": 3}]'
    async with start(
        again, RECEIVER_API_KEYS=NAMED, RECEIVER_LIMITS=limits, RECEIVER_COSTS_BY="team"
    ) as station:
        for prompt in ("a", "b"):
            sent = await station.submitted("fal", prompt, headers=BOT, metadata={"team": "x"})
            await station.push(sent)
            if prompt == "a":
                await eventually(lambda: station.count("predictions") == 2)
        await eventually(
            lambda: [row for row in station.rows("SELECT reason FROM attempts") if row[0]]
        )
        [reason] = {row[0] for row in station.rows("SELECT reason FROM attempts") if row[0]}
        assert "3 a month for each API key" in reason
        assert station.count("predictions") == 3
        assert (await ask(station)).status_code == 202  # another key has its own limit
        found = await costs(station, "key,provider,metadata.team")
        assert found["bot", "fal", "x"]["unknown"] == 2


async def test_two_servers_together_stay_within_one_budget(start: Start, prices: str) -> None:
    limits = (
        '[{"by": "all", "per": "month", "cost": 0.35}, {"by": "all", "per": "day", "count": 50}]'
    )
    given = {"RECEIVER_PRICES": prices, "RECEIVER_LIMITS": limits}
    async with start(**given) as one:
        if isinstance(one.database, Path):  # SQLite has one process only
            answers = await asyncio.gather(*(ask(one) for _ in range(24)))
        else:
            async with start(**given) as other:
                both = (one, other)
                answers = await asyncio.gather(*(ask(both[n % 2]) for n in range(24)))
        kinds = Counter(answer.status_code for answer in answers)
        assert kinds == {202: 7, 402: 17}
        assert one.count("predictions") == 7
        [(spent,)] = one.rows("SELECT spent FROM order_counts WHERE kind = 'all/month'")
        assert spent == 350_000


def test_csv_cell_that_looks_like_a_formula_is_escaped() -> None:
    texts = ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", "＝1", "a=1", ""]  # noqa: RUF001
    day = date(2026, 11, 29)
    rows = [CostRow(of={"model": each}, amount=0.0, predictions=1, unknown=0) for each in texts]
    report = CostReport(since=day, until=day, data=rows, total=rows[0])
    cells = [row[0] for row in csv.reader(io.StringIO(as_csv(report), newline=""))][1:]
    assert cells == [*(f"'{each}" for each in texts[:-2]), *texts[-2:]]


async def test_cost_sums_remain_after_a_prediction_is_erased(start: Start, prices: str) -> None:
    async with start(RECEIVER_PRICES=prices, RECEIVER_COSTS_BY="team") as station:
        sent = [
            await station.submitted("fal", f"p{number}", metadata={"team": team})
            for number, team in enumerate(("a", "a", "=b"))
        ]
        for each in sent:
            await station.push(each)
        by = "metadata.team,provider"
        assert {of: row["amount"] for of, row in (await costs(station, by)).items()} == {
            ("a", "fal"): 0.1,
            ("=b", "fal"): 0.05,
        }
        answer = await station.http.get(
            "/v1/costs", params={"by": by}, headers={"accept": "text/csv"}
        )
        assert answer.headers["content-type"].startswith("text/csv")
        assert [*csv.reader(io.StringIO(answer.text))] == [
            ["metadata.team", "provider", "amount", "currency", "predictions", "unknown"],
            ["'=b", "fal", "0.05", "USD", "1", "0"],  # not a formula for a spreadsheet
            ["a", "fal", "0.1", "USD", "2", "0"],
        ]
        last = sent[2].prediction_id
        await station.http.post(f"/v1/predictions/{last}/erase")
        found = await costs(station, by)
        assert {of: row["amount"] for of, row in found.items()} == {
            (None, "fal"): 0.05,
            ("a", "fal"): 0.1,
        }
        assert "=b" not in repr(station.rows("SELECT * FROM cost_sums"))
        assert (await cost_of(station, last) or {})["amount"] == 0.05


async def test_long_unicode_metadata_value_is_truncated_as_a_cost_group(
    start: Start, prices: str
) -> None:
    names = [f"name{number}" for number in range(8)]
    metadata = {
        name: "".join(chr(0x20000 + (number * 7919 + at * 6007) % 40000) for at in range(200))
        for number, name in enumerate(names)
    }
    async with start(RECEIVER_PRICES=prices, RECEIVER_COSTS_BY=",".join(names)) as station:
        sent = await station.submitted("fal", metadata=metadata)
        assert (await station.push(sent)).status_code == 200
        [(label,)] = await costs(station, "metadata.name3")
        assert metadata["name3"].startswith(label)
        assert len(label) > 40


@pytest.mark.parametrize(
    "asked",
    [
        *({"by": by} for by in ("", "week", "day,", "metadata.", "metadata.team", "day,day,x")),
        *({"since": day} for day in ("today", "2026-02-30", "2026-01-01T00:00:00Z")),
        {"of": "x"},
    ],
)
async def test_invalid_cost_report_query_returns_422(start: Start, asked: dict[str, str]) -> None:
    async with start() as station:
        answer = await station.http.get("/v1/costs", params=asked)
        assert refused(answer) == (422, "invalid-request")


async def test_cost_report_with_too_many_rows_returns_422(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.predictions.costs._MOST_SUMS", 1)
    async with start() as station:
        for model in ("a", "b"):
            sent = await station.submitted("fal", model, model=f"fal-ai/{model}")
            await station.push(sent)
        answer = await station.http.get("/v1/costs")
        assert refused(answer) == (422, "invalid-request")


async def test_drain_asks_providers_for_costs_in_serverless_mode(start: Start) -> None:
    async with start(RECEIVER_MODE="serverless") as station:
        sent = await station.submitted("eachlabs")
        station.network.emulator.end(sent.prediction)
        await station.push(sent)
        station.clock.ahead += 100
        await station.http.post("/v1/drain")
        assert (await cost_of(station, sent.prediction_id) or {})["amount"] == 0.039


async def test_cost_report_without_predictions_is_empty(start: Start) -> None:
    async with start() as station:
        given = {"since": "2026-01-01", "until": "2026-02-01"}
        assert (await station.http.get("/v1/costs", params=given)).json() == {
            **given,
            "currency": "USD",
            "data": [],
            "total": {"of": {}, "amount": 0.0, "predictions": 0, "unknown": 0},
        }
