"""The server on a real socket, among senders who are slow, endless, many, or nested too deep."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import pytest

from receiver.http import body as reading
from receiver.http import server as serving
from receiver.http.server import Server, Waited
from tests.conftest import Logged, Start
from tests.receiving import API_KEY, Station, eventually, write

pytestmark = pytest.mark.anyio

HOST: Final = b"host: hooks.test\r\n"
BEARER: Final = b"authorization: Bearer " + API_KEY.encode() + b"\r\n"
JSON: Final = b"content-type: application/json\r\n"
SUBMIT: Final = b"POST /v1/predictions HTTP/1.1\r\n" + HOST + BEARER + JSON


@asynccontextmanager
async def served(station: Station) -> AsyncIterator[int]:
    """Serve the app of a station, whose lifespan runs already, as `receiver serve` does."""
    server = Server(station.app, "127.0.0.1", 0, leave=False)
    server.config.lifespan = "off"
    serving = asyncio.create_task(server._serve())  # noqa: SLF001 - without its signals
    await eventually(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await serving


async def talk(port: int, said: bytes, drip: bytes = b"", every: float = 0.01) -> bytes:
    """Say something, and perhaps drip on, until the other side closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def dripping() -> None:
        with suppress(ConnectionError):
            while drip:
                await asyncio.sleep(every)
                writer.write(drip)
                await writer.drain()

    heard = b""
    drips = asyncio.create_task(dripping())
    try:
        writer.write(said)
        async with asyncio.timeout(10):
            with suppress(ConnectionError):  # a reset is a close too
                while chunk := await reader.read(65536):
                    heard += chunk
        return heard
    finally:
        drips.cancel()
        writer.close()


def post(path: str, *headers: bytes) -> bytes:
    return b"".join([b"POST %b HTTP/1.1\r\n" % path.encode(), HOST, *headers])


def whole(head: bytes, body: bytes) -> bytes:
    return head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# --- heads ---


async def test_too_much_of_a_head_is_refused(start: Start) -> None:
    async with start() as station, served(station) as port:
        for said, code, kind in (
            (b"GET /%b HTTP/1.1\r\n" % (b"a" * 9000) + HOST, 414, "uri-too-long"),
            (b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 150, 431, "headers-too-large"),
            (b"\x16\x03\x01\x02\x00\x01\x00" * 9, 400, "invalid-request"),
            (b"GET /\xff HTTP/1.1\r\n" + HOST, 400, "invalid-request"),
        ):
            answer = await talk(port, said + b"\r\n")
            assert status(answer) == code
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"connection: close" in head.lower()
            assert json.loads(body)["type"] == f"urn:receiver:problem:{kind}"
        # As much as anyone needs is taken.
        said = b"GET /nowhere/%b HTTP/1.1\r\n" % (b"a" * 7000) + HOST
        said += b"a: %b\r\n" % (b"b" * 500) * 90 + b"connection: close\r\n\r\n"
        assert status(await talk(port, said)) == 404


async def test_nothing_beside_a_body_is_endless(start: Start) -> None:
    async with start() as station, served(station) as port:
        sent = await station.submitted("eachlabs")
        chunked = post(sent.path, b"transfer-encoding: chunked\r\n\r\n")
        for said, more in (
            (b"GET / HTTP/1.1\r\n" + HOST + b"x-a: ", b"b"),
            (chunked + b"1\r\nx\r\n0\r\nx-a: ", b"b"),
            (chunked + b"1\r\nx\r\n0\r\n", b"x-a: b\r\n"),
            (chunked + b"1;", b"b"),
        ):
            answer = await talk(port, said + more * 80_000)
            assert status(answer) == 431 if said.startswith(b"GET") else not answer, said
        assert (await station.push(sent)).status_code == 200


async def test_many_small_chunks_are_still_a_body(start: Start) -> None:
    async with start() as station, served(station) as port:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent, body=b" " * 300_000 + b"{}")
        chunks = [b"8\r\n%b\r\n" % letter.body[at : at + 8] for at in range(0, 300_000, 8)]
        head = post(sent.path, b"x-webhook-secret: " + sent.secret.encode() + b"\r\n")
        said = head + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(chunks)
        assert status(await talk(port, said + b"2\r\n{}\r\n0\r\n\r\n")) == 200


# --- pace ---


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a hundredth of the patience."""
    monkeypatch.setattr(serving, "_SLOWEST_HEAD", 0.2)
    monkeypatch.setattr(serving, "_UNHEARD", 0.2)
    monkeypatch.setattr(reading, "_GRACE", 0.2)


TRICKLES: Final = (
    (b"", b"", None),
    (b"GET / HTTP/1.1\r\nx-a: ", b"b", None),
    (b"\r\n", b"\r\n", None),
    (b"GET /nowhere HTTP/1.1\r\n" + HOST + b"\r\n", b"\r\n", 404),
    (post("/webhooks/fal/x", b"content-length: 90000\r\n\r\n"), b"x", 408),
    (post("/webhooks/fal/x", b"transfer-encoding: chunked\r\n\r\n"), b"1\r\nx\r\n", 408),
    (SUBMIT + b"content-length: 90000\r\n\r\n", b"x", 408),
    (SUBMIT + b"content-length: 90000\r\n\r\n", b"", 408),
    (post("/v1/predictions", b"content-length: 90000\r\n\r\n"), b"x", 401),
    (post("/nowhere", b"content-length: 90000\r\n\r\n"), b"x", 404),
)
"""What is said at first, what drips after it, and what is answered before the connection ends."""


@pytest.mark.usefixtures("hasty")
async def test_a_trickle_is_cut(start: Start) -> None:
    async with start() as station, served(station) as port:
        begun = time.monotonic()
        answers = await asyncio.gather(*(talk(port, said, drip) for said, drip, _ in TRICKLES))
        assert time.monotonic() - begun < 5
        assert [status(answer) if answer else None for answer in answers] == [
            code for _, _, code in TRICKLES
        ]
        late = [answer for answer in answers if b" 408 " in answer[:20]]
        assert all(b"connection: close" in answer.lower() for answer in late)
        assert all(b"too-slow" in answer for answer in late)


@pytest.mark.usefixtures("hasty")
async def test_a_body_that_keeps_its_pace_is_heard_to_the_end(start: Start) -> None:
    async with start() as station, served(station) as port:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent)
        body = letter.body + b" " * (4096 - len(letter.body))  # each KiB earns a second
        head = post(sent.path, b"x-webhook-secret: " + sent.secret.encode() + b"\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"content-length: 4096\r\n\r\n")
        for at in range(0, 4096, 1024):
            writer.write(body[at : at + 1024])
            await writer.drain()
            await asyncio.sleep(0.1)
        assert status(await reader.readuntil(b"\r\n\r\n")) == 200
        writer.close()


async def test_an_early_answer_does_not_end_the_connection(start: Start) -> None:
    async with start() as station, served(station) as port:
        head = post("/v1/predictions", b"content-length: 100000\r\n\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(head)
            assert status(await reader.readuntil(b"\r\n\r\n")) == 401
            await reader.readuntil(b"}")
            writer.write(b"x" * 100_000)
            await writer.drain()
        writer.close()


# --- crowds ---


class Line:
    """A connection as far as a crowd knows it."""

    def __init__(self, waited: Waited) -> None:
        self.waited = waited
        self.open = True

    def give_up(self) -> None:
        self.open = False
        self.waited.drop(self)  # type: ignore[arg-type] # it only has to be told apart


def crowd(most: int, moments: list[float]) -> list[bool]:
    now = 0.0
    waited = Waited(most, lambda: now)
    lines = []
    for moment in moments:
        now = moment
        lines.append(Line(waited))
        waited.add(lines[-1])  # type: ignore[arg-type]
    return [line.open for line in lines]


def test_of_a_crowd_the_slowest_goes_first() -> None:
    assert crowd(3, [0.0, 2.0, 2.1, 2.2, 4.0]) == [False, False, True, True, True]


def test_a_burst_is_no_crowd() -> None:
    assert crowd(3, [0.0] * 6) == [True] * 6
    assert crowd(3, [0.0] * 8) == [False, False, *[True] * 6]


async def test_silent_connections_shut_nobody_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_most_waited", lambda: 20)
    async with start() as station, served(station) as port:
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        said = b"GET /healthz HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n"
        assert status(await talk(port, said)) == 200
        async with asyncio.timeout(5):
            for reader, _ in silent[:50]:  # all but the last 40
                assert await reader.read() == b""
        for _, writer in silent:
            writer.close()


# --- depth and size of JSON ---

DEEP: Final = b"[" * 100_000 + b"]" * 100_000
DEEPEST: Final = b"[" * (2 * 1024 * 1024 - 40) + b"]" * (2 * 1024 * 1024 - 40)
ODD: Final = {
    "deep": DEEP,
    "as deep as fits": DEEPEST,
    "unclosed": b"[" * 4_000_000,
    "objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "huge exponent": b'{"a": 1e999999}',
    "long integer": b'{"a": %b}' % (b"9" * 100_000),
    "integer within reach": b'{"a": %b}' % (b"9" * 4_000),
    "long fraction": b'{"a": 0.%b}' % (b"9" * 100_000),
    "half a character": b'{"a": "\\ud800"}',
}


_FAIR: Final = {"integer within reach", "long fraction"}
"""What is odd, but JSON that can be passed on as it is."""


async def test_an_odd_callback_is_kept_once_proved_and_asked_about(
    start: Start, logged: Logged
) -> None:
    async with start() as station, served(station) as port:
        for name, body in ODD.items():
            sent = await station.submitted("eachlabs", name)
            kept, asked = station.count("callbacks"), station.network.count("eachlabs.poll")
            forged = whole(post(sent.path, b"x-webhook-secret: wrong\r\n"), body)
            assert status(await talk(port, forged)) == 401
            assert station.count("callbacks") == kept
            proved = post(sent.path, b"x-webhook-secret: " + sent.secret.encode() + b"\r\n")
            assert status(await talk(port, whole(proved, body))) == 200
            assert station.count("callbacks") == kept + 1, name
            sizes = station.rows("SELECT length(body) FROM callbacks")
            assert (len(body),) in map(tuple, sizes), name
            await eventually(lambda asked=asked: station.network.count("eachlabs.poll") > asked)  # type: ignore[misc]
        found = (await station.http.get("/v1/predictions")).json()["data"]
        assert {each["status"] for each in found} == {"processing"}
    assert not [line for line in logged if line["log_level"] == "error"]


async def test_an_odd_request_is_a_clear_error(start: Start, logged: Logged) -> None:
    async with start() as station, served(station) as port:
        for name, body in ODD.items():
            given = b'{"provider":"fal","model":"a/b","input":%b}' % body
            for said in (body, given):
                code = status(await talk(port, whole(SUBMIT, said)))
                assert code in ({202} if said == given and name in _FAIR else {400, 413, 422}), name
        assert station.count("predictions") == len(_FAIR)
        assert (await station.http.get("/v1/predictions")).status_code == 200
    assert not [line for line in logged if line["log_level"] == "error"]
