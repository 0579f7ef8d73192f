"""Rate limits, trusted proxies and allowed source addresses."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_network
from typing import Any, Final, Literal

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.http.limits import Budgets, Limits, address
from receiver.http.proxies import Proxied, client_of, within
from receiver.model.errors import Limited
from receiver.providers.fal import read_meta
from receiver.settings import LOOPBACK, Settings
from receiver.settings import Network as Addresses
from tests.clocks import ManualClock
from tests.conftest import Logged, Start
from tests.receiving import (
    API_KEY,
    ENV,
    STRANGER,
    CallbackRequest,
    Clock,
    Network,
    Station,
    breaks,
    reply,
    write,
)

anyio = pytest.mark.anyio
LIMITED: Final = "urn:receiver:problem:rate-limited"


# --- rate limit budgets ---


def test_rate_limit_allows_a_burst_and_then_an_even_rate() -> None:
    clock = ManualClock()
    budgets = Budgets(6, clock)
    for _ in range(6):
        assert budgets.wait(b"a") == 0
        budgets.spend(b"a")
    assert budgets.wait(b"a") == pytest.approx(10)
    assert budgets.wait(b"b") == 0
    clock.now += 9.99
    assert budgets.wait(b"a") == pytest.approx(0.01)
    clock.now += 0.01
    assert budgets.wait(b"a") == 0
    budgets.spend(b"a")
    assert budgets.wait(b"a") == pytest.approx(10)


def test_overdrawn_rate_limit_has_a_bounded_wait() -> None:
    budgets = Budgets(60, ManualClock())
    for _ in range(10_000):
        budgets.spend(b"a")
    assert budgets.wait(b"a") == pytest.approx(61)


def test_without_a_rate_limit_nothing_is_charged() -> None:
    budgets = Budgets(None, ManualClock())
    for _ in range(1000):
        budgets.spend(b"a")
    assert budgets.wait(b"a") == 0


@settings(max_examples=50)
@given(
    rate=st.integers(1, 50),
    moves=st.lists(st.tuples(st.integers(0, 20), st.floats(0, 30)), max_size=80),
)
def test_no_client_exceeds_its_rate_limit(rate: int, moves: list[tuple[int, float]]) -> None:
    clock = ManualClock()
    budgets = Budgets(rate, clock)
    served: dict[int, list[float]] = {}
    for name, seconds in moves:
        clock.now += seconds
        text = b"%d" % name
        if not budgets.wait(text):
            budgets.spend(text)
            served.setdefault(name, []).append(clock.now)
    for times in served.values():
        for first, last in itertools.combinations(range(len(times)), 2):
            assert last - first + 1 <= rate + (times[last] - times[first]) * rate / 60 + 1e-3


def test_request_is_allowed_after_the_announced_wait() -> None:
    clock = ManualClock()
    budgets = Budgets(7, clock)
    while not (wait := budgets.wait(b"a")):
        budgets.spend(b"a")
    clock.now += Limited(wait).seconds
    assert budgets.wait(b"a") == 0


def test_flood_of_addresses_uses_bounded_memory_and_keeps_active_limits() -> None:
    budgets = Budgets(60, ManualClock(), most=1000)
    for _ in range(60):
        budgets.spend(b"the flooder")
    for number in range(3000):
        budgets.spend(b"%d" % number)
        if number % 500 == 0:
            budgets.spend(b"the flooder")
    assert budgets.wait(b"the flooder") > 0
    assert len(budgets._full_at) == 1000  # noqa: SLF001 - its size is the point
    assert not budgets.wait(b"honest")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("unknown", "unknown", True),
        (":nonsense", "unknown", False),
    ],
)
def test_ipv4_address_or_ipv6_64_prefix_shares_one_rate_limit(
    one: str, other: str, *, same: bool
) -> None:
    assert (address(one) == address(other)) is same


def test_flood_of_limited_requests_writes_few_log_lines(logged: Logged) -> None:
    clock = ManualClock()
    limits = Limits(Settings.read({**ENV, "RECEIVER_LIMIT_UNPROVED_PER_MINUTE": "60"}), clock)
    for _ in range(1060):
        try:
            limits.callback("192.0.2.1", "fal", None)
        except Limited:
            clock.now += 0.001
    clock.now += 10
    for _ in range(40):
        try:
            limits.callback("192.0.2.1", "fal", None)
        except Limited:
            clock.now += 0.001
    said = [(line["event"], line["refused"]) for line in logged]
    assert said[0] == ("request.limited", 1)
    assert len(said) == 2
    assert said[1][1] > 900


# --- client addresses behind proxies ---

TRUSTED: Final = (*LOOPBACK, ip_network("10.0.0.0/8"), ip_network("2001:db8:f::/48"))


@pytest.mark.parametrize(
    ("peer", "headers", "caller"),
    [
        ("203.0.113.5", {}, "203.0.113.5"),
        ("203.0.113.5", {"x-forwarded-for": "192.0.2.1"}, "203.0.113.5"),
        ("127.0.0.1", {}, "127.0.0.1"),
        ("127.0.0.1", {"x-forwarded-for": "192.0.2.1"}, "192.0.2.1"),
        ("127.0.0.1", {"x-forwarded-for": "6.6.6.6, 192.0.2.1"}, "192.0.2.1"),
        ("127.0.0.1", {"x-forwarded-for": "6.6.6.6,192.0.2.1, 10.1.2.3,10.0.0.9"}, "192.0.2.1"),
        ("127.0.0.1", {"x-forwarded-for": "10.1.1.1, 10.2.2.2"}, "10.1.1.1"),
        ("127.0.0.1", {"x-forwarded-for": "192.0.2.1:4711"}, "192.0.2.1"),
        ("127.0.0.1", {"x-forwarded-for": "[2001:DB8::1]:4711"}, "2001:db8::1"),
        ("127.0.0.1", {"x-forwarded-for": "2001:db8:0::1"}, "2001:db8::1"),
        ("127.0.0.1", {"x-forwarded-for": "::ffff:192.0.2.1"}, "192.0.2.1"),
        ("127.0.0.1", {"x-forwarded-for": "192.0.2.1, unknown"}, "unknown"),
        ("127.0.0.1", {"x-forwarded-for": "192.0.2.1, '; DROP, 10.0.0.9"}, "'; DROP"),
        ("127.0.0.1", {"x-forwarded-for": ""}, "127.0.0.1"),
        ("::ffff:127.0.0.1", {"x-forwarded-for": "192.0.2.1"}, "192.0.2.1"),
        ("::ffff:203.0.113.5", {}, "203.0.113.5"),
        ("2001:db8:f::1", {"x-forwarded-for": "192.0.2.1"}, "192.0.2.1"),
        ("testclient", {"x-forwarded-for": "192.0.2.1"}, "testclient"),
    ],
)
def test_x_forwarded_for_is_used_only_from_trusted_proxies(
    peer: str, headers: dict[str, str], caller: str
) -> None:
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert seen(peer, given) == caller


def test_end_of_x_forwarded_for_is_used_if_the_peer_is_unknown() -> None:
    forwarded = [(b"x-forwarded-for", b"6.6.6.6, 192.0.2.1"), (b"x-forwarded-for", b"10.0.0.9")]
    assert seen(None, forwarded) == "192.0.2.1"
    assert seen(None, forwarded, ()) == "10.0.0.9"
    assert seen(None, []) == "unknown"


def test_platform_mode_uses_only_the_last_x_forwarded_for_address() -> None:
    forwarded = [(b"x-forwarded-for", b"6.6.6.6, 192.0.2.1:443")]
    assert seen("169.254.1.1", forwarded, "platform") == "192.0.2.1"
    assert seen("169.254.1.1", [(b"x-forwarded-for", b"6.6.6.6, 10.0.0.9")], "platform") == (
        "10.0.0.9"
    )
    assert seen("203.0.113.5", [], "platform") == "203.0.113.5"


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([b"x-forwarded-for", b"forwarded"]), st.binary())))
def test_malformed_forwarded_headers_cause_no_error(headers: list[tuple[bytes, bytes]]) -> None:
    assert seen("127.0.0.1", headers)


def seen(
    peer: str | None,
    headers: list[tuple[bytes, bytes]],
    trusted: Sequence[Addresses] | Literal["platform"] = TRUSTED,
) -> str:
    """Return the client address that the app behind the proxy middleware sees."""
    callers: list[str] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        callers.append(client_of(scope))

    async def nowhere(*_: Any) -> Any: ...

    client = None if peer is None else (peer, 4711)
    scope: Any = {"type": "http", "client": client, "headers": headers}
    asyncio.run(Proxied(app, trusted)(scope, nowhere, nowhere))
    return callers[0]


@asynccontextmanager
async def behind(station: Station, peer: str, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client at an address; with a forwarding header, it is a proxy."""
    transport = httpx.ASGITransport(station.app, client=(peer, 4000))
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(
        transport=transport, base_url="https://hooks.test", headers=named
    ) as http:
        yield http


async def exhaust(http: httpx.AsyncClient, path: str = "/webhooks/fal/made-up") -> httpx.Response:
    answer = await http.post(path, content=b"{}")
    for _ in range(100):
        if answer.status_code == 429:
            break
        answer = await http.post(path, content=b"{}")
    return answer


async def put(http: httpx.AsyncClient, letter: CallbackRequest) -> int:
    answer = await http.post(letter.path, content=letter.body, headers=letter.headers)  # type: ignore[arg-type] # bytes and text may mix
    return answer.status_code


# --- callbacks ---


@anyio
async def test_unverified_callbacks_over_the_rate_limit_return_429(
    start: Start, logged: Logged
) -> None:
    async with start(RECEIVER_LIMIT_UNPROVED_PER_MINUTE="5") as station:
        for _ in range(5):
            assert (await station.world.post("/webhooks/fal/x", content=b"{}")).status_code == 401
        answer = await station.world.post("/webhooks/fal/x", content=b"{}" * 10_000_000)
        assert (answer.status_code, answer.json()["type"]) == (429, LIMITED)
        assert answer.headers["content-type"] == "application/problem+json"
        assert 1 <= int(answer.headers["retry-after"]) <= 12
        assert answer.json()["retry_after"] == int(answer.headers["retry-after"])
        assert (await station.world.post("/webhooks/nobody/x")).status_code == 429
        async with behind(station, "203.0.113.10") as other:
            assert (await other.post("/webhooks/fal/x", content=b"{}")).status_code == 401
    assert [line["client"] for line in logged if line["event"] == "request.limited"] == [
        STRANGER[0]
    ]


@anyio
async def test_genuine_callback_passes_despite_a_flood_from_its_address(start: Start) -> None:
    async with start(RECEIVER_LIMIT_UNPROVED_PER_MINUTE="3") as station:
        for provider in ("fal", "eachlabs"):
            sent = await station.submitted(provider, f"for {provider}")
            await exhaust(station.world)
            await exhaust(station.world, sent.path + "x")
            assert (await station.push(sent)).json() == {"status": "accepted"}


@anyio
async def test_flood_on_a_leaked_callback_url_limits_only_that_url(start: Start) -> None:
    async with start(RECEIVER_LIMIT_UNPROVED_PER_MINUTE="3") as station:
        leaked = await station.submitted("eachlabs", "leaked")
        other = await station.submitted("eachlabs", "other")
        assert (await exhaust(station.world, leaked.path)).json()["type"] == LIMITED
        # Behind a proxy that is not configured all share one address; other callbacks pass.
        assert (await station.push(other)).json() == {"status": "accepted"}
        # Its genuine callback passes too, if the flood has another address than the provider.
        async with behind(station, "198.51.100.7") as provider:
            assert await put(provider, write(station.network, leaked)) == 200


@anyio
async def test_disconnect_during_a_callback_is_charged_to_the_rate_limit(start: Start) -> None:
    async def leave() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def nobody(_: Any) -> None:
        raise AssertionError

    async with start(RECEIVER_LIMIT_UNPROVED_PER_MINUTE="2") as station:
        sent = await station.submitted("eachlabs")
        scope = {"type": "http", "method": "POST", "path": sent.path, "headers": []}
        for _ in range(2):
            await station.app({**scope, "client": STRANGER}, leave, nobody)
        assert (await station.world.post(sent.path, content=b"{}")).status_code == 429


@anyio
async def test_verified_callbacks_are_rate_limited_only_if_configured(start: Start) -> None:
    async with start(
        RECEIVER_LIMIT_UNPROVED_PER_MINUTE="2", RECEIVER_LIMIT_CALLBACKS_PER_MINUTE="2"
    ) as station:
        await exhaust(station.world)  # is not charged to the provider's limit
        letters = [
            write(station.network, await station.submitted("eachlabs", f"{number}"))
            for number in range(3)
        ]
        other = await station.submitted("fal", "of another provider")
        answers = [await station.post(letter) for letter in letters]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 30
        assert (await station.push(other)).status_code == 200
    async with start(RECEIVER_LIMIT_UNPROVED_PER_MINUTE="2") as station:
        assert {(await station.post(letters[0])).status_code for _ in range(80)} == {200}


@anyio
async def test_clients_behind_a_trusted_proxy_are_limited_separately(
    start: Start, logged: Logged
) -> None:
    async with start(
        RECEIVER_LIMIT_UNPROVED_PER_MINUTE="2", RECEIVER_TRUSTED_PROXIES="10.0.0.0/8"
    ) as station:
        async with behind(station, "10.0.0.2", x_forwarded_for="192.0.2.66") as flooder:
            await exhaust(flooder)
        async with behind(station, "10.0.0.2", x_forwarded_for="192.0.2.66, 192.0.2.7") as other:
            assert (await other.post("/webhooks/fal/x")).status_code == 401
        async with behind(station, "192.0.2.66") as flooder:
            assert (await flooder.post("/webhooks/fal/x")).status_code == 429
    clients = {line["client"] for line in logged if "client" in line}
    assert clients == {"192.0.2.66", "192.0.2.7"}


# --- /v1 ---


@anyio
async def test_guessing_api_keys_is_limited_but_a_strong_key_still_passes(start: Start) -> None:
    async with start(
        RECEIVER_LIMIT_UNPROVED_PER_MINUTE="4", RECEIVER_API_KEYS=f"{API_KEY},guess-me"
    ) as station:
        weak = {"authorization": "Bearer guess-me"}
        assert (await station.world.get("/v1/predictions", headers=weak)).status_code == 200
        answers = [
            await station.world.get(
                "/v1/predictions", headers={"authorization": f"Bearer guess-{number}"}
            )
            for number in range(6)
        ]
        assert [answer.status_code for answer in answers] == [401] * 4 + [429] * 2
        assert answers[5].json()["type"] == LIMITED
        assert 1 <= int(answers[5].headers["retry-after"]) <= 15
        # A correct guess now gets the same answer as the others.
        assert (await station.world.get("/v1/predictions", headers=weak)).status_code == 429
        # A key too long to guess passes from the same address.
        assert {(await station.http.get("/v1/predictions")).status_code for _ in range(9)} == {200}


@anyio
async def test_authorized_requests_are_rate_limited_only_if_configured(start: Start) -> None:
    async with start(RECEIVER_LIMIT_API_PER_MINUTE="3") as station:
        answers = [await station.http.get("/v1/predictions") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        refused = answers[-1]
        assert refused.json()["type"] == LIMITED
        assert str(refused.json()["retry_after"]) == refused.headers["retry-after"]
        key = {"authorization": f"Bearer {API_KEY}"}
        async with behind(station, "192.0.2.9") as other:
            assert (await other.get("/v1/predictions", headers=key)).status_code == 200


# --- allowed source addresses of callbacks ---


@anyio
async def test_callback_from_a_source_not_allowed_returns_401(start: Start, logged: Logged) -> None:
    async with start(EACHLABS_ALLOWED_SOURCES="192.0.2.0/24, 2001:db8::/32") as station:
        letter = write(station.network, await station.submitted("eachlabs"))
        assert (await station.post(letter)).status_code == 401
        assert station.count("callbacks") == 0
        async with behind(station, "192.0.2.77") as provider:
            assert await put(provider, letter) == 200
        async with behind(station, "2001:db8::7") as provider:
            assert await put(provider, letter) == 200
        async with behind(station, "unix socket") as nobody:
            assert await put(nobody, letter) == 401
        other = await station.submitted("fal", "from anywhere")
        assert (await station.push(other)).status_code == 200
    refused = [line for line in logged if line.get("verdict") == "rejected"]
    assert [(line["reason"], line["client"], line["bytes"]) for line in refused] == [
        ("bad_source", STRANGER[0], 0),
        ("bad_source", "unix socket", 0),
    ]


@anyio
async def test_published_address_ranges_are_fetched_and_refreshed(
    start: Start, network: Network, logged: Logged
) -> None:
    clock = Clock()
    async with start(clock=clock, FAL_ALLOWED_SOURCES="meta") as station:
        letter = write(network, await station.submitted("fal"))
        async with behind(station, "198.51.100.20") as fal, behind(station, "192.0.2.20") as moved:
            assert await put(fal, letter) == 200
            assert await put(moved, letter) == 401
            asked = network.count("fal.meta")
            assert asked <= 2
            assert await put(moved, letter) == 401
            assert network.count("fal.meta") == asked  # at most once a minute
            network.always("fal.meta", reply({"webhook_ip_ranges": ["192.0.2.0/24"]}))
            clock.ahead = 61
            assert await put(moved, letter) == 200
            clock.ahead = 130
            network.always("fal.meta", breaks(httpx.ConnectError))
            assert await put(fal, letter) == 401  # the known ranges are kept if the fetch fails
            assert await put(moved, letter) == 200
    assert {line["event"] for line in logged if line.get("what") == "sources"} == {
        "published.fetched",
        "published.failed",
    }


@anyio
@pytest.mark.parametrize(
    "answer",
    [breaks(httpx.ConnectError), reply({"webhook_ip_ranges": []}), reply([]), reply({}, 500)],
)
async def test_callback_returns_503_while_address_ranges_are_unknown(
    start: Start, network: Network, answer: Any
) -> None:
    network.always("fal.meta", answer)
    async with start(FAL_ALLOWED_SOURCES="meta") as station:
        sent = await station.submitted("fal")
        refused = await station.push(sent)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["type"] == "urn:receiver:problem:sources-unavailable"
        # A callback with an invalid token causes no fetch.
        asked = network.count("fal.meta")
        assert (await station.world.post("/webhooks/fal/x")).status_code == 401
        assert network.count("fal.meta") == asked


@anyio
async def test_without_the_setting_no_address_ranges_are_fetched(
    start: Start, network: Network
) -> None:
    async with start() as station:
        assert (await station.push(await station.submitted("fal"))).status_code == 200
        assert network.count("fal.meta") == 0


def test_invalid_address_ranges_are_ignored() -> None:
    body = b'{"webhook_ip_ranges": ["192.0.2.0/24", "192.0.2.1/24", "x", 7, null, "::1"]}'
    assert read_meta(body) == [ip_network("192.0.2.0/24"), ip_network("::1")]
    assert read_meta(b'{"webhook_ip_ranges": "192.0.2.0/24"}') == []
    assert not within(ip_network("::1")[0], [ip_network("192.0.2.0/24")])
