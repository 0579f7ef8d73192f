"""An event is sent, signed, to the `reply_to` of its submit, if the operator allows the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import httpx
import pytest

from receiver.client import verify
from receiver.deliveries import reply_to
from receiver.deliveries.guard import guarded_client
from receiver.deliveries.importing import load
from receiver.testing import Kit, make_event, run
from tests.conftest import Start
from tests.handlers.parts import OK, built_in, serving
from tests.handlers.test_forward import SECRET
from tests.receiving import Json, Station

Replying = Callable[..., Kit]


@pytest.fixture
def replying(receiver_kit: Callable[..., Kit]) -> Replying:
    def start(hosts: str, url: str = "", **more: str) -> Kit:
        settings = {"FORWARD_SECRET": SECRET, "FORWARD_HOSTS": hosts, "FORWARD_URL": url, **more}
        return receiver_kit(built_in("forward"), online=True, settings=settings)

    return start


def host_of(url: str) -> str:
    return url.split("/")[2]


def test_event_is_sent_signed_to_reply_to_and_retried(replying: Replying) -> None:
    with serving((503, {"retry-after": "30"}, b""), OK) as server:
        kit = replying(f"other.example, {host_of(server.url)}")
        delivered = kit.deliver(make_event(reply_to=f"{server.url}?for=me"), times=2)
        assert delivered.prediction.reply_to == f"{server.url}?for=me"
        kit.exhaust(delivered)
    assert (delivered.delivery.handler, delivered.delivery.state) == ("reply", "done")
    assert [asked.path for asked in server.asked] == ["/hook?for=me"] * 2
    for asked in server.asked:
        event = verify(SECRET, asked.headers, asked.body)
        assert (event.id, event.type) == (delivered.delivery.event_id, "prediction.succeeded")


def test_prediction_without_reply_to_sends_nothing(replying: Replying) -> None:
    with serving(OK) as server:
        delivered = replying(host_of(server.url)).deliver(make_event())
    assert (delivered.deliveries, server.asked) == ({}, [])


def test_reply_to_is_sent_in_addition_to_forward_url(replying: Replying) -> None:
    with serving(OK) as server, serving(OK) as all_:
        kit = replying(host_of(server.url), all_.url, FORWARD_FORMAT="cloudevents")
        found = kit.deliver(make_event("failed", reply_to=server.url)).deliveries
    assert {name: one.state for name, one in found.items()} == {"forward": "done", "reply": "done"}
    assert verify(SECRET, server.asked[0].headers, server.asked[0].body).type.endswith("failed")
    assert len(all_.asked) == 1


@pytest.mark.parametrize("status", [410, 302, 404])
def test_410_ends_dead_at_once_and_302_and_404_after_all_retries(
    replying: Replying, status: int
) -> None:
    with serving((status, {"location": "/elsewhere"}, b"")) as server:
        kit = replying(host_of(server.url), RECEIVER_RETRY_ATTEMPTS="2")
        delivered = kit.deliver(make_event(reply_to=server.url))
        kit.exhaust(delivered)
    assert (delivered.delivery.state, len(server.asked)) == ("dead", 1 if status == 410 else 2)
    assert {asked.path for asked in server.asked} == {"/hook"}


# --- rejected URLs ---

HOSTS: Final = "bot.example, 127.0.0.1:8443,localhost,[::1]:9,8.8.8.8"


@pytest.fixture
def forwarding(monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {"SECRET": SECRET, "HOSTS": HOSTS, "URL": ""}.items():
        monkeypatch.setenv(f"FORWARD_{name}", value)
    return built_in("forward")


async def submitted(station: Station, url: Any, **more: Any) -> Json:
    body = {"provider": "fal", "model": "a/b", "input": {}, "reply_to": url}
    answer = await station.http.post("/v1/predictions", json=body, **more)
    return {"status_code": answer.status_code, **answer.json()}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://evil.example/", "evil.example is not one of FORWARD_HOSTS"),
        ("https://bot.example:444/", "bot.example:444 is not one"),
        ("https://bot.example.evil.example/", "is not one"),
        ("https://bot.example@evil.example/", "is not one"),
        ("https://me@bot.example/", "is not one"),
        ("https://evil.example\\@bot.example/", "is not one"),
        ("https://evil.example#@bot.example/", "evil.example is not one"),
        ("https://127.0.0.1/", "is not one"),
        ("https://127.0.0.1:8443/", "127.0.0.1 leads to an address that is not public"),
        ("http://localhost/", "localhost leads to an address that is not public"),
        ("http://[::1]:9/", "::1 leads to an address that is not public"),
        ("http://[", "it is not a URL"),
        ("http://a:b/", "it is not a URL"),
    ],
)
async def test_submit_with_a_forbidden_reply_to_gets_403(
    start: Start, forwarding: str, url: str, words: str
) -> None:
    async with start(forwarding, FORWARD_HOSTS=HOSTS) as station:
        refused = await submitted(station, url)
        assert (refused["status_code"], refused["type"]) == (
            403,
            "urn:receiver:problem:reply-to-refused",
        )
        assert words in refused["detail"]
        assert (await station.http.get("/v1/predictions")).json()["data"] == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "url", ["", "bot.example", "ftp://bot.example/", "https://a b", 7, "h" * 9]
)
async def test_malformed_reply_to_gets_422(start: Start, forwarding: str, url: Any) -> None:
    async with start(forwarding, FORWARD_HOSTS=HOSTS) as station:
        assert (await submitted(station, url))["status_code"] == 422


@pytest.mark.anyio
async def test_other_reply_to_with_the_same_idempotency_key_gets_409(
    start: Start, forwarding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    public, key = "https://8.8.8.8/done", {"headers": {"idempotency-key": "k"}}
    async with start(forwarding, FORWARD_HOSTS=HOSTS) as station:
        made = await submitted(station, public, **key)
        assert (made["status_code"], made["reply_to"]) == (202, public)
        assert (await submitted(station, public, **key))["id"] == made["id"]
        assert (await submitted(station, None, **key))["status_code"] == 409
        assert (await submitted(station, f"{public}/2", **key))["status_code"] == 409
        for url, runs in ((public, True), (None, False)):
            name = (await submitted(station, url))["id"]
            explained = await station.http.get(f"/v1/predictions/{name}/explain")
            [row] = explained.json()["handlers"]
            assert (row["handler"], row["runs"]) == ("reply", runs)
        # A name server that is slow or down rejects no submit: the address is checked again later.
        monkeypatch.setattr(reply_to, "_PATIENCE", 0.0)
        assert (await submitted(station, "https://bot.example/"))["status_code"] == 202


@pytest.mark.anyio
async def test_reply_to_is_rejected_without_a_handler_that_replies(start: Start) -> None:
    async with start(FORWARD_HOSTS=HOSTS) as station:
        assert "no handler here" in (await submitted(station, "https://bot.example/"))["detail"]


def test_host_removed_from_forward_hosts_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler checks again, as the setting may change between the submit and the event."""
    monkeypatch.setenv("FORWARD_SECRET", SECRET)
    monkeypatch.setenv("FORWARD_HOSTS", "other.example")
    reply = load([built_in("forward")]).handlers["reply"].function
    result = run(reply, make_event(reply_to="https://named.example/hook"))
    assert result.state == "dead"
    assert "FORWARD_HOSTS" in result.reason


def test_host_with_a_private_address_gets_nothing(
    replying: Replying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def guarded(**given: Any) -> httpx.AsyncClient:
        return guarded_client(**{**given, "allow_private": False})

    monkeypatch.setattr("receiver.deliveries.facade.guarded_client", guarded)
    with serving(OK) as server:
        delivered = replying(host_of(server.url)).deliver(make_event(reply_to=server.url))
    assert (delivered.delivery.state, server.asked) == ("pending", [])
    assert "not public" in delivered.delivery.reason
