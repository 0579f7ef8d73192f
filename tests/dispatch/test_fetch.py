"""The guarded download: public addresses only, bounded, and told by its bytes."""

import asyncio
import base64
import gzip
import hashlib
import socket
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from receiver import Dead, Output
from receiver.dispatch.fetch import (
    Fetched,
    ForbiddenAddress,
    GuardedTransport,
    fetch,
    guarded_client,
    is_public,
    sniff,
)

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


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_public_or_not(address: str) -> None:
    assert is_public(address) == ADDRESSES[address]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Script the answers for names, one after another; what is not named is an address."""
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
    """Notes where a connection would go, and answers from a script."""

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
async def test_a_url_with_a_private_address_is_dead(
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
async def test_what_is_no_web_address_is_dead_or_cannot_be_resolved(
    resolver: dict[str, list[list[str]]], tmp_path: Path, url: str
) -> None:
    resolver["files.example"] = [[PUBLIC]]
    async with httpx.AsyncClient(
        transport=GuardedTransport(allow_private=False, inner=httpx.AsyncHTTPTransport())
    ) as client:
        with pytest.raises((Dead, httpx.ConnectError)):
            await download(client, url, tmp_path)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("nothing", [Output(text="only words"), Output(url=""), ""])
async def test_an_output_without_a_url_is_dead(tmp_path: Path, nothing: Output | str) -> None:
    async with guarded() as (client, _):
        with pytest.raises(Dead, match="has no URL"):
            await download(client, nothing, tmp_path)


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1", PUBLIC], ["2606:4700::1", "fe80::1"], []],
)
async def test_a_name_that_leads_anywhere_private_is_dead(
    resolver: dict[str, list[list[str]]], tmp_path: Path, addresses: list[str]
) -> None:
    resolver["files.example"] = [addresses]
    async with guarded() as (client, wire):
        with pytest.raises(Dead, match=r"files\.example leads to"):
            await download(client, "https://files.example/x", tmp_path)
        assert wire.requests == []


@pytest.mark.parametrize("address", [PUBLIC, "2606:4700::1"])
async def test_the_connection_goes_to_the_address_that_was_checked(
    resolver: dict[str, list[list[str]]], tmp_path: Path, address: str
) -> None:
    resolver["files.example"] = [[address], ["127.0.0.1"]]  # the second look gets another answer
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


async def test_a_name_is_resolved_as_it_is_sent(
    resolver: dict[str, list[list[str]]], tmp_path: Path
) -> None:
    resolver["xn--strae-oqa.example"] = [[PUBLIC]]
    resolver["strasse.example"] = resolver["straße.example"] = [["127.0.0.1"]]
    async with guarded() as (client, wire):
        await download(client, "https://straße.example/", tmp_path)
        assert wire.requests[0].extensions["sni_hostname"] == "xn--strae-oqa.example"


async def test_a_name_that_cannot_be_resolved_may_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
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
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_to_a_private_address_is_dead(
    resolver: dict[str, list[list[str]]], tmp_path: Path, location: str, status: int
) -> None:
    resolver["files.example"] = [[PUBLIC]]
    resolver["inside.example"] = [["10.0.0.7"]]
    async with guarded(moved(location, status)) as (client, wire):
        with pytest.raises(Dead, match="not public"):
            await download(client, "https://files.example/", tmp_path)
        assert [request.url.host for request in wire.requests] == [PUBLIC]


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://files.example/x"])
async def test_a_redirect_off_the_web_is_never_followed(
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
        with pytest.raises((Dead, httpx.HTTPError)):
            await download(client, "https://files.example/", tmp_path)
    await inner.aclose()


async def test_a_redirect_to_another_public_place_is_followed(
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


async def test_with_leave_a_private_address_is_fetched(tmp_path: Path) -> None:
    async with guarded(allow_private=True) as (client, wire):
        assert (await download(client, "http://127.0.0.1:1/x", tmp_path)).size == 2
        assert wire.requests[0].url.host == "127.0.0.1"


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(
    head: Sequence[bytes], *pieces: bytes, hold: asyncio.Event | None = None
) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer every request on loopback with these bytes; give the URL and what was asked."""
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
            pass  # the client has had enough
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


async def test_a_download_is_told_by_its_bytes(tmp_path: Path) -> None:
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
        ((b"content-type: Image/SVG+xml; charset=utf-8",), "image/svg+xml"),
        ((), "application/octet-stream"),
    ],
)
async def test_where_the_bytes_say_nothing_the_server_does(
    tmp_path: Path, declared: tuple[bytes, ...], expected: str
) -> None:
    async with (
        serving((*OK, *declared), b"<svg/>") as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        assert (await download(client, url, tmp_path)).content_type == expected


async def test_the_client_of_the_app_reaches_no_private_address(tmp_path: Path) -> None:
    async with (
        serving(OK, b"secret") as (url, asked),
        guarded_client(allow_private=False) as client,
    ):
        for address in (url, url.replace("127.0.0.1", "localhost")):
            with pytest.raises(Dead, match="not public"):
                await download(client, address, tmp_path)
        assert asked == []


async def test_the_client_of_the_app_asks_no_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    async with serving(OK, b"fine") as (url, _), guarded_client(allow_private=True) as client:
        assert (await download(client, url, tmp_path)).read() == b"fine"


async def test_a_loop_of_redirects_ends(tmp_path: Path) -> None:
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
async def test_a_result_that_is_gone_is_dead(tmp_path: Path, status: int) -> None:
    async with guarded(httpx.Response(status), allow_private=True) as (client, _):
        with pytest.raises(Dead, match=f"gone: HTTP {status}"):
            await download(client, "http://127.0.0.1/", tmp_path)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
async def test_a_server_in_trouble_may_be_asked_again(tmp_path: Path, status: int) -> None:
    async with guarded(httpx.Response(status), allow_private=True) as (client, _):
        with pytest.raises(httpx.HTTPStatusError):
            await download(client, "http://127.0.0.1/", tmp_path)


async def test_a_size_that_is_declared_too_large_is_not_even_read(tmp_path: Path) -> None:
    async with (
        serving((*OK, b"content-length: 1001")) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(Dead, match="has 1001 bytes, more than 1000"):
            await download(client, url, tmp_path)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("size", [1000, 1001])
async def test_a_size_that_is_not_declared_is_counted(tmp_path: Path, size: int) -> None:
    async with (
        serving(OK, b"x" * 600, b"x" * (size - 600)) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        if size == 1000:
            assert (await download(client, url, tmp_path)).size == 1000
        else:
            with pytest.raises(Dead, match="larger than 1000 bytes"):
                await download(client, url, tmp_path)


async def test_an_endless_answer_is_cut_off_by_size(tmp_path: Path) -> None:
    async with (
        serving(OK, *([b"x" * 100_000] * 200)) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(Dead, match="larger than"):
            await download(client, url, tmp_path, max_bytes=200_000)


async def test_an_answer_that_takes_too_long_may_be_tried_again(tmp_path: Path) -> None:
    hold = asyncio.Event()
    async with (
        serving(OK, b"some", hold=hold) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(TimeoutError):
            await download(client, url, tmp_path, seconds=0.05)
        hold.set()


async def test_an_answer_that_is_cut_short_may_be_tried_again(tmp_path: Path) -> None:
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
async def test_an_answer_that_was_compressed_all_the_same_is_inflated(
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
async def test_an_encoding_that_is_a_lie_gives_no_file(
    tmp_path: Path, encoding: bytes, body: bytes, error: type[Exception]
) -> None:
    async with (
        serving(gzipped(encoding=encoding), body) as (url, _),
        guarded_client(allow_private=True) as client,
    ):
        with pytest.raises(error):
            await download(client, url, tmp_path)


async def test_a_bomb_is_bounded_in_size_and_in_memory(tmp_path: Path) -> None:
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
async def test_a_data_uri_is_fetched_without_a_network(
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
        ("data:text/plain," + "x" * 1001, "larger than 1000"),
    ],
)
async def test_a_data_uri_that_is_no_good_is_dead(tmp_path: Path, url: str, words: str) -> None:
    async with guarded() as (client, _):
        with pytest.raises(Dead, match=words):
            await download(client, url, tmp_path)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"GIF89a", "image/gif"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        (b"RIFF\0\0\0\0WAVEfmt ", "audio/wav"),
        (b"\0\0\0\x18ftypisom", "video/mp4"),
        (b"\0\0\0\x18ftypavif", "image/avif"),
        (b"\x1aE\xdf\xa3", "video/webm"),
        (b"%PDF-1.7", "application/pdf"),
        (b"<html>", None),
        (b"", None),
        (b"\x89PN", None),
    ],
)
def test_the_first_bytes_name_the_type(head: bytes, kind: str | None) -> None:
    assert sniff(head) == kind


def test_a_forbidden_address_is_an_error_of_the_request() -> None:
    assert issubclass(ForbiddenAddress, httpx.RequestError)
