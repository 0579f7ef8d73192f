"""The guarded download: only public addresses, within limits, its content type checked."""

import asyncio
import base64
import gzip
import hashlib
import itertools
import re
import socket
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver import Dead, Output
from receiver.deliveries.fetch import Fetched, fetch
from receiver.deliveries.file_types import sniff
from receiver.deliveries.guard import (
    GuardedTransport,
    guarded_client,
    is_public,
)
from tests.clocks import LoopClock
from tests.patience import PATIENCE

pytestmark = pytest.mark.anyio

PUBLIC = "93.184.215.14"

ADDRESSES = {
    "1.1.1.1": True,
    PUBLIC: True,
    "172.15.0.1": True,
    "172.32.0.1": True,
    "2606:4700:4700::1111": True,
    "2a00:1450:4001:81b::200e": True,
    "::ffff:1.1.1.1": True,
    "2002:101:101::1": True,  # 6to4 of 1.1.1.1
    "64:ff9b::101:101": True,  # NAT64 of 1.1.1.1
    # this network, private, loopback, link-local and shared
    "0.0.0.0": False,
    "0.1.2.3": False,
    "10.0.0.1": False,
    "172.16.0.1": False,
    "172.31.255.255": False,
    "192.168.1.1": False,
    "127.0.0.1": False,
    "127.255.255.254": False,
    "169.254.169.254": False,
    "100.64.0.1": False,
    "100.100.100.200": False,
    # documentation, benchmarks, protocols, multicast, reserved
    "192.0.0.192": False,
    "192.0.2.1": False,
    "198.18.0.1": False,
    "198.51.100.1": False,
    "203.0.113.1": False,
    "224.0.0.1": False,
    "239.255.255.250": False,
    "240.0.0.1": False,
    "255.255.255.255": False,
    # the same in IPv6
    "::": False,
    "::1": False,
    "fe80::1": False,
    "fe80::1%eth0": False,
    "fec0::1": False,
    "fc00::1": False,
    "fd00:ec2::254": False,
    "ff02::1": False,
    "ff0e::1": False,
    "100::1": False,
    "2001:db8::1": False,
    # IPv4 inside IPv6
    "::ffff:127.0.0.1": False,
    "::ffff:169.254.169.254": False,
    "::ffff:10.0.0.1": False,
    "::127.0.0.1": False,
    "::ffff:0:127.0.0.1": False,
    "64:ff9b::7f00:1": False,
    "64:ff9b::a9fe:a9fe": False,
    "64:ff9b:1::7f00:1": False,
    "2002:7f00:1::": False,
    "2002:c0a8:101::1": False,
    "2002:e000:1::": False,
    "2001:0:7f00:1::": False,  # Teredo
    "2001:0:4136:e378:8000:63bf:f5ff:fffe": False,
}


def test_is_public_rejects_private_and_reserved_addresses() -> None:
    assert {address: is_public(address) for address in ADDRESSES} == ADDRESSES


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Script the DNS answers of host names, one per lookup; any other host is an IP address."""
    answers: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *_: Any, **__: Any) -> list[Any]:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in answers:
            return real(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        found = answers[name].pop(0) if len(answers[name]) > 1 else answers[name][0]
        return [
            (socket.AF_INET6 if ":" in one else socket.AF_INET, 1, 6, "", (one, port or 0))
            for one in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return answers


class Wire(httpx.AsyncBaseTransport):
    """A transport that records requests and answers from a list."""

    def __init__(self, *answers: httpx.Response) -> None:
        self.requests: list[httpx.Request] = []
        self.closed = False
        self._answers = list(answers)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self._answers.pop(0) if self._answers else httpx.Response(200, content=b"ok")

    async def aclose(self) -> None:
        self.closed = True


@asynccontextmanager
async def guarded(
    *answers: httpx.Response, allow_private: bool = False
) -> AsyncIterator[tuple[httpx.AsyncClient, Wire]]:
    wire = Wire(*answers)
    transport = GuardedTransport(allow_private=allow_private, inner=wire)
    async with httpx.AsyncClient(transport=transport, follow_redirects=True) as client:
        yield client, wire
    assert wire.closed


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def download(
    client: httpx.AsyncClient,
    url: Output | str,
    folder: Path,
    *,
    max_bytes: int = 1000,
    seconds: float = 10.0,
) -> Fetched:
    return await fetch(client, url, folder, max_bytes=max_bytes, seconds=seconds)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0177.0.0.1/",
        "http://0/",
        "http://[::1]:8080/",
        "http://[::ffff:7f00:1]/",
        "http://[::]/",
        "https://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "http://user:secret@10.0.0.1/",
        "http://files.example@127.0.0.1/",
        "http://127.0.0.1#@files.example/",
    ],
)
async def test_url_with_a_private_address_is_dead(
    resolver: dict[str, list[list[str]]], tmp_path: Path, url: str
) -> None:
    assert resolver == {}
    async with guarded() as (client, wire):
        with pytest.raises(Dead, match="will not fetch"):
            await download(client, url, tmp_path)
        assert wire.requests == []


@pytest.mark.parametrize(
    "url",
    [
        "ftp://files.example/x",
        "file:///etc/passwd",
        "gopher://files.example/",
        "javascript:alert(1)",
        "//files.example/x",
        "/etc/passwd",
        "cat.png",
        "http://",
        "http://[::1",
        "http://files.example:99999/",
        "https://\0.example/",
        "http://" + "a" * 70_000,
        "http://xn--/",
    ],
)
async def test_invalid_url_is_dead(
    resolver: dict[str, list[list[str]]], tmp_path: Path, url: str
) -> None:
    resolver["files.example"] = [[PUBLIC]]
    async with httpx.AsyncClient(
        transport=GuardedTransport(allow_private=False, inner=httpx.AsyncHTTPTransport())
    ) as client:
        with pytest.raises(Dead):
            await download(client, url, tmp_path)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("nothing", [Output(text="only words"), ""])
async def test_output_without_a_url_is_dead(tmp_path: Path, nothing: Output | str) -> None:
    async with guarded() as (client, _):
        with pytest.raises(Dead, match="has no URL"):
            await download(client, nothing, tmp_path)


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1", PUBLIC], ["2606:4700::1", "fe80::1"], []],
)
async def test_host_with_any_private_address_or_without_addresses_is_dead(
    resolver: dict[str, list[list[str]]], tmp_path: Path, addresses: list[str]
) -> None:
    resolver["files.example"] = [addresses]
    async with guarded() as (client, wire):
        with pytest.raises(Dead, match=r"files\.example leads to"):
            await download(client, "https://files.example/x", tmp_path)
        assert wire.requests == []


@pytest.mark.parametrize("address", [PUBLIC, "2606:4700::1"])
async def test_connection_uses_the_checked_address_despite_dns_rebinding(
    resolver: dict[str, list[list[str]]], tmp_path: Path, address: str
) -> None:
    resolver["files.example"] = [[address], ["127.0.0.1"]]  # the second lookup gets another answer
    async with guarded() as (client, wire):
        fetched = await download(client, "https://files.example:8443/a?b=c", tmp_path)
        [request] = wire.requests
        assert fetched.read() == b"ok"
        assert request.url.host == address
        assert (request.url.port, request.url.raw_path) == (8443, b"/a?b=c")
        assert request.headers["host"] == "files.example:8443"
        assert request.extensions["sni_hostname"] == "files.example"
        with pytest.raises(Dead):
            await download(client, "https://files.example:8443/a?b=c", tmp_path)


async def test_international_host_name_is_resolved_in_the_form_that_is_sent(
    resolver: dict[str, list[list[str]]], tmp_path: Path
) -> None:
    resolver["xn--strae-oqa.example"] = [[PUBLIC]]
    resolver["strasse.example"] = resolver["straße.example"] = [["127.0.0.1"]]
    async with guarded() as (client, wire):
        await download(client, "https://straße.example/", tmp_path)
        assert wire.requests[0].extensions["sni_hostname"] == "xn--strae-oqa.example"


async def test_dns_failure_can_be_retried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nowhere(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    async with guarded() as (client, _):
        with pytest.raises(httpx.ConnectError, match=r"cannot resolve files\.example"):
            await download(client, "https://files.example/", tmp_path)


def moved(location: str, status: int = 302) -> httpx.Response:
    return httpx.Response(status, headers={"location": location})


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "http://inside.example/",
        "//inside.example/",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/iam",
        "http://2130706433/",
    ],
)
async def test_redirect_to_a_private_address_is_dead(
    resolver: dict[str, list[list[str]]], tmp_path: Path, location: str
) -> None:
    for status in (301, 302, 303, 307, 308):
        resolver["files.example"] = [[PUBLIC]]
        resolver["inside.example"] = [["10.0.0.7"]]
        async with guarded(moved(location, status)) as (client, wire):
            with pytest.raises(Dead, match="not public"):
                await download(client, "https://files.example/", tmp_path)
            assert [request.url.host for request in wire.requests] == [PUBLIC], status


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://files.example/x"])
async def test_redirect_to_a_non_http_url_is_dead(
    resolver: dict[str, list[list[str]]], tmp_path: Path, location: str
) -> None:
    resolver["files.example"] = [[PUBLIC]]
    inner = httpx.AsyncHTTPTransport()

    class First(Wire):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if not self.requests:
                return await super().handle_async_request(request)
            return await inner.handle_async_request(request)

    transport = GuardedTransport(allow_private=False, inner=First(moved(location)))
    async with httpx.AsyncClient(transport=transport, follow_redirects=True) as client:
        with pytest.raises(Dead, match=r"will not fetch: .*unsupported protocol"):
            await download(client, "https://files.example/", tmp_path)
    assert listing(tmp_path) == []
    await inner.aclose()


async def test_redirect_to_another_public_host_is_followed(
    resolver: dict[str, list[list[str]]], tmp_path: Path
) -> None:
    resolver["files.example"] = [[PUBLIC]]
    resolver["cdn.example"] = [["1.1.1.1"]]
    async with guarded(moved("https://cdn.example/y")) as (client, wire):
        assert (await download(client, "https://files.example/x", tmp_path)).size == 2
        assert [request.headers["host"] for request in wire.requests] == [
            "files.example",
            "cdn.example",
        ]


async def test_private_address_is_fetched_if_allowed(tmp_path: Path) -> None:
    async with guarded(allow_private=True) as (client, wire):
        assert (await download(client, "http://127.0.0.1:1/x", tmp_path)).size == 2
        assert wire.requests[0].url.host == "127.0.0.1"


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(
    head: Sequence[bytes], *pieces: bytes, hold: asyncio.Event | None = None
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer every request on loopback with these bytes; yield the URL and the requests."""
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"\r\n".join([b"HTTP/1.1 " + head[0], *head[1:], b"", b""]))
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            if hold is not None:
                await hold.wait()
        except ConnectionError:
            pass  # the client has disconnected
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", asked
    finally:
        server.close()
        await server.wait_closed()


OK = (b"200 OK", b"connection: close")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


async def test_content_type_comes_from_the_bytes_and_not_from_the_header(tmp_path: Path) -> None:
    async with (
        serving((*OK, b"content-type: text/html; charset=x"), PNG[:3], PNG[3:]) as (url, asked),
        guarded_client(allow_private=True) as client,
    ):
        fetched = await download(client, Output(url=url), tmp_path)
    assert fetched.read() == PNG
    assert fetched.path.parent == tmp_path
    assert (fetched.size, fetched.content_type) == (len(PNG), "image/png")
    assert fetched.sha256 == hashlib.sha256(PNG).hexdigest()
    assert b"accept-encoding: identity" in asked[0].lower()


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ((b"content-type: Image/X-Odd; charset=utf-8",), "image/x-odd"),
        ((b"content-type: model/obj",), "model/obj"),
        ((b"content-type: binary/octet-stream",), "application/octet-stream"),
        ((), "application/octet-stream"),
    ],
)
async def test_content_type_comes_from_the_header_if_the_bytes_show_none(
    tmp_path: Path, declared: tuple[bytes, ...], expected: str
) -> None:
    async with (
        serving((*OK, *declared), b"\x01\x02") as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        assert (await download(client, url, tmp_path)).content_type == expected


async def test_guarded_client_refuses_private_addresses(tmp_path: Path) -> None:
    async with (
        serving(OK, b"secret") as (url, asked),
        guarded_client(allow_private=False) as client,
    ):
        for address in (url, url.replace("127.0.0.1", "localhost")):
            with pytest.raises(Dead, match="not public"):
                await download(client, address, tmp_path)
        assert asked == []


async def test_guarded_client_ignores_proxy_environment_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with serving(OK, b"fine") as (url, _), guarded_client(allow_private=True) as client:
        assert (await download(client, url, tmp_path)).read() == b"fine"


async def test_redirect_loop_ends_after_six_requests(tmp_path: Path) -> None:
    async with (
        serving((b"302 Found", b"location: /", b"content-length: 0", b"connection: close")) as (
            url,
            asked,
        ),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(httpx.TooManyRedirects):
            await download(client, url, tmp_path)
    assert len(asked) == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_expired_result_status_is_dead(tmp_path: Path, status: int) -> None:
    async with guarded(httpx.Response(status), allow_private=True) as (client, _):
        with pytest.raises(Dead, match=f"gone: HTTP {status}"):
            await download(client, "http://127.0.0.1/", tmp_path)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
async def test_transient_error_status_can_be_retried(tmp_path: Path, status: int) -> None:
    async with guarded(httpx.Response(status), allow_private=True) as (client, _):
        with pytest.raises(httpx.HTTPStatusError):
            await download(client, "http://127.0.0.1/", tmp_path)


class Body(httpx.AsyncByteStream):
    """A body in pieces; unlike a real transport, it does not check its length."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts
        self.given = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            self.given += 1
            yield part


async def test_oversized_content_length_is_dead_before_the_body_is_read(tmp_path: Path) -> None:
    body = Body(b"x" * 1001)
    answer = httpx.Response(200, headers={"content-length": "1001"}, stream=body)
    async with guarded(answer, allow_private=True) as (client, _):
        with pytest.raises(Dead, match="has 1001 bytes, more than 1000"):
            await download(client, "http://127.0.0.1/", tmp_path)
    assert body.given == 0
    assert listing(tmp_path) == []


@pytest.mark.parametrize("size", [1000, 1001])
async def test_body_without_content_length_is_counted(tmp_path: Path, size: int) -> None:
    async with (
        serving(OK, b"x" * 600, b"x" * (size - 600)) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        if size == 1000:
            assert (await download(client, url, tmp_path)).size == 1000
        else:
            with pytest.raises(Dead, match="larger than 1000 bytes"):
                await download(client, url, tmp_path)


async def test_endless_body_is_cut_off_at_the_size_limit(tmp_path: Path) -> None:
    async with (
        serving(OK, *([b"x" * 100_000] * 200)) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(Dead, match="larger than"):
            await download(client, url, tmp_path, max_bytes=200_000)


async def test_slow_response_times_out_and_can_be_retried(tmp_path: Path) -> None:
    hold = asyncio.Event()
    async with (
        serving(OK, b"some", hold=hold) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(TimeoutError):
            await download(client, url, tmp_path, seconds=0.05)
        hold.set()


async def test_truncated_body_can_be_retried(tmp_path: Path) -> None:
    async with (
        serving((*OK, b"content-length: 100"), b"x" * 50) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(httpx.RemoteProtocolError):
            await download(client, url, tmp_path)


def gzipped(*headers: bytes, encoding: bytes = b"gzip") -> tuple[bytes, ...]:
    return (*OK, b"content-encoding: " + encoding, *headers)


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [(b"gzip", gzip.compress), (b"x-gzip", gzip.compress), (b" Deflate", zlib.compress)],
)
async def test_compressed_body_is_decompressed_although_not_requested(
    tmp_path: Path, encoding: bytes, encode: Callable[[bytes], bytes]
) -> None:
    body = encode(PNG)
    async with (
        serving(gzipped(encoding=encoding), body[:5], body[5:]) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        fetched = await download(client, url, tmp_path)
    assert (fetched.read(), fetched.content_type) == (PNG, "image/png")


@pytest.mark.parametrize(
    ("encoding", "body", "error"),
    [
        (b"br", b"x", Dead),
        (b"gzip, gzip", b"x", Dead),
        (b"gzip", b"this is not gzip", httpx.DecodingError),
        (b"gzip", gzip.compress(PNG)[:20], httpx.DecodingError),
        (b"gzip", b"", httpx.DecodingError),
    ],
    ids=["unknown", "twice", "no gzip", "cut short", "empty"],
)
async def test_unknown_or_corrupt_content_encoding_is_an_error(
    tmp_path: Path, encoding: bytes, body: bytes, error: type[Exception]
) -> None:
    async with (
        serving(gzipped(encoding=encoding), body) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(error):
            await download(client, url, tmp_path)


async def test_decompression_bomb_is_limited_in_size_and_memory(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(128 * 1024 * 1024), 9)
    assert len(bomb) < 200_000
    async with (
        serving(gzipped(), bomb) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        tracemalloc.start()
        try:
            with pytest.raises(Dead, match="larger than 1000000 bytes"):
                await download(client, url, tmp_path, max_bytes=1_000_000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize(
    ("url", "content", "kind"),
    [
        ("data:image/png;base64," + base64.b64encode(PNG).decode(), PNG, "image/png"),
        ("data:text/html;base64," + base64.b64encode(PNG).decode(), PNG, "image/png"),
        ("data:text/plain;charset=utf-8,a%20b%C3%A9", "a bé".encode(), "text/plain"),
        ("data:,", b"", "application/octet-stream"),
        ("data:Text/CSV,a,b", b"a,b", "text/csv"),
    ],
)
async def test_data_uri_is_decoded_without_a_request(
    tmp_path: Path, url: str, content: bytes, kind: str
) -> None:
    async with guarded() as (client, wire):
        fetched = await download(client, url, tmp_path)
        assert (fetched.read(), fetched.content_type, fetched.size) == (content, kind, len(content))
        assert fetched.sha256 == hashlib.sha256(content).hexdigest()
        assert wire.requests == []


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png;base64", "without content"),
        ("data:image/png;base64,not base64!", "not base64"),
        ("data:image/png;base64,AAA", "not base64"),
        ("data:image/png;base64,%3D%3D%3D", "not base64"),
        ("data:image/png;base64," + "A" * 1400, "larger than 1000"),
        ("data:image/png," + "%00" * 1001, "larger than 1000"),
    ],
)
async def test_malformed_or_oversized_data_uri_is_dead(
    tmp_path: Path, url: str, words: str
) -> None:
    async with guarded() as (client, _):
        with pytest.raises(Dead, match=words):
            await download(client, url, tmp_path)


SHOWN: dict[bytes, str | None] = {
    PNG: "image/png",
    PNG[:8] + b"\0\0\0\rIHDR" + bytes(17) + b"\0\0\0\x08acTL": "image/apng",
    b"\xff\xd8\xff\xe0": "image/jpeg",
    b"GIF87a": "image/gif",
    b"GIF89a": "image/gif",
    b"RIFF\0\0\0\0WEBPVP8 ": "image/webp",
    b"RIFF\0\0\0\0WAVEfmt ": "audio/wav",
    b"RIFF\0\0\0\0AVI LIST": "video/x-msvideo",
    b"BM\x10\x20\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0": "image/bmp",
    b"II*\0\x08\0\0\0": "image/tiff",
    b"MM\0*\0\0\0\x08": "image/tiff",
    b"\xff\x0a\xfa\x7f": "image/jxl",
    b"\0\0\0\x0cJXL \r\n\x87\n": "image/jxl",
    b"\0\0\0\x18ftypisom": "video/mp4",
    b"\0\0\0\x18ftypmp42": "video/mp4",
    b"\0\0\0\x18ftypavif": "image/avif",
    b"\0\0\0\x18ftypavis": "image/avif",
    b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif": "image/avif",
    b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic": "image/heif",
    b"\0\0\0\x18ftypheic": "image/heic",
    b"\0\0\0\x18ftyphevc": "image/heic",
    b"\0\0\0\x14ftypqt  ": "video/quicktime",
    b"\0\0\0\x08wide\0\0\0\0mdat": "video/quicktime",
    b"\0\0\0\x1cftypM4A ": "audio/mp4",
    b"\0\0\0\x1cftyp3gp5": "video/3gpp",
    b"\x1aE\xdf\xa3": "video/webm",
    b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1f\x42\x82\x84webm": "video/webm",
    b"\x1aE\xdf\xa3\xa3\x42\x86\x81\x01\x42\x82\x88matroska": "video/x-matroska",
    b"OggS" + bytes(24) + b"\x01vorbis": "audio/ogg",
    b"OggS" + bytes(24) + b"\x80theora": "video/ogg",
    b"fLaC\0\0\0\x22": "audio/flac",
    b"FORM\0\0\0\0AIFF": "audio/aiff",
    b"FORM\0\0\0\0AIFC": "audio/aiff",
    b"ID3\x04\0": "audio/mpeg",
    b"\xff\xfb\x90\x64": "audio/mpeg",
    b"\xff\xf3\x84\xc4": "audio/mpeg",
    b"\xff\xf1\x50\x80": "audio/aac",
    b"\xff\xf9\x4c\x80": "audio/aac",
    b"glTF\x02\0\0\0": "model/gltf-binary",
    b"PK\x03\x04": "application/zip",
    b"\x1f\x8b\x08": "application/gzip",
    b"%PDF-1.7": "application/pdf",
    # similar to a known type
    b"RIFF\0\0\0\0????": None,
    b"????\0\0\0\0WEBP": None,
    b"????\0\0\0\0WAVE": None,
    b"BM, a German car, was here before me": None,
    b"\xff\xfb\xf0\x64": None,
    b"\xff\xfb\x0c\x64": None,
    b"\xff\xf1\xfc\x80": None,
    b"\xff\xfe\x41\0\x42\0": None,
    b"its free of charge": None,
    b"FORM\0\0\0\0ILBM": None,
    b"\x89PN": None,
    b"": None,
    # text
    b"<html>": "text/html",
    b"\xef\xbb\xbf \r\n<!DOCTYPE html>": "text/html",
    b"\xff\xfe<\0H\0T\0M\0L\0>\0": "text/html",
    b"\xfe\xff\0<\0b\0r\0/\0>": "text/html",
    b"<HTML><TITLE>Caf\xe9</TITLE>": "text/html",
    b"<!-- a --> <!-- b --><head>": "text/html",
    b'<?xml version="1.0"?><!DOCTYPE html><html/>': "text/html",
    b"<svg/>": "image/svg+xml",
    b'\n<?xml version="1.0"?>\n<!-- made by -->\n<svg xmlns="x">': "image/svg+xml",
    b'<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD"><svg>': "image/svg+xml",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>': "application/xml",
    b"<Error><Code>NoSuchKey</Code></Error>": "application/xml",
    b"<!-- " + b"x" * 600: "application/xml",
    b'{"detail": "Not Found"}': "application/json",
    b" [\n  {": "application/json",
    b"{}": "application/json",
    b"[1, 2]": "application/json",
    b"{not json}": None,
    b"<3 you": None,
    b'{"a": "\0"}': None,
    b"words": None,
}


def test_first_bytes_determine_the_content_type() -> None:
    assert {head: sniff(head) for head in SHOWN} == SHOWN


@pytest.mark.parametrize(
    "head", [b"<!---->" * 80, b"<!--" * 120, b"<?xml " * 80, b"<!DOCTYPE svg " * 40, b"[" * 512]
)
def test_hostile_first_bytes_are_parsed_quickly(head: bytes) -> None:
    began = time.process_time()
    sniff(head[:512])
    assert time.process_time() - began < 5


# --- The bytes must match the promised content type ---------------------------------------------

HTML = b"<!DOCTYPE html><title>Sorry</title>"
JPEG = b"\xff\xd8\xff\xe0" + bytes(20)
MP4 = b"\0\0\0\x18ftypisom" + bytes(20)
WEBM = b"\x1aE\xdf\xa3" + bytes(20)
OGG = b"OggS" + bytes(40)
MP3 = b"ID3\x04" + bytes(20)
ODD = b"\x01\x02\x03"


async def promised(
    folder: Path, content: bytes, *, header: str = "", provider: str | None = None
) -> Fetched:
    headers = {"content-type": header} if header else {}
    async with guarded(
        httpx.Response(200, content=content, headers=headers), allow_private=True
    ) as (client, _):
        output = Output(url="http://127.0.0.1/x", content_type=provider)
        return await download(client, output, folder)


@pytest.mark.parametrize(
    ("promise", "content", "shown"),
    [
        ("image/png", HTML, "text/html"),
        ("image/png", b'<?xml version="1.0"?><Error/>', "application/xml"),
        ("image/jpeg", b'{"detail": "gone"}', "application/json"),
        ("image/webp", b"Not Found", "text/plain"),
        ("image/webp", "zu spät".encode(), "text/plain"),
        ("image/webp", "spät".encode()[:-2], "text/plain"),
        ("image/png", b"\xff\xfeN\0o\0", "text/plain"),
        ("image/png", MP4, "video/mp4"),
        ("image/png", MP3, "audio/mpeg"),
        ("image/png", b"%PDF-1.7", "application/pdf"),
        ("image/svg+xml", HTML, "text/html"),
        ("image/svg+xml", b'{"error": 1}', "application/json"),
        ("video/mp4", JPEG, "image/jpeg"),
        ("video/mp4", MP3, "audio/mpeg"),
        ("video/mp4", HTML, "text/html"),
        ("video/webm", b"<svg/>", "image/svg+xml"),
        ("audio/mpeg", PNG, "image/png"),
        ("audio/mpeg", b"GIF89a", "image/gif"),
        ("audio/wav", b"Too many requests", "text/plain"),
        ("audio/mpegurl", HTML, "text/html"),
    ],
)
async def test_bytes_that_contradict_a_promised_content_type_are_dead(
    tmp_path: Path, promise: str, content: bytes, shown: str
) -> None:
    says = re.escape(
        f"the result is not what it says: {promise} was promised and the bytes are {shown}"
    )
    with pytest.raises(Dead, match=says):
        await promised(tmp_path, content, header=f"{promise.upper()}; charset=utf-8")
    with pytest.raises(Dead, match=says):
        await promised(tmp_path, content, provider=f" {promise} ;a=b")
    with pytest.raises(Dead, match=says):
        await promised(tmp_path, content, provider=promise, header="application/octet-stream")
    with pytest.raises(Dead, match=says):
        await promised(tmp_path, content, provider=promise, header=shown)


@pytest.mark.parametrize(
    ("promise", "content", "kind"),
    [
        ("image/png", PNG, "image/png"),
        ("image/png", JPEG, "image/jpeg"),
        ("image/jpeg", b"RIFF\0\0\0\0WEBP", "image/webp"),
        ("image/png", b"<svg/>", "image/svg+xml"),
        ("image/svg+xml", b"<?xml version='1.0'?>\n" + b"<!--" + b"x" * 600, "image/svg+xml"),
        ("image/svg+xml", b"<!ENTITY odd", "image/svg+xml"),
        ("image/x-portable-pixmap", b"P3 1 1 255 0 0 0", "image/x-portable-pixmap"),
        ("audio/mpegurl", b"#EXTM3U\n", "audio/mpegurl"),
        ("video/mp4", MP4, "video/mp4"),
        ("video/mp4", WEBM, "video/webm"),
        ("video/mp4", b"\0\0\0\x14ftypqt  ", "video/quicktime"),
        ("video/ogg", OGG, "video/ogg"),
        ("video/mp4", b"GIF89a", "image/gif"),
        ("video/mp4", b"RIFF\0\0\0\0WEBP", "image/webp"),
        ("audio/mp4", MP4, "audio/mp4"),
        ("audio/mpeg", MP4, "audio/mp4"),
        ("audio/webm", WEBM, "audio/webm"),
        ("audio/ogg", OGG, "audio/ogg"),
        ("audio/mp4", b"\0\0\0\x1cftypM4A ", "audio/mp4"),
        ("audio/wav", MP3, "audio/mpeg"),
        ("image/x-odd", ODD, "image/x-odd"),
        ("video/x-odd", b"\xe9\xe8\xe7", "video/x-odd"),
        ("application/octet-stream", HTML, "text/html"),
        ("binary/octet-stream", PNG, "image/png"),
        ("model/gltf-binary", b"glTF\x02\0\0\0", "model/gltf-binary"),
        ("model/gltf+json", b'{"asset": 1}', "model/gltf+json"),
        ("application/zip", PNG, "image/png"),
        ("text/html", PNG, "image/png"),
        ("text/plain", b"words", "text/plain"),
    ],
)
async def test_bytes_of_the_promised_kind_give_the_content_type(
    tmp_path: Path, promise: str, content: bytes, kind: str
) -> None:
    assert (await promised(tmp_path, content, header=promise)).content_type == kind
    assert (await promised(tmp_path, content, provider=promise)).content_type == kind
    fetched = await promised(tmp_path, content, header="binary/octet-stream", provider=promise)
    assert fetched.content_type == kind


async def test_bytes_must_match_the_content_types_of_header_and_provider(tmp_path: Path) -> None:
    assert (await promised(tmp_path, PNG, header="image/jpeg", provider="image/webp")).size
    for header, provider in (("image/png", "video/mp4"), ("video/mp4", "image/png")):
        with pytest.raises(Dead, match="video/mp4 was promised and the bytes are image/png"):
            await promised(tmp_path, PNG, header=header, provider=provider)


@pytest.mark.parametrize("promise", ["image/png", "video/mp4", "audio/mpeg", "image/svg+xml"])
async def test_empty_file_with_a_promised_media_type_is_dead(tmp_path: Path, promise: str) -> None:
    with pytest.raises(Dead, match=f"the result is empty: {re.escape(promise)} was promised"):
        await promised(tmp_path, b"", header=promise)
    with pytest.raises(Dead, match="the result is empty"):
        await promised(tmp_path, b"", provider=promise)


@pytest.mark.parametrize("promise", ["", "application/octet-stream", "text/plain"])
async def test_empty_file_without_a_promised_media_type_is_accepted(
    tmp_path: Path, promise: str
) -> None:
    assert (await promised(tmp_path, b"", header=promise)).size == 0


async def test_html_page_sent_byte_by_byte_is_detected(tmp_path: Path) -> None:
    async with (
        serving((*OK, b"content-type: image/png"), *(bytes([byte]) for byte in HTML)) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(Dead, match="the bytes are text/html"):
            await download(client, url, tmp_path)


@pytest.mark.parametrize(
    ("url", "promise", "words"),
    [
        ("data:image/png;base64," + base64.b64encode(HTML).decode(), None, "bytes are text/html"),
        ("data:image/png,%3Chtml%3E", None, "bytes are text/html"),
        ("data:;base64," + base64.b64encode(PNG).decode(), "video/mp4", "bytes are image/png"),
        ("data:image/png;base64,", None, "is empty: image/png"),
        ("data:image/png,", None, "is empty: image/png"),
        ("data:,", "image/png", "is empty: image/png"),
    ],
)
async def test_content_of_a_data_uri_must_match_the_promised_content_type(
    tmp_path: Path, url: str, promise: str | None, words: str
) -> None:
    async with guarded() as (client, _):
        with pytest.raises(Dead, match=words):
            await download(client, Output(url=url, content_type=promise), tmp_path)


async def test_base64_in_a_data_uri_can_be_percent_encoded(tmp_path: Path) -> None:
    encoded = base64.b64encode(PNG).decode().replace("+", "%2B").replace("=", "%3D")
    async with guarded() as (client, _):
        fetched = await download(client, f"data:image/jpeg;base64,{encoded}", tmp_path)
    assert (fetched.read(), fetched.content_type) == (PNG, "image/png")


# --- Redirects, sizes and times ------------------------------------------------------------------


async def test_host_is_resolved_and_checked_again_at_every_redirect(
    resolver: dict[str, list[list[str]]], tmp_path: Path
) -> None:
    resolver["files.example"] = [[PUBLIC]]
    resolver["cdn.example"] = [["1.1.1.1"], ["127.0.0.1"]]
    hops = [
        moved("https://cdn.example/1"),
        moved("https://files.example/2"),
        moved("//cdn.example/"),
    ]
    async with guarded(*hops) as (client, wire):
        with pytest.raises(Dead, match=r"cdn\.example leads to 127\.0\.0\.1"):
            await download(client, "https://files.example/", tmp_path)
        assert [request.url.host for request in wire.requests] == [PUBLIC, "1.1.1.1", PUBLIC]


async def test_body_shorter_than_content_length_is_found_without_transport_checks(
    tmp_path: Path,
) -> None:
    short = httpx.Response(200, headers={"content-length": "109"}, stream=Body(PNG))
    whole = httpx.Response(200, headers={"content-length": "108"}, stream=Body(PNG))
    async with guarded(short, whole, allow_private=True) as (client, _):
        with pytest.raises(httpx.RemoteProtocolError, match="108 bytes came of 109"):
            await download(client, "http://127.0.0.1/", tmp_path)
        assert (await download(client, "http://127.0.0.1/", tmp_path)).read() == PNG


class Dripping(httpx.AsyncByteStream):
    """A body that never ends; after ten bytes the timeout is over."""

    def __init__(self, loop_clock: LoopClock) -> None:
        self._loop_clock = loop_clock

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for number in itertools.count(1):
            yield b"x"
            await asyncio.sleep(0)
            if number == 10:
                self._loop_clock.ahead = PATIENCE


async def test_dripping_body_is_cut_off_by_the_timeout(
    tmp_path: Path,
) -> None:
    body = Dripping(LoopClock())
    async with guarded(httpx.Response(200, stream=body), allow_private=True) as (client, _):
        with pytest.raises(TimeoutError):
            await download(client, "http://127.0.0.1/", tmp_path, seconds=PATIENCE)


async def test_oversized_body_is_not_read_beyond_the_limit(tmp_path: Path) -> None:
    body = Body(*[b"x" * 100_000] * 50)
    async with guarded(httpx.Response(200, stream=body), allow_private=True) as (client, _):
        with pytest.raises(Dead, match="larger than 1000 bytes"):
            await download(client, "http://127.0.0.1/", tmp_path)
    assert body.given == 1


@pytest.mark.parametrize(
    ("kind", "name", "ending"),
    [
        ("image/webp", "", "webp"),
        ("image/jxl", "", "jxl"),
        ("image/avif", "", "avif"),
        ("image/heic", "", "heic"),
        ("video/x-matroska", "", "mkv"),
        ("video/quicktime", "", "mov"),
        ("audio/flac", "", "flac"),
        ("audio/ogg", "", "ogg"),
        ("audio/ogg", "voice.opus", "opus"),
        ("audio/mp4", "", "m4a"),
        ("model/gltf-binary", "", "glb"),
        ("application/zip", "chair.usdz", "usdz"),
        ("application/octet-stream", "lora.safetensors", "safetensors"),
        ("application/octet-stream", "setup.exe", "bin"),
        ("text/plain", "chair.OBJ", "obj"),
        ("application/json", "scene.gltf", "gltf"),
        ("image/png", "really.jpg", "png"),
        ("application/x-made-up", "a.b", "bin"),
    ],
)
def test_file_extension_does_not_depend_on_the_machines_mime_types(
    monkeypatch: pytest.MonkeyPatch, kind: str, name: str, ending: str
) -> None:
    monkeypatch.setattr("mimetypes.guess_extension", lambda *_, **__: ".wrong")
    file = Fetched(path=Path("x"), size=1, sha256="0", content_type=kind, file_name=name)
    assert file.extension == ending
