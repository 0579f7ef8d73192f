"""The callback route, on ASGI and on a real socket: what is accepted, and what is rejected."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import pytest
import uvicorn

from receiver import Event, on
from receiver.emulator import Rule
from receiver.emulator.keys import Keyring
from receiver.predictions.tokens import Tokens
from receiver.providers import DECLARED
from receiver.providers.adapter import Publishing
from receiver.settings import Settings
from tests.conftest import Logged, Start
from tests.emulator.parts import prediction
from tests.patience import PATIENCE
from tests.receiving import (
    ENV,
    PICTURE,
    PUSHING,
    CallbackRequest,
    Clock,
    Network,
    Sent,
    Station,
    content,
    eventually,
    reply,
    write,
)

pytestmark = [pytest.mark.anyio, pytest.mark.both_engines]

LIMIT = "2000"


FAL_HEADERS = ("x-fal-webhook-", "request-id")


PUBLISHING = [
    name for name, each in Settings.read(ENV).adapters().items() if isinstance(each, Publishing)
]


def without(letter: CallbackRequest, *names: str) -> CallbackRequest:
    kept = [pair for pair in letter.headers if pair[0] not in names]
    return replace(letter, headers=kept)


def having(letter: CallbackRequest, **headers: str | bytes) -> CallbackRequest:
    """Replace headers of a callback."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return replace(letter, headers=[*without(letter, *named).headers, *named.items()])


def without_ids(network: Network, sent: Sent) -> bytes:
    said = content(network, sent)["payload"]
    return json.dumps({"status": "OK", "payload": said}).encode()


def nameless(sent: Sent) -> Sent:
    return replace(sent, prediction=replace(sent.prediction, id=""))


async def two(station: Station, provider: str) -> tuple[Sent, Sent]:
    return (
        await station.submitted(provider, "the first"),
        await station.submitted(provider, "the second"),
    )


# --- accepted callbacks ---


async def test_verified_callback_is_accepted_and_recorded(start: Start) -> None:
    async with start() as station:
        for provider, ok in itertools.product(PUSHING, (True, False)):
            sent = await station.submitted(provider, case := f"{provider} {ok}")
            answer = await station.push(sent, ok=ok)
            assert (answer.status_code, answer.json()) == (200, {"status": "accepted"}), case
            assert answer.headers["content-type"] == "application/json", case
            found = await station.read(sent.prediction_id)
            assert found["status"] == ("succeeded" if ok else "failed"), case
            assert found["channel"] == "webhook", case
            assert found["provider_id"] == sent.id, case
            ends = (found["output"] is not None, found["error"] is not None)
            assert ends == (ok, not ok), case


@pytest.mark.parametrize("provider", PUSHING)
async def test_callback_before_the_answer_to_its_submit_is_accepted(
    start: Start, network: Network, provider: str
) -> None:
    answering = asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        answer = await network.by_emulator(request)
        await answering.wait()
        return answer

    network.script(f"{provider}.submit", slowly)
    async with start() as station:
        submitting = asyncio.create_task(station.submit(provider))
        (sent,) = await eventually(lambda: network.sent)
        assert (await station.push(sent)).json() == {"status": "accepted"}
        submitted = await submitting
        assert submitted["status"] == "succeeded"
        answering.set()
        await eventually(
            lambda: (
                station.rows("SELECT 1 FROM predictions WHERE links <> '{}'")
                if provider == "fal"
                else [1]
            )
        )
        assert (await station.push(sent)).json() == {"status": "duplicate"}
        found = await station.read(sent.prediction_id)
        assert (found["status"], found["provider_id"]) == ("succeeded", sent.id)
        assert station.count("events") == 1


async def test_concurrent_duplicate_callbacks_make_one_event_each(start: Start) -> None:
    ran: list[str] = []

    @on()
    async def handle(event: Event) -> None:
        ran.append(event.id)

    async with start(handle) as station:
        sents = [await station.submitted(provider, provider) for provider in PUSHING]
        letters = 30 * [write(station.network, sent) for sent in sents]
        answers = await asyncio.gather(*map(station.post, letters))
        assert {answer.status_code for answer in answers} == {200}
        said = Counter(answer.json()["status"] for answer in answers)
        many = len(PUSHING)
        assert said == {"accepted": many, "duplicate": 29 * many}
        counts = [station.count(name) for name in ("callbacks", "events", "deliveries")]
        assert counts == [many, many, many]
        done = "SELECT count(*) FROM deliveries WHERE state = 'done'"
        await eventually(lambda: station.one(done) == many)
    assert len(ran) == len(set(ran)) == many


@pytest.mark.parametrize("provider", PUSHING)
async def test_verified_callback_of_an_unknown_prediction_is_stored(
    start: Start, provider: str
) -> None:
    tokens = Tokens([ENV["RECEIVER_SECRET_KEY"]])
    lost = "pred_of_another_database"
    hook = f"https://hooks.test/webhooks/{provider}/{tokens.callback(provider, lost)}"
    secret = tokens.webhook_secrets(lost)[0].decode()
    unknown = prediction(callback_url=hook, provider=provider, secret=secret)
    sent = Sent(unknown, httpx.Request("POST", hook))
    async with start() as station:
        assert (await station.push(sent)).status_code == 200
        assert station.rows("SELECT prediction_id, verdict FROM callbacks") == [(lost, "unknown")]
        assert station.count("events") == 0


async def test_fal_success_without_payload_is_polled(start: Start, network: Network) -> None:
    network.always("fal.poll", network.ends)
    async with start() as station:
        sent = await station.submitted("fal")
        body = {**content(network, sent), "payload": None, "payload_error": "not serializable"}
        answer = await station.push(sent, body=json.dumps(body).encode())
        assert answer.json() == {"status": "accepted"}
        found = await station.until(sent.prediction_id, "succeeded")
        assert (found["channel"], found["output"]) == ("poll", [{"url": PICTURE}])


@pytest.mark.parametrize("provider", PUSHING)
async def test_verified_but_unreadable_callback_is_stored_and_polled(
    start: Start, network: Network, provider: str
) -> None:
    network.always(f"{provider}.poll", network.ends)
    bodies = [b"<html>not json", b'{"flow": 1}']
    if provider == "fal":  # one is enough: storing and polling are the same for all
        bodies += [b"[" * 50_000, b"\x00\xff", b"", b'"OK"', b"[]"]
    async with start() as station:
        for number, body in enumerate(bodies):
            sent = await station.submitted(provider, f"no {number}")
            assert (await station.push(sent, body=body)).status_code == 200, body
            found = await station.until(sent.prediction_id, "succeeded")
            assert found["channel"] == "poll"
            kept = "SELECT CAST(body AS BLOB) FROM callbacks WHERE channel = 'webhook'"
            assert station.one(f"{kept} AND prediction_id = '{sent.prediction_id}'") == body


async def test_callback_of_a_disabled_provider_is_still_accepted(
    start: Start, network: Network
) -> None:
    async with start() as station:
        sents = [await station.submitted(provider, provider) for provider in PUSHING]
    off = {declared.key: None for declared in DECLARED.values()}
    secrets = {  # without an API key they cannot be fetched
        DECLARED[name].secret: await network.account_secret(name)
        for name in PUBLISHING
        if DECLARED[name].secret
    }
    async with start(**off, **secrets) as station:
        for sent in sents:
            assert (await station.push(sent)).json() == {"status": "accepted"}


# --- rejected callbacks ---

Forgery = Callable[[Network, Sent, Sent], CallbackRequest]
FORGERIES: dict[str, tuple[str, Forgery]] = {
    "no proof": ("*", lambda n, a, _: replace(write(n, a), headers=[])),
    "another's token": ("*", lambda n, a, b: replace(write(n, a), path=b.path)),
    "token of the other provider": (
        "*",
        lambda n, a, _: replace(
            write(n, a),
            path=a.path.replace(a.provider, "eachlabs" if a.provider == "fal" else "fal"),
        ),
    ),
    "a provider without callbacks": (
        "*",
        lambda n, a, _: replace(write(n, a), path=a.path.replace(a.provider, "oxen")),
    ),
    "token cut short": ("*", lambda n, a, _: replace(write(n, a), path=a.path[:-1])),
    "token made longer": ("*", lambda n, a, _: replace(write(n, a), path=a.path + "A")),
    "token padded": ("*", lambda n, a, _: replace(write(n, a), path=a.path + "=")),
    "token without a signature": (
        "*",
        lambda n, a, _: replace(write(n, a), path=a.path.rpartition(".")[0]),
    ),
    "endless token": ("*", lambda n, a, _: replace(write(n, a), path=a.path + "A" * 60_000)),
    "token in other letters": (
        "*",
        lambda n, a, _: replace(write(n, a), path=a.path.replace("pred_", "prəd_")),
    ),
    "token with a null": ("*", lambda n, a, _: replace(write(n, a), path=a.path + "%00")),
    "token that is no utf-8": ("*", lambda n, a, _: replace(write(n, a), path=a.path + "%ff%fe")),
    "token of nothing": ("*", lambda n, a, _: replace(write(n, a), path=a.path[:-60] + ".")),
    "another's id in the body": (
        "fal",
        lambda n, a, b: write(n, a, body=json.dumps(content(n, b)).encode()),
    ),
    "another's id, told with the secret": (
        "eachlabs",
        lambda n, a, b: write(n, a, body=json.dumps(content(n, b)).encode()),
    ),
    "another's signature": ("fal", lambda n, a, b: replace(write(n, b), path=a.path)),
    "another's signature over this one's id": (
        "fal",
        lambda n, a, b: replace(write(n, b, body=write(n, a).body), path=a.path),
    ),
    "a signature of nobody's request": (
        "fal",
        lambda n, a, _: write(n, nameless(a), body=write(n, a).body),
    ),
    "another's signature over no id": (
        "fal",
        lambda n, a, b: replace(write(n, b, body=without_ids(n, b)), path=a.path),
    ),
    "secret of another prediction": (
        "eachlabs",
        lambda n, a, b: having(write(n, a), x_webhook_secret=b.secret),
    ),
    "secret as an hmac": (
        "eachlabs",
        lambda n, a, _: having(write(n, a), x_webhook_secret="0" * 64),
    ),
    "no secret": ("eachlabs", lambda n, a, _: having(write(n, a), x_webhook_secret="")),
    "secret that is not ascii": (
        "eachlabs",
        lambda n, a, _: having(write(n, a), x_webhook_secret=b"\xff\xfe\xc3\xa9"),
    ),
    "secret given twice": (
        "eachlabs",
        lambda n, a, _: replace(
            write(n, a), headers=[("x-webhook-secret", a.secret), ("x-webhook-secret", a.secret)]
        ),
    ),
    "a stranger's signature": (
        "fal",
        lambda n, a, _: replace(
            write(n, a),
            headers=list(
                Keyring(random.Random(99), *FAL_HEADERS)
                .headers(a.id, "1", int(time.time()), write(n, a).body)
                .items()
            ),
        ),
    ),
    "old signature": ("fal", lambda n, a, _: write(n, a, at=time.time() - 310)),
    "signature of tomorrow": ("fal", lambda n, a, _: write(n, a, at=time.time() + 310)),
    "another time than signed": (
        "fal",
        lambda n, a, _: having(write(n, a), x_fal_webhook_timestamp=str(int(time.time()) - 7)),
    ),
    "another body than signed": (
        "fal",
        lambda n, a, _: replace(write(n, a), body=write(n, a, ok=False).body),
    ),
    **{
        f"timestamp {text!r}": (
            "fal",
            lambda n, a, _, text=text: having(write(n, a), x_fal_webhook_timestamp=text),  # type: ignore[misc]
        )
        for text in (b"", b"1e9", b"-1", b" 1", b"9" * 30, "١٢٣".encode(), b"\xff", b"1_0", b"nan")
    },
    **{
        f"signature {text[:9]!r}": (
            "fal",
            lambda n, a, _, text=text: having(write(n, a), x_fal_webhook_signature=text),  # type: ignore[misc]
        )
        for text in (b"", b"0" * 128, b"zz" * 64, b"\xff" * 128, "é".encode() * 64, b"0" * 60_000)
    },
    **{
        f"without {name}": ("fal", lambda n, a, _, name=name: without(write(n, a), name))  # type: ignore[misc]
        for name in (
            "x-fal-webhook-request-id",
            "x-fal-webhook-user-id",
            "x-fal-webhook-timestamp",
            "x-fal-webhook-signature",
        )
    },
}


@pytest.mark.usefixtures("on_sqlite")  # an unverified callback does not reach the store
@pytest.mark.parametrize("provider", PUSHING)
async def test_forged_callback_returns_401_and_leaves_only_a_log_line(
    start: Start, logged: Logged, provider: str
) -> None:
    async with start() as station:
        mine, other = await two(station, provider)
        before = [station.rows(f"SELECT * FROM {name}") for name in ("predictions", "callbacks")]
        for name, (wanted, forge) in FORGERIES.items():
            if wanted not in {"*", provider}:
                continue
            letter = forge(station.network, mine, other)
            logged.clear()
            answer = await station.post(letter)
            assert answer.status_code == 401, name
            assert answer.json() == {
                "type": "urn:receiver:problem:unproved",
                "title": "Unauthorized",
                "status": 401,
                "detail": "this callback could not be proved",
            }
            told = [line["event"] for line in logged if line["event"] != "published.fetched"]
            assert told == ["request.handled"], name
            text = repr(logged)
            assert not [
                word for word in (mine.token, mine.secret, other.secret) if word and word in text
            ], name
        after = [station.rows(f"SELECT * FROM {name}") for name in ("predictions", "callbacks")]
        assert after == before
        assert (await station.push(mine)).status_code == 200


@pytest.mark.usefixtures("on_sqlite")  # the store is not used
async def test_methods_other_than_post_return_405(start: Start) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "WHAT"):
            answer = await station.world.request(method, sent.path)
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST"), method


@pytest.mark.usefixtures("on_sqlite")  # the store is not used
async def test_callback_of_an_unknown_provider_returns_404(start: Start) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        for provider in ("nobody", "EACHLABS", "é", "%00", "..", "-" * 5000):
            path = sent.path.replace("eachlabs", provider)
            answer = await station.world.post(path, content=b"{}")
            assert answer.status_code == 404, provider
            assert answer.json()["type"] == "urn:receiver:problem:not-found"


# --- published keys ---


@pytest.mark.parametrize("provider", PUBLISHING)
async def test_rotated_keys_are_fetched_at_most_once_a_minute(
    start: Start, network: Network, provider: str
) -> None:
    clock = Clock()
    keys = f"{provider}.keys"
    free = {f"{provider.upper()}_MAX_IN_FLIGHT": "none"}
    async with start(clock=clock, **free) as station:
        sents = [await station.submitted(provider, f"no {number}") for number in range(12)]
        await eventually(lambda: network.count(keys) == 1)
        network.emulator.faults.replace([Rule(fault="rotate_keys")])
        answers = await asyncio.gather(*(station.push(sent) for sent in sents[:10]))
        assert [answer.status_code for answer in answers] == [200] * 10
        assert network.count(keys) == 2
        network.emulator.faults.replace([Rule(fault="rotate_keys")])
        assert (await station.push(sents[10])).status_code == 401
        assert network.count(keys) == 2
        clock.ahead = 61
        assert (await station.push(sents[10], at=clock())).status_code == 200
        assert network.count(keys) == 3


@pytest.mark.usefixtures("on_sqlite")  # an unverified callback does not reach the store
@pytest.mark.parametrize(
    ("fetches", "forged"),
    [
        (2, {"x_fal_webhook_signature": "00" * 64}),
        (1, {"x_fal_webhook_timestamp": "1750000000"}),
        (1, {"x_fal_webhook_timestamp": "now"}),
    ],
)
async def test_only_an_invalid_signature_refetches_keys_and_once_a_minute(
    start: Start, network: Network, fetches: int, forged: dict[str, str]
) -> None:
    async with start() as station:
        sent = await station.submitted("fal")
        letter = having(write(network, sent), **forged)
        answers = await asyncio.gather(*(station.post(letter) for _ in range(50)))
        assert {answer.status_code for answer in answers} == {401}
        assert network.count("fal.keys") == fetches


@pytest.mark.usefixtures("on_sqlite")  # the store is read only afterwards
@pytest.mark.parametrize(
    "answer",
    [reply(None, 500), reply(text="<html>"), reply({"keys": []}), reply({"keys": [{"x": 1}]})],
)
@pytest.mark.parametrize("provider", PUBLISHING)
async def test_callback_returns_503_until_keys_can_be_fetched(
    start: Start, network: Network, answer: Any, provider: str
) -> None:
    clock = Clock()
    network.always(f"{provider}.keys", answer)
    async with start(clock=clock) as station:
        sent = await station.submitted(provider)
        refused = await station.push(sent)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["type"] == "urn:receiver:problem:keys-unavailable"
        assert refused.json()["retry_after"] == 5
        assert station.count("callbacks") == 0
        network.always(f"{provider}.keys", network.by_emulator)
        clock.ahead = 5
        assert (await station.push(sent, at=clock())).json() == {"status": "accepted"}


# --- the body, on ASGI ---


async def call(
    station: Station, letter: CallbackRequest, *messages: MutableMapping[str, Any]
) -> list[MutableMapping[str, Any]]:
    """Call the app with a body in the given pieces."""
    queue = list(messages)
    answered: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return queue.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        answered.append(message)

    headers = [(_bytes(name).lower(), _bytes(value)) for name, value in letter.headers]
    scope = {
        "type": "http",
        "method": "POST",
        "path": letter.path,
        "raw_path": letter.path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("203.0.113.9", 1),
        "scheme": "https",
        "http_version": "1.1",
    }
    await station.app(scope, receive, send)
    return answered


def _bytes(text: str | bytes) -> bytes:
    return text.encode("latin-1") if isinstance(text, str) else text


def pieces(body: bytes, size: int) -> list[dict[str, Any]]:
    chunks = [body[at : at + size] for at in range(0, len(body), size)]
    more = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    return [*more, {"type": "http.request"}]


@pytest.mark.usefixtures("on_sqlite")  # an oversized body does not reach the store
async def test_limit_applies_to_a_body_that_comes_in_pieces(start: Start) -> None:
    cases = [(1, 413), (5000, 413), (-1, 200), (0, 200)]
    async with start(RECEIVER_MAX_BODY_BYTES=LIMIT) as station:
        for provider, (over, status) in itertools.product(PUSHING, cases):
            sent = await station.submitted(provider, f"{provider} {over}")
            before = station.count("callbacks")
            body = json.dumps(content(station.network, sent)).encode()
            body = body.ljust(int(LIMIT) + over)
            letter = write(station.network, sent, body=body)
            answered = await call(station, letter, *pieces(body, 100))
            assert answered[0]["status"] == status, (provider, over)
            if status == 413:
                assert (b"connection", b"close") in answered[0]["headers"], (provider, over)
            assert station.count("callbacks") == before + (status == 200), (provider, over)


@pytest.mark.usefixtures("on_sqlite")  # the engine makes no difference
async def test_reading_stops_at_the_first_byte_over_the_limit(start: Start) -> None:
    async with start(RECEIVER_MAX_BODY_BYTES=LIMIT) as station:
        sent = await station.submitted("eachlabs")
        endless = pieces(b"x" * (int(LIMIT) + 1), 500)[:-1]  # reading further would fail
        answered = await call(station, write(station.network, sent), *endless)
        assert answered[0]["status"] == 413


@pytest.mark.usefixtures("on_sqlite")  # the engine makes no difference
async def test_disconnect_during_a_callback_gets_no_answer_and_stores_nothing(
    start: Start, logged: Logged
) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent)
        half = {"type": "http.request", "body": letter.body[:10], "more_body": True}
        assert await call(station, letter, half, {"type": "http.disconnect"}) == []
        assert station.count("callbacks") == 0
        assert (await station.post(letter)).json() == {"status": "accepted"}
    assert not [line for line in logged if line["log_level"] == "error"]


# --- over a real socket ---


@asynccontextmanager
async def listening(station: Station) -> AsyncIterator[int]:
    """Serve the app of a station, whose lifespan runs already."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            station.app, lifespan="off", log_config=None, ws="none", timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve([listener]))  # noqa: SLF001 - without its signals
        await eventually(lambda: server.started)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving


def raw(letter: CallbackRequest, *, length: int | None = None, more: bytes = b"") -> bytes:
    """Return the head of a request."""
    lines = [b"POST " + letter.path.encode() + b" HTTP/1.1", b"host: hooks.test"]
    lines += [_bytes(name) + b": " + _bytes(value) for name, value in letter.headers]
    lines.append(b"content-length: %d" % (len(letter.body) if length is None else length))
    return b"\r\n".join([*lines, *([more] if more else []), b"", b""])


async def talk(port: int, *said: bytes, until_closed: bool = False) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for chunk in said:
            writer.write(chunk)
            await writer.drain()
        async with asyncio.timeout(PATIENCE):
            if until_closed:
                return await reader.read()
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


@pytest.mark.usefixtures("on_sqlite")  # the engine makes no difference
async def test_slow_callback_is_received_while_another_is_handled(start: Start) -> None:
    async with start() as station, listening(station) as port:
        sent = await station.submitted("fal")
        letter = write(station.network, sent)
        half = len(letter.body) // 2
        head = raw(letter)
        pause = asyncio.Event()

        async def slow() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + letter.body[:half])
            await writer.drain()
            await pause.wait()
            writer.write(letter.body[half:])
            answer = await reader.readuntil(b"\r\n\r\n")
            writer.close()
            return answer

        slowly = asyncio.create_task(slow())
        other = await station.submitted("eachlabs", "another, meanwhile")
        assert (await station.push(other)).json() == {"status": "accepted"}
        assert station.count("events") == 1
        pause.set()
        assert (await slowly).startswith(b"HTTP/1.1 200")
        assert station.count("events") == 2


@pytest.mark.usefixtures("on_sqlite")  # the engine makes no difference
async def test_truncated_callback_stores_nothing(start: Start, logged: Logged) -> None:
    async with start() as station, listening(station) as port:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw(letter) + letter.body[:-1])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await talk(port, raw(letter) + letter.body)).startswith(b"HTTP/1.1 200")
        assert station.one("SELECT repeats FROM callbacks") == 0
    assert not [line for line in logged if line["log_level"] == "error"]


@pytest.mark.usefixtures("on_sqlite")  # the engine makes no difference
async def test_limit_applies_to_a_chunked_body(start: Start) -> None:
    async with start(RECEIVER_MAX_BODY_BYTES=LIMIT) as station, listening(station) as port:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent)
        chunked = raw(letter).replace(
            b"content-length: %d" % len(letter.body), b"transfer-encoding: chunked"
        )
        whole = b"%x\r\n%b\r\n0\r\n\r\n" % (len(letter.body), letter.body)
        assert (await talk(port, chunked, whole)).startswith(b"HTTP/1.1 200")
        chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
        assert (await talk(port, chunked, chunk * 2)).startswith(b"HTTP/1.1 413")


@pytest.mark.usefixtures("on_sqlite")  # the store is not used
async def test_path_variants_are_not_redirected(start: Start) -> None:
    async with start() as station, listening(station) as port:
        for path in ("//webhooks/eachlabs/x", "/webhooks/eachlabs/x/", "/./webhooks/eachlabs/x"):
            answer = await talk(port, raw(CallbackRequest(path, [], b"")))
            assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 401")), path


@pytest.mark.usefixtures("on_sqlite")  # the engine makes no difference
async def test_malformed_headers_cause_no_5xx(start: Start, logged: Logged) -> None:
    async with start() as station, listening(station) as port:
        sent = await station.submitted("fal")
        letter = replace(write(station.network, sent), body=b"")
        for more in (
            b"x-fal-webhook-signature: \xff\xfe\x80",
            b"content-encoding: gzip",
            b"expect: 100-continue",
            b"host: [::1",
            b"cookie: " + b"\xc3\xa9" * 3000,
            b"x-forwarded-for: ';DROP TABLE predictions",
        ):
            answer = await talk(port, raw(without(letter, "x-fal-webhook-signature"), more=more))
            assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400", b"HTTP/1.1 100")), more
        assert station.count("callbacks") == 0
    assert not [line for line in logged if line["log_level"] == "error"]


@pytest.mark.usefixtures("on_sqlite")  # the engine makes no difference
async def test_stored_callback_headers_contain_no_secret(start: Start) -> None:
    async with start() as station:
        sent = await station.submitted("eachlabs")
        letter = having(
            write(station.network, sent), authorization="Bearer x", cookie="a=b", x_note=b"\xe9"
        )
        await station.post(letter)
        headers = dict(msgspec.json.decode(station.one("SELECT headers FROM callbacks")))
        assert "x-note" in headers
        assert not {"x-webhook-secret", "authorization", "cookie"} & headers.keys()
