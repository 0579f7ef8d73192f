"""The guarded download: the only way from a provider's URL to a file on our disk.

A result's URL is untrusted. It is fetched only from public addresses, within a size and a time
limit. The first bytes must match the content type that the provider and the server state: an error
page or an empty file is refused as a picture, whatever the status.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote_to_bytes, urlsplit

import httpx
import msgspec

from receiver.deliveries.file_types import HEAD, extension_of, kind_of
from receiver.deliveries.guard import ForbiddenAddress
from receiver.deliveries.handlers import Dead
from receiver.model.values import Output
from receiver.providers.transport import UnknownEncoding, pieces

MAX_BYTES: Final = 256 * 1024 * 1024
TIMEOUT: Final = 120.0


class Fetched(msgspec.Struct, frozen=True, kw_only=True):
    """A downloaded output; the end of the attempt deletes its file: move or copy it to keep it."""

    path: Path
    size: int
    """In bytes."""
    sha256: str
    """Hex digest of the content."""
    content_type: str
    """The type that the first bytes show; if they show none, the promised type."""
    file_name: str = ""
    """The name that the provider gives, or the last part of the URL's path."""

    @property
    def extension(self) -> str:
        """The usual file extension for this type, without a dot; `bin` for an unknown type."""
        return extension_of(self.content_type, self.file_name)

    def read(self) -> bytes:
        return self.path.read_bytes()


class NotThere(Dead):
    """The result is gone, or is so new that its server does not have it yet."""


async def soon(fetch_it: Callable[[], Awaitable[Fetched]]) -> Fetched:
    """Fetch; if the result is not there yet, try again after each pause."""
    for pause in _PAUSES:
        try:
            return await fetch_it()
        except NotThere:
            await asyncio.sleep(pause)
    return await fetch_it()


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

    `authorization` is sent to the URL itself, but not to another host that it redirects to.
    Raises Dead if a retry cannot help (a forbidden address, too large, gone, not a URL, not the
    promised type), and httpx.HTTPError or TimeoutError if it may.
    """
    output = Output(url=output) if isinstance(output, str) else output
    url = output.url
    if not url:
        raise Dead("this output has no URL")
    try:
        async with asyncio.timeout(seconds):
            if not url.startswith(("http://", "https://", "data:")):
                raise httpx.UnsupportedProtocol(f"{url[:40]!r} is not an http(s) URL")
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


# UnicodeError: a host name that cannot be encoded.
_UNFIT: Final = (
    ForbiddenAddress,
    UnknownEncoding,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
    UnicodeError,
)
_GONE: Final = frozenset({400, 401, 403, 404, 410})
"""Statuses by which different servers answer for an expired result."""
_NOT_YET: Final = frozenset({403, 404})
"""Statuses by which a server or a CDN also answers for a file that was just created."""
_PAUSES: Final = (0.2, 1.0)
"""Seconds before each further try."""


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
    """Yield the content; raise if some is missing, which not every transport detects."""
    came = 0
    async for piece in pieces(answer):
        came += len(piece)
        yield piece
    # `pieces` checks that compressed content is complete.
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
            head += chunk[: HEAD - len(head)]
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
    kind = kind_of(head, [promise.partition(";")[0].strip().lower() for promise in promises])
    return Fetched(path=Path(file.name), size=size, sha256=digest.hexdigest(), content_type=kind)


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
