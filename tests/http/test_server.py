"""The HTTP server on a real socket: slow, half-closed, malformed, oversized and many requests."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import httpx
import pytest

from receiver.http import body as reading
from receiver.http import connection
from receiver.http import live as feed
from receiver.http.connection import Protocol, WaitingConnections
from receiver.http.server import Server
from tests.conftest import Logged, Start
from tests.patience import PATIENCE
from tests.receiving import API_KEY, Network, Station, eventually, write

pytestmark = pytest.mark.anyio

HOST: Final = b"host: hooks.test\r\n"
BEARER: Final = b"authorization: Bearer " + API_KEY.encode() + b"\r\n"
JSON: Final = b"content-type: application/json\r\n"
SUBMIT: Final = b"POST /v1/predictions HTTP/1.1\r\n" + HOST + BEARER + JSON
LIST: Final = b"GET /v1/predictions?limit=1 HTTP/1.1\r\n" + HOST + BEARER + b"\r\n"
LAST: Final = b"GET /healthz HTTP/1.1\r\n" + HOST + b"connection: close\r\n\r\n"
GOOD: Final = b'{"provider":"eachlabs","model":"nano-banana","input":{"prompt":"a lighthouse"}}'
on_both_loops = pytest.mark.parametrize(
    "anyio_backend",
    [
        pytest.param(("asyncio", {"use_uvloop": used}), id="uvloop" if used else "asyncio")
        for used in (False, True)
    ],
)
"""`receiver serve` runs on uvloop, if it is installed."""


@asynccontextmanager
async def running(station: Station) -> AsyncIterator[Server]:
    """Serve the app of a station, whose lifespan runs already, as `receiver serve` does."""
    server = Server(station.app, "127.0.0.1", 0, leave=False)
    server.config.lifespan = "off"
    serving = asyncio.create_task(server._serve())  # noqa: SLF001 - without its signals
    await eventually(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        await serving


@asynccontextmanager
async def served(station: Station) -> AsyncIterator[int]:
    async with running(station) as server:
        yield port_of(server)


def port_of(server: Server) -> int:
    return int(server.servers[0].sockets[0].getsockname()[1])


async def talk(
    port: int, data: bytes, drip: bytes = b"", every: float = 0.01, *, then_eof: bool = False
) -> bytes:
    """Send bytes, and perhaps `drip` at intervals; return what comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def dripping() -> None:
        with suppress(ConnectionError):
            while drip:
                await asyncio.sleep(every)
                writer.write(drip)
                await writer.drain()

    received = b""
    drips = asyncio.create_task(dripping())
    try:
        writer.write(data)
        if then_eof:
            writer.write_eof()
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionError):  # a reset is a close too
                while chunk := await reader.read(65536):
                    received += chunk
        return received
    finally:
        drips.cancel()
        writer.close()


def post(path: str, *headers: bytes) -> bytes:
    return b"".join([b"POST %b HTTP/1.1\r\n" % path.encode(), HOST, *headers])


def whole(head: bytes, body: bytes) -> bytes:
    return head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def statuses(answers: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+) ", answers)]


def chunked(body: bytes, size: int = 50_000) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


@pytest.fixture(params=["whole", "byte by byte"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the server receive its input whole, or byte by byte."""
    if request.param == "byte by byte":
        receive = Protocol.data_received

        def received(self: Protocol, data: bytes) -> None:
            for at in range(len(data)):
                receive(self, data[at : at + 1])

        monkeypatch.setattr(Protocol, "data_received", received)


# --- request lines and headers ---


async def test_oversized_or_malformed_request_head_is_rejected(start: Start) -> None:
    async with start() as station, served(station) as port:
        for data, code, kind in (
            (b"GET /%b HTTP/1.1\r\n" % (b"a" * 9000) + HOST, 414, "uri-too-long"),
            (b"GET / HTTP/1.1\r\n" + HOST + b"a: b\r\n" * 150, 431, "headers-too-large"),
            (b"\x16\x03\x01\x02\x00\x01\x00" * 9, 400, "invalid-request"),
            (b"GET /\xff HTTP/1.1\r\n" + HOST, 400, "invalid-request"),
        ):
            answer = await talk(port, data + b"\r\n")
            assert status(answer) == code
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"connection: close" in head.lower()
            assert json.loads(body)["type"] == f"urn:receiver:problem:{kind}"
        # Sizes just below the limits are accepted.
        data = b"GET /nowhere/%b HTTP/1.1\r\n" % (b"a" * 7000) + HOST
        data += b"a: %b\r\n" % (b"b" * 500) * 90 + b"connection: close\r\n\r\n"
        assert status(await talk(port, data)) == 404


async def test_endless_headers_trailers_or_chunk_extensions_are_cut_off(start: Start) -> None:
    async with start() as station, served(station) as port:
        sent = await station.submitted("eachlabs")
        chunked = post(sent.path, b"transfer-encoding: chunked\r\n\r\n")
        for data, more in (
            (b"GET / HTTP/1.1\r\n" + HOST + b"x-a: ", b"b"),
            (chunked + b"1\r\nx\r\n0\r\nx-a: ", b"b"),
            (chunked + b"1\r\nx\r\n0\r\n", b"x-a: b\r\n"),
            (chunked + b"1;", b"b"),
        ):
            answer = await talk(port, data + more * 80_000)
            assert status(answer) == 431 if data.startswith(b"GET") else not answer, data
        assert (await station.push(sent)).status_code == 200


async def test_body_of_many_small_chunks_is_accepted(start: Start) -> None:
    async with start() as station, served(station) as port:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent, body=b" " * 300_000 + b"{}")
        chunks = [b"8\r\n%b\r\n" % letter.body[at : at + 8] for at in range(0, 300_000, 8)]
        head = post(sent.path, b"x-webhook-secret: " + sent.secret.encode() + b"\r\n")
        data = head + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + b"".join(chunks)
        assert status(await talk(port, data + b"2\r\n{}\r\n0\r\n\r\n")) == 200


# --- message framing, request smuggling ---

OFFERS: Final = (
    b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
    b"upgrade: websocket\r\nconnection: keep-alive, upgrade\r\nsec-websocket-version: 13\r\n",
    b"Connection: upgrade\r\nUpgrade: anything/2, else\r\n",
    b"connection: upgrade\r\n",
    b"upgrade: h2c\r\n",
)


@pytest.mark.usefixtures("cut")
async def test_offer_to_upgrade_is_ignored(start: Start) -> None:
    async with start() as station, served(station) as port:
        for number, offer in enumerate(OFFERS, 1):
            data = (
                SUBMIT + offer + b"content-length: %d\r\n\r\n" % len(GOOD) + GOOD,
                SUBMIT + offer + b"transfer-encoding: chunked\r\n\r\n" + chunked(GOOD, 7),
                post("/webhooks/fal/x", offer, b"content-length: %d\r\n\r\n" % len(LIST), LIST),
                LIST.replace(b"\r\n\r\n", b"\r\n" + offer + b"\r\n"),
                LAST,
            )
            answers = await talk(port, b"".join(data))
            assert statuses(answers) == [202, 202, 401, 200, 200], offer
            assert station.count("predictions") == 2 * number


@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
async def test_callback_with_an_offer_to_upgrade_is_received_in_full(
    start: Start, version: bytes
) -> None:
    async with start() as station, served(station) as port:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent, body=b" " * 300_000 + b"{}")
        head = post(sent.path, b"x-webhook-secret: %b\r\n" % sent.secret.encode(), OFFERS[0])
        head = head.replace(b"HTTP/1.1", b"HTTP/" + version)
        assert status(await talk(port, whole(head, letter.body))) == 200
        assert station.one("SELECT length(body) FROM callbacks") == 300_002


CHUNKED: Final = post("/webhooks/fal/x", b"transfer-encoding: chunked\r\n\r\n")
NO_REQUESTS: Final = {
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel": b"CONNECT db.test:5432 HTTP/1.1\r\nhost: db.test:5432\r\n\r\n",
    "a tunnel's body": b"CONNECT a:1 HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % len(LIST),
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": post("/", HOST + b"\r\n"),
    "two hosts in HTTP/1.0": post("/", HOST + b"\r\n").replace(b"/1.1", b"/1.0"),
    "two lengths": post("/", b"content-length: 3\r\ncontent-length: 4\r\n\r\n"),
    "one length twice": post("/", b"content-length: 3\r\ncontent-length: 3\r\n\r\n"),
    "a list of lengths": post("/", b"content-length: 3, 3\r\n\r\n"),
    "a length with a sign": post("/", b"content-length: +3\r\n\r\n"),
    "an endless length": post("/", b"content-length: 18446744073709551619\r\n\r\n"),
    "length and chunks": post("/", b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n"),
    "chunks and length": post("/", b"transfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n"),
    "another coding": post("/", b"transfer-encoding: identity\r\n\r\n"),
    "zipped chunks": post("/", b"transfer-encoding: gzip, chunked\r\n\r\n"),
    "chunks, then more": post("/", b"transfer-encoding: chunked, identity\r\n\r\n"),
    "chunks twice": post("/", b"transfer-encoding: chunked\r\n" * 2 + b"\r\n"),
    "a blank after the name": post("/", b"transfer-encoding : chunked\r\n\r\n"),
    "a folded header": post("/", b"transfer-encoding:\r\n chunked\r\n\r\n"),
    "a bare CR": post("/", b"x-a: b\rcontent-length: 3\r\n\r\n"),
    "a bare LF": post("/", b"x-a: b\ncontent-length: 3\r\n\r\n"),
    "NUL": post("/", b"x-a: b\0c\r\n\r\n"),
    "a chunk's size in LF": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "a chunk's size with a blank": CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n",
    "a chunk's size in C": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "a chunk too long": CHUNKED + b"4\r\nabc\r\n0\r\n\r\n",
    "an endless chunk": CHUNKED + b"10000000000000003\r\nabc\r\n0\r\n\r\n",
    "a length in a trailer": CHUNKED + b"0\r\ncontent-length: 3\r\n\r\n",
}
"""Requests that two servers could read differently (smuggling), or that are not supported."""


@pytest.mark.usefixtures("cut")
async def test_malformed_or_smuggled_request_returns_400_in_its_turn(start: Start) -> None:
    async with start() as station, served(station) as port:
        for name, data in NO_REQUESTS.items():
            answers = await talk(port, LIST + data + LIST)
            assert statuses(answers) == [200, 400], name  # the request after it is not run
            refusal = answers.rpartition(b"HTTP/1.1 400")[2]
            assert b"connection: close" in refusal
            assert b"urn:receiver:problem:invalid-request" in refusal


async def test_trailers_cannot_authenticate_a_request(start: Start) -> None:
    data = post("/v1/predictions", JSON, b"transfer-encoding: chunked\r\n\r\n")
    data += chunked(GOOD)[:-2] + BEARER + b"x-forwarded-for: 192.0.2.9\r\n\r\n"
    async with start() as station, served(station) as port:
        assert statuses(await talk(port, data + LAST)) == [401, 200]
        assert station.count("predictions") == 0


async def test_connection_close_in_a_trailer_closes_the_connection(start: Start) -> None:
    async with start() as station, served(station) as port:
        for path, answer in (("/v1/predictions", 401), ("/healthz", 405)):
            data = post(path, b"transfer-encoding: chunked\r\n\r\n") + chunked(GOOD)[:-2]
            answers = await talk(port, LIST + data + b"connection: close\r\n\r\n" + LIST)
            assert statuses(answers) == [200, answer]  # the last request is not answered


async def test_http_1_0_client_gets_no_chunked_answer(start: Start) -> None:
    async with start() as station, served(station) as port:
        health = await talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")
        assert (status(health), b"content-length: " in health) == (200, True)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/events/stream HTTP/1.0\r\n" + BEARER + b"\r\n")
        head, _, begun = (await reader.readuntil(b": live\n")).partition(b"\r\n\r\n")
        assert b"connection: close" in head
        assert b"transfer-encoding" not in head
        sent = await station.submitted("eachlabs")
        begun += await reader.readuntil(sent.prediction_id.encode())
        assert b"\r\n" not in begun
        station.app.state.release()
        assert (await reader.read()).endswith(b"\n")
        writer.close()


# --- half-closed connections ---


@on_both_loops
async def test_half_closed_client_gets_all_answers(start: Start, logged: Logged) -> None:
    async with start() as station, served(station) as port:
        submit = SUBMIT + b"content-length: %d\r\n\r\n" % len(GOOD) + GOOD
        waiting = submit.replace(JSON, JSON + b"prefer: wait=1\r\n")
        for data, answers in (
            (submit, [202]),
            (waiting, [202]),
            (LIST * 3, [200, 200, 200]),
            (LIST * 2 + submit[:-9], [200, 200]),
            (LIST * 2 + SUBMIT, [200, 200]),
            (submit[:-9], []),
            (b"", []),
        ):
            assert statuses(await talk(port, data, then_eof=True)) == answers
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent)
        hook = post(sent.path, b"x-webhook-secret: %b\r\n" % sent.secret.encode())
        hook += b"content-length: %d\r\n\r\n" % len(letter.body) + letter.body
        assert statuses(await talk(port, hook, then_eof=True)) == [200]
        handled = [line["status"] for line in logged if line["event"] == "request.handled"]
    assert handled == [202, 202, *[200] * 7, 499, 202, 200]


@on_both_loops
async def test_half_closed_client_can_keep_reading_a_stream(start: Start) -> None:
    async with start() as station, served(station) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /v1/events/stream HTTP/1.1\r\n" + HOST + BEARER + b"\r\n")
        writer.write_eof()
        await reader.readuntil(b": live\n")
        sent = await station.submitted("eachlabs")
        await reader.readuntil(sent.prediction_id.encode())
        writer.close()


@on_both_loops
async def test_disconnected_stream_client_is_noticed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_PEER_CHECK", 0.01)
    monkeypatch.setattr(feed, "KEEP_ALIVE", 0.05)
    data = b"GET /v1/events/stream HTTP/1.1\r\n" + HOST + BEARER + b"\r\n"
    async with start() as station, running(station) as server:
        for more in (b"", LIST):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            writer.write(data + more)
            await reader.readuntil(b": live\n")
            writer.close()
            await eventually(lambda: not server.server_state.tasks)


@on_both_loops
@pytest.mark.parametrize("ends_first", [False, True])
async def test_answer_on_a_reset_connection_is_logged_as_499(
    start: Start,
    network: Network,
    logged: Logged,
    monkeypatch: pytest.MonkeyPatch,
    *,
    ends_first: bool,
) -> None:
    monkeypatch.setattr(connection, "_PEER_CHECK", 0.01)
    requested, answered = asyncio.Event(), asyncio.Event()

    async def slowly(request: httpx.Request) -> httpx.Response:
        requested.set()
        await answered.wait()
        return await network.by_emulator(request)

    network.script("oxen.model", slowly)
    async with start() as station, running(station) as server:
        connections = server.server_state.connections
        with socket.create_connection(("127.0.0.1", port_of(server))) as client:
            client.sendall(b"GET /v1/models/oxen/x HTTP/1.1\r\n" + HOST + BEARER + b"\r\n")
            await requested.wait()
            if ends_first:
                client.shutdown(socket.SHUT_WR)
                [served] = connections
                await eventually(lambda: served._at_eof)  # type: ignore[union-attr] # noqa: SLF001 - it shows nowhere
            reset = struct.pack("ii", 1, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        await eventually(lambda: not connections)
        answered.set()
        await eventually(lambda: [line for line in logged if line["event"] == "request.handled"])
    [line] = [line for line in logged if line["event"] == "request.handled"]
    assert (line["status"], line["sent"]) == (499, 0)


# --- answers before the end of a request ---

MANY: Final = b"x" * 20_000_000
EARLY: Final = (
    (SUBMIT + b"content-length: 20000000\r\n\r\n", 413),
    (SUBMIT + b"transfer-encoding: chunked\r\n\r\n1312d00\r\n", 413),
    (CHUNKED + b"1312d00\r\n", 413),
    (post("/v1/predictions", b"content-length: 20000000\r\n\r\n"), 401),
    (post("/v1/predictions", BEARER, b"content-length: 20000000\r\n\r\n"), 415),
    (post("/nowhere", b"content-length: 20000000\r\n\r\n"), 404),
    (post("/nowhere", b"content-length: 20000000\r\n\r\n").replace(b"/1.1", b"/1.0"), 404),
    (post("/nowhere", b"content-length: 20000000\r\n" * 2 + b"\r\n"), 400),
    (post("/" + "a" * 9000, b"content-length: 20000000\r\n\r\n"), 414),
    (b"POST / HTTP/1.1\r\nx-a: ", 431),
)


@on_both_loops
async def test_client_still_sending_its_body_gets_the_early_answer(start: Start) -> None:
    def sends(port: int, data: bytes) -> bytes:
        """Send all before reading anything, as many clients do."""
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    async with start() as station, served(station) as port:
        for head, code in EARLY:
            assert statuses(await asyncio.to_thread(sends, port, head + MANY)) == [code], head


async def test_bytes_discarded_after_an_early_answer_are_bounded(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_MOST_DISCARDED", 5_000_000)
    async with start() as station, served(station) as port:
        for head, code in EARLY:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head)
            with suppress(ConnectionError):
                for _ in range(200):
                    writer.write(MANY[:1_000_000])
                    await writer.drain()
                pytest.fail(f"it took all: {head!r}")
            received = b""
            with suppress(ConnectionError):
                received = await reader.read()
            assert statuses(received) in ([code], []), head
            writer.close()


@pytest.mark.parametrize(
    ("headers", "answers"),
    [
        (b"content-length: 20000000\r\n", [413]),
        (b"content-length: 99999999999999999999\r\n", [400]),
        (b"content-length: 2\r\ncontent-encoding: gzip\r\n", [415]),
        (b"content-length: 2\r\n", [100]),
    ],
)
async def test_100_continue_is_sent_only_if_the_body_is_wanted(
    start: Start, headers: bytes, answers: list[int]
) -> None:
    async with start() as station, served(station) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(SUBMIT + b"expect: 100-continue\r\n" + headers + b"\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert statuses(head) == answers
        assert (b"connection: close" in head) == (answers != [100])
        writer.close()
        old = (SUBMIT + b"expect: 100-continue\r\n").replace(b"HTTP/1.1", b"HTTP/1.0")
        assert statuses(await talk(port, whole(old, b"{}"))) == [422]  # HTTP/1.0 has no 100


# --- slow clients ---


SLOW_HEADS: Final = (
    (b"", b""),
    (b"GET / HTTP/1.1\r\nx-a: ", b"b"),
    (b"\r\n", b"\r\n"),
)
"""The bytes sent first, and those repeated slowly."""


async def test_connection_without_a_request_times_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_SLOWEST_HEAD", 0.1)
    async with start() as station, served(station) as port:
        answers = await asyncio.gather(*(talk(port, first, drip) for first, drip in SLOW_HEADS))
        assert answers == [b""] * len(SLOW_HEADS)


async def test_line_breaks_after_an_answered_request_time_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as station, served(station) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /nowhere HTTP/1.1\r\n" + HOST + b"\r\n")
        assert status(await reader.readuntil(b"}")) == 404
        monkeypatch.setattr(connection, "_SLOWEST_HEAD", 0.1)
        closed = asyncio.create_task(reader.read())
        async with asyncio.timeout(PATIENCE):
            while not closed.done():
                writer.write(b"\r\n")
                await asyncio.wait({closed}, timeout=0.01)
            with suppress(ConnectionError):
                assert await closed == b""
        writer.close()


SLOW_BODIES: Final = (
    (post("/webhooks/fal/x", b"content-length: 90000\r\n\r\n"), b"x", 408),
    (post("/webhooks/fal/x", b"transfer-encoding: chunked\r\n\r\n"), b"1\r\nx\r\n", 408),
    (SUBMIT + b"content-length: 90000\r\n\r\n", b"x", 408),
    (SUBMIT + b"content-length: 90000\r\n\r\n", b"", 408),
    (post("/v1/predictions", b"content-length: 90000\r\n\r\n"), b"x", 401),
    (post("/nowhere", b"content-length: 90000\r\n\r\n"), b"x", 404),
)
"""The head, the bytes repeated slowly, and the status before the connection ends."""


async def test_slow_body_times_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_SLOWEST_HEAD", PATIENCE)
    monkeypatch.setattr(connection, "_SLOWEST_REST", 0.2)
    monkeypatch.setattr(reading, "_GRACE", 0.1)
    async with start() as station, served(station) as port:
        answers = await asyncio.gather(*(talk(port, head, drip) for head, drip, _ in SLOW_BODIES))
        assert [status(answer) for answer in answers] == [code for _, _, code in SLOW_BODIES]
        late = [answer for answer in answers if status(answer) == 408]
        assert all(b"connection: close" in answer.lower() for answer in late)
        assert all(b"too-slow" in answer for answer in late)


async def test_body_above_the_minimum_rate_is_received_in_full(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_GRACE", 0.05)
    monkeypatch.setattr(reading, "_PACE", 16)  # each KiB adds a minute
    async with start() as station, served(station) as port:
        sent = await station.submitted("eachlabs")
        letter = write(station.network, sent)
        body = letter.body + b" " * (4096 - len(letter.body))
        head = post(sent.path, b"x-webhook-secret: " + sent.secret.encode() + b"\r\n")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + b"content-length: 4096\r\n\r\n" + body[:1024])
        for at in range(1024, 4096, 1024):
            await asyncio.sleep(0.1)
            writer.write(body[at : at + 1024])
            await writer.drain()
        assert status(await reader.readuntil(b"\r\n\r\n")) == 200
        writer.close()


async def test_early_answer_keeps_the_connection_open(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_SLOWEST_REST", PATIENCE)
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


# --- many connections ---


class FakeConnection:
    """A fake connection with what WaitingConnections uses."""

    def __init__(self, waiting: WaitingConnections) -> None:
        self.waiting = waiting
        self.open = True

    def close_now(self) -> None:
        self.open = False
        self.waiting.drop(self)  # type: ignore[arg-type] # only its identity matters


def open_after(most: int, moments: list[float]) -> list[bool]:
    now = 0.0
    waiting = WaitingConnections(most, lambda: now)
    lines = []
    for moment in moments:
        now = moment
        lines.append(FakeConnection(waiting))
        waiting.add(lines[-1])  # type: ignore[arg-type]
    return [line.open for line in lines]


def test_oldest_waiting_connection_is_closed_over_the_limit() -> None:
    assert open_after(3, [0.0, 2.0, 2.1, 2.2, 4.0]) == [False, False, True, True, True]


def test_burst_of_connections_may_reach_twice_the_limit() -> None:
    assert open_after(3, [0.0] * 6) == [True] * 6
    assert open_after(3, [0.0] * 8) == [False, False, *[True] * 6]


@pytest.mark.parametrize("data", [b"", LIST], ids=["new", "used"])
async def test_silent_connections_do_not_block_other_clients(
    start: Start, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(connection, "_most_waiting", lambda: 20)
    async with start() as station, running(station) as server:
        # Our idle timeout must be longer than that of any proxy.
        assert server.config.timeout_keep_alive > 600
        port = port_of(server)
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
        for reader, writer in silent if data else ():
            writer.write(data)
            with suppress(asyncio.IncompleteReadError, ConnectionError):  # the first are closed
                await reader.readuntil(b"}")
        assert status(await talk(port, LAST)) == 200
        async with asyncio.timeout(PATIENCE):
            for reader, _ in silent[:50]:  # at most the last 40 stay open
                with suppress(ConnectionError):
                    assert await reader.read() == b""
        for _, writer in silent:
            writer.close()


# --- depth and size of JSON ---

DEEP: Final = b"[" * 100_000 + b"]" * 100_000
DEEPEST: Final = b"[" * (2 * 1024 * 1024 - 40) + b"]" * (2 * 1024 * 1024 - 40)
EXTREME_JSON: Final = {
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


_ACCEPTED: Final = {"integer within reach", "long fraction"}
"""Unusual JSON that can still be passed on unchanged."""


async def test_extreme_json_in_a_verified_callback_is_stored_and_polled(
    start: Start, logged: Logged
) -> None:
    async with start() as station, served(station) as port:
        for name, body in EXTREME_JSON.items():
            sent = await station.submitted("eachlabs", name)
            stored, polls = station.count("callbacks"), station.network.count("eachlabs.poll")
            forged = whole(post(sent.path, b"x-webhook-secret: wrong\r\n"), body)
            assert status(await talk(port, forged)) == 401
            assert station.count("callbacks") == stored
            proved = post(sent.path, b"x-webhook-secret: " + sent.secret.encode() + b"\r\n")
            assert status(await talk(port, whole(proved, body))) == 200
            assert station.count("callbacks") == stored + 1, name
            sizes = station.rows("SELECT length(body) FROM callbacks")
            assert (len(body),) in map(tuple, sizes), name
            await eventually(lambda polls=polls: station.network.count("eachlabs.poll") > polls)  # type: ignore[misc]
        found = (await station.http.get("/v1/predictions")).json()["data"]
        assert {each["status"] for each in found} == {"processing"}
    assert not [line for line in logged if line["log_level"] == "error"]


async def test_extreme_json_in_a_submit_is_accepted_or_returns_4xx(
    start: Start, logged: Logged
) -> None:
    async with start() as station, served(station) as port:
        for name, body in EXTREME_JSON.items():
            given = b'{"provider":"fal","model":"a/b","input":%b}' % body
            for data in (body, given):
                code = status(await talk(port, whole(SUBMIT, data)))
                assert code in (
                    {202} if data == given and name in _ACCEPTED else {400, 413, 422}
                ), name
        assert station.count("predictions") == len(_ACCEPTED)
        assert (await station.http.get("/v1/predictions")).status_code == 200
    assert not [line for line in logged if line["log_level"] == "error"]
