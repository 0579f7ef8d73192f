"""The guarded download: the one way from a provider's URL to bytes on our disk.

A result's URL is text from outside. It is fetched only from public addresses, checked at the moment
of connecting and again on every redirect, within a size and a time. The name is resolved once and
the connection made to the address that was checked, so a name that answers differently the second
time gains nothing.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import unquote_to_bytes

import httpx
import msgspec

from receiver.dispatch.registry import Dead
from receiver.inflate import UnknownEncoding, pieces
from receiver.model import Output

MAX_BYTES: Final = 256 * 1024 * 1024
TIMEOUT: Final = 120.0
_MAX_REDIRECTS: Final = 5
_CHUNK: Final = 64 * 1024
_LARGEST_PORT: Final = 65535


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A downloaded output; its file goes when the attempt ends: move or copy it to keep it."""

    path: Path
    size: int
    """Bytes."""
    sha256: str
    """Hex digest of the content."""
    content_type: str
    """As the first bytes show it; as the server says where they show nothing."""

    def read(self) -> bytes:
        return self.path.read_bytes()


class ForbiddenAddress(httpx.RequestError):
    """The URL leads to an address that a stranger has no business to make us call."""


class GuardedTransport(httpx.AsyncBaseTransport):
    """Connects to public addresses only; wraps the transport that does the work."""

    def __init__(self, *, allow_private: bool, inner: httpx.AsyncBaseTransport) -> None:
        self._allow_private = allow_private
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if (request.url.port or 0) > _LARGEST_PORT:
            raise ForbiddenAddress(f"no port has the number {request.url.port}", request=request)
        if self._allow_private:
            return await self._inner.handle_async_request(request)
        host = request.url.raw_host.decode("ascii")
        address = await self._public_address(request, host)
        # The name stays in the Host header and in TLS; only the connection goes by address.
        pinned = httpx.Request(
            request.method,
            request.url.copy_with(host=address),
            headers=request.headers,
            stream=request.stream,
            extensions={**request.extensions, "sni_hostname": host},
        )
        return await self._inner.handle_async_request(pinned)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def _public_address(self, request: httpx.Request, host: str) -> str:
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, request.url.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpx.ConnectError(f"cannot resolve {host}", request=request) from error
        addresses = [str(entry[4][0]) for entry in found]
        private = [address for address in addresses if not is_public(address)]
        if private or not addresses:
            raise ForbiddenAddress(
                f"{host} leads to {', '.join(private) or 'no address'}, which is not public",
                request=request,
            )
        return addresses[0]


def is_public(address: str) -> bool:
    """Tell whether an IP address is one of the open internet's.

    An IPv6 address that only carries an IPv4 address is judged as that one.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None:
            return ip in _UNICAST and ip.is_global
        ip = inner
    return ip.is_global and not ip.is_multicast and ip not in _SPECIAL


_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
"""All of IPv6 that is given out; older Pythons call some of the rest global."""
_SPECIAL: Final = ipaddress.IPv4Network("192.0.0.0/24")
"""IETF protocol assignments, where one cloud keeps its metadata; older Pythons know a part."""


def guarded_client(*, allow_private: bool) -> httpx.AsyncClient:
    """Make the client for results; it reads no proxy settings, as a proxy would connect for us."""
    return httpx.AsyncClient(
        transport=GuardedTransport(
            allow_private=allow_private, inner=httpx.AsyncHTTPTransport(retries=0)
        ),
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        timeout=httpx.Timeout(30.0),
        trust_env=False,
        headers={"User-Agent": "prediction-receiver", "Accept-Encoding": "identity"},
    )


async def fetch(
    client: httpx.AsyncClient, output: Output | str, folder: Path, *, max_bytes: int, seconds: float
) -> Fetched:
    """Download one output into a new file below `folder`.

    Raises Dead where trying again cannot help (a forbidden address, too large, gone, not a URL) and
    httpx.HTTPError or TimeoutError where it may.
    """
    url = output if isinstance(output, str) else output.url
    if not url:
        raise Dead("this output has no URL")
    try:
        async with asyncio.timeout(seconds):
            if not url.startswith(("http://", "https://", "data:")):
                raise httpx.UnsupportedProtocol(f"{url[:40]!r} is no http(s) URL")
            if url.startswith("data:"):
                return await _save(_from_data_uri(url), folder, _data_type(url), max_bytes)
            return await _download(client, url, folder, max_bytes)
    except _UNFIT as error:
        raise Dead(f"will not fetch: {error}") from error


# UnicodeError: a host name that no name system knows how to spell.
_UNFIT: Final = (
    ForbiddenAddress,
    UnknownEncoding,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
    UnicodeError,
)
_GONE: Final = frozenset({400, 401, 403, 404, 410})
"""A result that has expired, in the words of different stores."""


async def _download(client: httpx.AsyncClient, url: str, folder: Path, max_bytes: int) -> Fetched:
    async with client.stream("GET", url) as answer:
        if answer.status_code in _GONE:
            raise Dead(f"the result is gone: HTTP {answer.status_code}")
        answer.raise_for_status()
        declared = answer.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > max_bytes:
            raise Dead(f"the result has {declared} bytes, more than {max_bytes}")
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        return await _save(pieces(answer), folder, kind, max_bytes)


async def _save(
    chunks: AsyncIterator[bytes], folder: Path, declared: str, max_bytes: int
) -> Fetched:
    digest = hashlib.sha256()
    head = b""
    size = 0
    with tempfile.NamedTemporaryFile(dir=folder, prefix="fetched-", delete=False) as file:
        async for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise Dead(f"the result is larger than {max_bytes} bytes")
            head += chunk[: _HEAD - len(head)]
            digest.update(chunk)
            await _write(file, chunk)
    kind = sniff(head) or declared or "application/octet-stream"
    return Fetched(path=Path(file.name), size=size, sha256=digest.hexdigest(), content_type=kind)


async def _write(file: BinaryIO | Any, chunk: bytes) -> None:
    await asyncio.to_thread(file.write, chunk)


async def _from_data_uri(url: str) -> AsyncIterator[bytes]:
    head, comma, content = url.partition(",")
    if not comma:
        raise Dead("a data URI without content")
    raw = unquote_to_bytes(content)
    if head.endswith(";base64"):
        try:
            raw = base64.b64decode(raw, validate=True)
        except ValueError as error:
            raise Dead("a data URI whose content is not base64") from error
    yield raw


def _data_type(url: str) -> str:
    return url[len("data:") :].partition(",")[0].partition(";")[0].lower()


_HEAD: Final = 16
_SIGNATURES: Final = (
    (0, b"\x89PNG\r\n\x1a\n", "image/png"),
    (0, b"\xff\xd8\xff", "image/jpeg"),
    (0, b"GIF87a", "image/gif"),
    (0, b"GIF89a", "image/gif"),
    (8, b"WEBP", "image/webp"),
    (4, b"ftypavif", "image/avif"),
    (4, b"ftyp", "video/mp4"),
    (0, b"\x1aE\xdf\xa3", "video/webm"),
    (0, b"ID3", "audio/mpeg"),
    (8, b"WAVE", "audio/wav"),
    (0, b"OggS", "audio/ogg"),
    (0, b"%PDF-", "application/pdf"),
)


def sniff(head: bytes) -> str | None:
    """Name the type that the first 16 bytes of a file show; None where they show none."""
    for start, magic, kind in _SIGNATURES:
        if head[start : start + len(magic)] == magic:
            return kind
    return None
