"""The guarded download: the one way from a provider's URL to bytes on our disk.

A result's URL is text from outside. It is fetched only from public addresses, checked at the moment
of connecting and again on every redirect, within a size and a time. The name is resolved once and
the connection made to the address that was checked, so a name that answers differently the second
time gains nothing.

What comes must be what was promised. The provider and the server say what a result is, and its
bytes show it: a picture that is an error page, or empty, is no picture, whatever the status was.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import hashlib
import ipaddress
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import unquote_to_bytes, urlsplit

import httpx
import msgspec

from receiver.deliveries.handlers import Dead
from receiver.model.values import Output
from receiver.providers.transport import UnknownEncoding, pieces
from receiver.settings.tls import trusted

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
    """As the first bytes show it; as was promised where they show nothing."""
    file_name: str = ""
    """As the provider, or the end of the URL, names it."""

    @property
    def extension(self) -> str:
        """The usual end of such a file's name, without a dot; `bin` for a type we do not know.

        It does not depend on the machine's own table of types. A type that says little, as that of
        a ZIP file, gives way to the end of the file's own name if that is one we know.
        """
        ending = self.file_name.rpartition(".")[2].lower()
        if self.content_type in _VAGUE and ending in _ENDINGS:
            return ending
        return EXTENSIONS.get(self.content_type, "bin")

    def read(self) -> bytes:
        return self.path.read_bytes()


EXTENSIONS: Final = {
    "image/apng": "apng",
    "image/avif": "avif",
    "image/bmp": "bmp",
    "image/gif": "gif",
    "image/heic": "heic",
    "image/heif": "heif",
    "image/jpeg": "jpg",
    "image/jpg": "jpg",
    "image/jxl": "jxl",
    "image/png": "png",
    "image/svg+xml": "svg",
    "image/tiff": "tiff",
    "image/vnd.adobe.photoshop": "psd",
    "image/vnd.radiance": "hdr",
    "image/webp": "webp",
    "image/x-exr": "exr",
    "image/x-icon": "ico",
    "video/3gpp": "3gp",
    "video/matroska": "mkv",
    "video/mp2t": "ts",
    "video/mp4": "mp4",
    "video/mpeg": "mpg",
    "video/ogg": "ogv",
    "video/quicktime": "mov",
    "video/webm": "webm",
    "video/x-m4v": "m4v",
    "video/x-matroska": "mkv",
    "video/x-msvideo": "avi",
    "audio/aac": "aac",
    "audio/aiff": "aiff",
    "audio/flac": "flac",
    "audio/m4a": "m4a",
    "audio/matroska": "mka",
    "audio/midi": "mid",
    "audio/mp3": "mp3",
    "audio/mp4": "m4a",
    "audio/mpeg": "mp3",
    "audio/ogg": "ogg",
    "audio/opus": "opus",
    "audio/wav": "wav",
    "audio/wave": "wav",
    "audio/webm": "weba",
    "audio/x-flac": "flac",
    "audio/x-m4a": "m4a",
    "audio/x-matroska": "mka",
    "audio/x-wav": "wav",
    "model/3mf": "3mf",
    "model/gltf+json": "gltf",
    "model/gltf-binary": "glb",
    "model/mtl": "mtl",
    "model/obj": "obj",
    "model/ply": "ply",
    "model/stl": "stl",
    "model/vnd.usdz+zip": "usdz",
    "application/gzip": "gz",
    "application/json": "json",
    "application/mp4": "mp4",
    "application/octet-stream": "bin",
    "application/ogg": "ogg",
    "application/pdf": "pdf",
    "application/x-ndjson": "ndjson",
    "application/x-safetensors": "safetensors",
    "application/x-subrip": "srt",
    "application/x-tar": "tar",
    "application/xml": "xml",
    "application/zip": "zip",
    "text/css": "css",
    "text/csv": "csv",
    "text/html": "html",
    "text/markdown": "md",
    "text/plain": "txt",
    "text/vtt": "vtt",
    "text/xml": "xml",
}
"""How the names of files of a type end: of what models make, and of what comes beside it."""
_VAGUE: Final = frozenset(
    {
        *("application/gzip", "application/json", "application/octet-stream", "application/xml"),
        *("application/zip", "audio/ogg", "binary/octet-stream", "text/plain", "text/xml", ""),
    }
)
_ENDINGS: Final = frozenset(
    {
        *EXTENSIONS.values(),
        *("blend", "ckpt", "fbx", "gguf", "jpeg", "onnx", "pt", "pth", "spz", "splat", "toml"),
        *("usd", "usda", "usdc", "yaml", "yml"),
    }
)
"""What the name of a file may end with, however vague its type is; no program among them."""


class NotThere(Dead):
    """The result is gone, or has been made so lately that its store does not have it yet."""


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
    """Return whether an IP address is one of the open internet's.

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


def guarded_client(
    *, allow_private: bool, instead: httpx.AsyncBaseTransport | None = None
) -> httpx.AsyncClient:
    """Make the client for results; it reads no proxy settings, as a proxy would connect for us.

    `instead` stands in for the network and its guard, in tests.
    """
    guarded = GuardedTransport(
        allow_private=allow_private, inner=httpx.AsyncHTTPTransport(retries=0, verify=trusted())
    )
    return httpx.AsyncClient(
        transport=instead or guarded,
        follow_redirects=True,
        max_redirects=_MAX_REDIRECTS,
        timeout=httpx.Timeout(30.0),
        trust_env=False,
        headers={"User-Agent": "prediction-receiver", "Accept-Encoding": "identity"},
    )


async def fetch_soon(
    client: httpx.AsyncClient,
    output: Output | str,
    folder: Path,
    *,
    max_bytes: int,
    seconds: float,
    authorization: str | None = None,
) -> Fetched:
    """Fetch as `fetch` does, and again a moment later if the result is not there yet."""
    try_it = partial(
        fetch,
        client,
        output,
        folder,
        max_bytes=max_bytes,
        seconds=seconds,
        authorization=authorization,
    )
    for pause in _PAUSES:
        try:
            return await try_it()
        except NotThere:
            await asyncio.sleep(pause)
    return await try_it()


async def fetch(
    client: httpx.AsyncClient,
    output: Output | str,
    folder: Path,
    *,
    max_bytes: int,
    seconds: float,
    authorization: str | None = None,
) -> Fetched:
    """Download one output into a new file below `folder`.

    `authorization` goes to the address itself, and not where that redirects to another host.
    Raises Dead where trying again cannot help (a forbidden address, too large, gone, not a URL, not
    what was promised) and httpx.HTTPError or TimeoutError where it may.
    """
    output = Output(url=output) if isinstance(output, str) else output
    url = output.url
    if not url:
        raise Dead("this output has no URL")
    try:
        async with asyncio.timeout(seconds):
            if not url.startswith(("http://", "https://", "data:")):
                raise httpx.UnsupportedProtocol(f"{url[:40]!r} is no http(s) URL")
            if url.startswith("data:"):
                promises = [_data_type(url), output.content_type or ""]
                file = await _save(_from_data_uri(url), folder, promises, max_bytes)
            else:
                headers = {"Authorization": authorization} if authorization else {}
                async with client.stream("GET", url, headers=headers) as answer:
                    file = await _take(answer, folder, output.content_type or "", max_bytes)
            return msgspec.structs.replace(file, file_name=output.file_name or _last_name(url))
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
_NOT_YET: Final = frozenset({403, 404})
"""What a store or a CDN also says of a file that has only just been made."""
_PAUSES: Final = (0.2, 1.0)
"""Seconds before it is asked again."""


async def _take(answer: httpx.Response, folder: Path, promised: str, max_bytes: int) -> Fetched:
    if answer.status_code in _GONE:
        kind = NotThere if answer.status_code in _NOT_YET else Dead
        raise kind(f"the result is gone: HTTP {answer.status_code}")
    answer.raise_for_status()
    text = answer.headers.get("content-length", "")
    declared = int(text) if text.isdecimal() else 0
    if declared > max_bytes:
        raise Dead(f"the result has {declared} bytes, more than {max_bytes}")
    promises = [answer.headers.get("content-type", ""), promised]
    return await _save(_whole(answer, declared), folder, promises, max_bytes)


def _last_name(url: str) -> str:
    return "" if url.startswith("data:") else urlsplit(url).path.rpartition("/")[2]


async def _whole(answer: httpx.Response, declared: int) -> AsyncIterator[bytes]:
    """Return the content in pieces; not every transport notices that some of it never came."""
    came = 0
    async for piece in pieces(answer):
        came += len(piece)
        yield piece
    # What is compressed has its own end, and `pieces` looks for it.
    if came < declared and "content-encoding" not in answer.headers:
        raise httpx.RemoteProtocolError(f"{came} bytes came of {declared}", request=answer.request)


async def _save(
    chunks: AsyncIterator[bytes], folder: Path, promises: Sequence[str], max_bytes: int
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
    kind = _kind(head, [promise.partition(";")[0].strip().lower() for promise in promises])
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
    return url[len("data:") :].partition(",")[0]


def _kind(head: bytes, promises: Sequence[str]) -> str:
    """Name the type of what came, or raise Dead where a promise of a family is broken."""
    families = [promise for promise in promises if promise.startswith(_FAMILIES)]
    shown = sniff(head) or ("text/plain" if _is_plain(_text(head)) else None)
    for promise in families:
        if not head:
            raise Dead(f"the result is empty: {promise} was promised")
        if shown and not _keeps(shown, promise):
            raise Dead(
                f"the result is not what it says: {promise} was promised and the bytes are {shown}"
            )
    said = next((p for p in [*families, *promises] if p not in _NO_PROMISE), _UNKNOWN)
    return _called(sniff(head), said)


def _keeps(shown: str, promise: str) -> bool:
    family = promise.partition("/")[0]
    if promise in _WRITTEN and shown in {"text/plain", "application/xml"}:
        return True
    if shown in _CONTAINERS:
        return family != "image"
    return shown.startswith(f"{family}/") or (family == "video" and shown in _MOVING)


def _called(shown: str | None, said: str) -> str:
    """Say what the bytes show; where they leave something open, in the words of the promise."""
    if shown is None or said.endswith(f"+{shown.partition('/')[2]}"):
        return said
    other = _EITHER.get(shown, "")
    return other if other and said.startswith(f"{other.partition('/')[0]}/") else shown


_UNKNOWN: Final = "application/octet-stream"
_NO_PROMISE: Final = frozenset({"", _UNKNOWN, "binary/octet-stream"})
_FAMILIES: Final = ("image/", "video/", "audio/")
_EITHER: Final = {
    "video/mp4": "audio/mp4",
    "video/webm": "audio/webm",
    "video/x-matroska": "audio/x-matroska",
    "video/3gpp": "audio/3gpp",
    "audio/ogg": "video/ogg",
}
"""Containers whose first bytes do not tell whether they hold sound only, by both their names."""
_CONTAINERS: Final = frozenset({*_EITHER, *_EITHER.values(), "video/quicktime"})
_MOVING: Final = frozenset({"image/gif", "image/apng", "image/webp"})
"""Pictures that may move, and so are somebody's video."""
_WRITTEN: Final = frozenset(
    {
        "image/svg+xml",
        "image/x-xpixmap",
        "image/x-xbitmap",
        "image/x-portable-bitmap",
        "image/x-portable-graymap",
        "image/x-portable-pixmap",
        "audio/mpegurl",
        "audio/x-mpegurl",
        "audio/x-scpls",
    }
)
"""Pictures and lists of sounds that are written as text."""


def _bytes_where(fits: Callable[[int], bool]) -> bytes:
    """Write a class of a regular expression: the bytes that fit."""
    return b"[" + b"".join(b"\\x%02x" % byte for byte in range(256) if fits(byte)) + b"]"


# Frames of sound begin with eleven or twelve bits that are set, as other things do too: what comes
# next must be a bit rate and a sampling rate that exist (ISO 11172-3 and 13818-7).
_MPEG_RATES: Final = _bytes_where(lambda byte: 0 < byte >> 4 < 15 and byte >> 2 & 3 != 3)  # noqa: PLR2004 - bits
_AAC_RATES: Final = _bytes_where(lambda byte: byte >> 2 & 15 < 13)  # noqa: PLR2004 - bits

_HEAD: Final = 512
_SIGNATURES: Final = tuple(
    (re.compile(pattern, re.DOTALL), kind)
    for pattern, kind in (
        (rb"\x89PNG\r\n\x1a\n.{25}.{0,400}acTL", "image/apng"),
        (rb"\x89PNG\r\n\x1a\n", "image/png"),
        (rb"\xff\xd8\xff", "image/jpeg"),
        (rb"GIF8[79]a", "image/gif"),
        (rb"RIFF.{4}WEBP", "image/webp"),
        (rb"RIFF.{4}WAVE", "audio/wav"),
        (rb"RIFF.{4}AVI ", "video/x-msvideo"),
        (rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "image/bmp"),
        (rb"II[*+]\0|MM\0[*+]", "image/tiff"),
        (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "image/jxl"),
        (rb"\0.{3}ftyp(?:avi[fs]|(?:mif1|msf1|miaf).{4}(?:.{4}){0,15}avi[fs])", "image/avif"),
        (rb"\0.{3}ftyphe(?:i[cxms]|v[cxms])", "image/heic"),
        (rb"\0.{3}ftyp(?:mif1|msf1|miaf)", "image/heif"),
        (rb"\0.{3}ftypM4[AB] ", "audio/mp4"),
        (rb"\0.{3}ftypqt  |\0.{3}(?:moov|mdat|wide)", "video/quicktime"),
        (rb"\0.{3}ftyp3g", "video/3gpp"),
        (rb"\0.{3}[fs]typ", "video/mp4"),
        (rb"\x1aE\xdf\xa3.{0,60}matroska", "video/x-matroska"),
        (rb"\x1aE\xdf\xa3", "video/webm"),
        (rb"OggS.{24}.{0,256}\x80theora", "video/ogg"),
        (rb"OggS", "audio/ogg"),
        (rb"fLaC", "audio/flac"),
        (rb"FORM.{4}AIF[FC]", "audio/aiff"),
        (rb"ID3[\x02-\x04]|\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]" + _MPEG_RATES, "audio/mpeg"),
        (rb"\xff[\xf0\xf1\xf8\xf9]" + _AAC_RATES, "audio/aac"),
        (rb"glTF[\1\2]\0\0\0", "model/gltf-binary"),
        (rb"ply\r?\nformat ", "model/ply"),
        (rb".{7}\0\{\s*\"", "application/x-safetensors"),
        (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "application/zip"),
        (rb"\x1f\x8b\x08", "application/gzip"),
        (rb"%PDF-", "application/pdf"),
    )
)
# Atomic, as comments after comments could be taken apart in more ways than there is time for.
_COMMENTS: Final = r"(?>(?:<!--.*?-->\s*)*)"
_BEFORE: Final = r"(?>(?:<\?xml.*?\?>\s*)?)" + _COMMENTS
_MARKUP: Final = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), kind)
    for pattern, kind in (
        (_BEFORE + r"(?:<!doctype svg[^>]*>\s*)?" + _COMMENTS + r"<svg[\s/>]", "image/svg+xml"),
        (_BEFORE + r"<!doctype html\b", "text/html"),
        (
            _BEFORE + r"<(?:html|head|body|title|meta|link|script|style|iframe|table|center|font|"
            r"div|span|h[1-6]|p|pre|br|b|a|img)[\s/>]",
            "text/html",
        ),
        (r"<\?xml\s|<!--|<!doctype\s|<[a-z_][\w:.-]*[\s/>]", "application/xml"),
        (r"\{\s*(?:\"|\}|$)|\[\s*(?:[\"{\[\]\d-]|true|false|null|$)", "application/json"),
    )
)
_BOMS: Final = (
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NOT_WRITTEN: Final = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def sniff(head: bytes) -> str | None:
    """Name the type that the first 512 bytes of a file show; None where they show none."""
    for signature, kind in _SIGNATURES:
        if signature.match(head):
            return kind
    text = _text(head)
    return next((kind for markup, kind in _MARKUP if markup.match(text)), None)


def _text(head: bytes) -> str:
    """Read the head as text, without what may stand before it; '' where it is none.

    A page in an old encoding has odd letters, and is a page all the same.
    """
    encoding = next((name for bom, name in _BOMS if head.startswith(bom)), "utf-8")
    # The incremental decoder keeps back a letter that is cut in half at the end.
    text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
    return "" if _NOT_WRITTEN.search(text) else text.lstrip("\ufeff \t\r\n\f\v")


def _is_plain(text: str) -> bool:
    return bool(text) and "\N{REPLACEMENT CHARACTER}" not in text
