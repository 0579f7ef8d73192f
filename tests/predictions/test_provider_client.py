"""The client of one provider: its rate limit, its pause after a 429, and transport errors."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from receiver.model.errors import StoreUnavailable, Unreadable
from receiver.observability.runtime import Runtime
from receiver.predictions.provider_client import Busy, ProviderClient
from receiver.store.limits import LimitStore, RequestPermit
from tests.clocks import ManualClock, StoppedClock
from tests.conftest import Start
from tests.receiving import Network, eventually, reply

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

URL = "https://providers.test/eachlabs/v1/prediction/1"


class ScriptedLimit(LimitStore):
    """A rate limit that gives the wait, or the failure, that a test has set."""

    def __init__(self) -> None:
        self.taken: list[RequestPermit] = []
        self.wait = 0.0
        self.unavailable = False

    async def take(self, permit: RequestPermit) -> float:
        if self.unavailable:
            raise StoreUnavailable("unavailable")
        self.taken.append(permit)
        return self.wait


class Parts:
    """A provider client with its network, rate limit and clock."""

    def __init__(self, per_minute: int | None = 60) -> None:
        self.network = Network()
        self.limit = ScriptedLimit()
        self.clock = ManualClock()
        http = httpx.AsyncClient(transport=self.network)
        runtime = Runtime(clock=self.clock, monotonic=self.clock)
        self.client = ProviderClient("eachlabs", per_minute, http, self.limit, runtime)

    async def ask(self) -> Any:
        return await self.client.ask(httpx.Request("GET", URL))

    @property
    def calls(self) -> int:
        return len(self.network.calls)


async def test_each_ask_takes_one_permit_of_the_rate_limit() -> None:
    parts = Parts()
    parts.network.always("eachlabs.poll", reply({}))
    for number in (1, 2):
        answer = await parts.ask()
        assert (answer.status, parts.calls) == (200, number)
        assert answer.at == parts.clock.now
    assert parts.limit.taken == [RequestPermit(provider="eachlabs", now=1000.0, per_minute=60)] * 2


async def test_send_takes_no_permit_of_the_rate_limit() -> None:
    parts = Parts()
    await parts.client.send(httpx.Request("GET", URL), 5.0)
    assert (parts.calls, parts.limit.taken) == (1, [])


async def test_ask_takes_no_permit_without_a_rate_limit() -> None:
    parts = Parts(per_minute=None)
    await parts.ask()
    assert (parts.calls, parts.limit.taken) == (1, [])


async def test_ask_over_the_rate_limit_raises_busy_with_the_wait() -> None:
    parts = Parts()
    parts.limit.wait = 12.3456
    with pytest.raises(Busy) as busy:
        await parts.ask()
    assert busy.value.seconds == busy.value.after == 12.3456
    assert str(busy.value) == "no more requests for 12.3 s"
    assert isinstance(busy.value, Unreadable)
    assert parts.calls == 0


async def test_ask_sends_nothing_if_the_store_is_unavailable() -> None:
    parts = Parts()
    parts.limit.unavailable = True
    with pytest.raises(StoreUnavailable):
        await parts.ask()
    assert parts.calls == 0


@pytest.mark.parametrize(
    ("headers", "seconds"), [({"retry_after": "30"}, 30.0), ({}, 1.0), ({"retry_after": "0"}, 1.0)]
)
async def test_429_pauses_the_provider_for_its_retry_after(
    headers: dict[str, str], seconds: float
) -> None:
    parts = Parts()
    parts.network.script("eachlabs.poll", reply({}, 429, **headers))
    with pytest.raises(Unreadable, match="HTTP 429") as error:
        await parts.ask()
    assert not isinstance(error.value, Busy)  # it was sent, so it counts
    assert parts.client.paused() == seconds
    taken = len(parts.limit.taken)
    with pytest.raises(Busy) as busy:
        await parts.ask()
    assert busy.value.seconds == seconds
    assert (parts.calls, len(parts.limit.taken)) == (1, taken)  # unsent, so without a permit
    parts.clock.now += seconds
    assert parts.client.paused() == 0.0
    await parts.ask()
    assert parts.calls == 2


async def test_shorter_pause_does_not_shorten_a_longer_one() -> None:
    parts = Parts()
    parts.client.pause(30.0)
    parts.clock.now += 10
    parts.client.pause(5.0)
    assert parts.client.paused() == 20.0
    parts.client.pause(40.0)
    assert parts.client.paused() == 40.0
    parts.client.pause(None)
    assert parts.client.paused() == 40.0


@pytest.mark.parametrize(
    "error", [httpx.ConnectError, httpx.ReadTimeout, httpx.RemoteProtocolError, httpx.InvalidURL]
)
async def test_transport_error_is_unreadable_and_does_not_pause(error: Any) -> None:
    parts = Parts()

    def broken(_: httpx.Request) -> httpx.Response:
        raise error("broken")

    parts.network.script("eachlabs.poll", broken)
    with pytest.raises(Unreadable, match=f"{error.__name__}: broken"):
        await parts.ask()
    assert parts.client.paused() == 0.0


async def test_redirect_is_returned_and_not_followed() -> None:
    parts = Parts()
    parts.network.script("eachlabs.poll", reply({}, 302, location="https://elsewhere.test/"))
    assert (await parts.ask()).status == 302
    assert parts.calls == 1


# --- polls and cancels over the rate limit ---


async def test_poll_over_the_rate_limit_is_made_when_the_limit_allows(
    start: Start, network: Network
) -> None:
    clock = StoppedClock()
    async with start(
        clock=clock, RECEIVER_POLL_AFTER="0.05", EACHLABS_REQUESTS_PER_MINUTE="2"
    ) as station:
        prediction = await station.submit("eachlabs")
        due = "SELECT due_at FROM predictions"
        clock.ahead = 0.125
        await eventually(lambda: station.one(due) - clock.began, lambda at: 0.125 < at < 1)
        assert network.count("eachlabs.poll") == 1
        network.always("eachlabs.poll", network.ends)
        # The limit is used up; the poll is due when the minute is over.
        clock.ahead = 1
        await eventually(
            lambda: station.one(due) - clock.began, lambda at: at == pytest.approx(60, abs=0.001)
        )
        assert network.count("eachlabs.poll") == 1
        assert station.one("SELECT sum(requests) FROM requests") == 2
        clock.ahead = 62
        await station.http.post("/v1/drain")
        found = await station.until(prediction["id"], "succeeded")
        assert (found["channel"], network.count("eachlabs.poll")) == ("poll", 2)
        # Requests older than the window are deleted.
        assert station.one("SELECT sum(requests) FROM requests") == 1


async def test_cancel_over_the_rate_limit_returns_429_to_the_caller(
    start: Start, network: Network
) -> None:
    async with start(EACHLABS_REQUESTS_PER_MINUTE="1") as station:
        prediction = await station.submit("eachlabs")
        answer = await station.http.post(f"/v1/predictions/{prediction['id']}/cancel")
        assert network.count("eachlabs.cancel") == 0
        assert (answer.status_code, answer.json()["type"]) == (
            429,
            "urn:receiver:problem:provider-busy",
        )
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert (await station.read(prediction["id"]))["status"] == "processing"
