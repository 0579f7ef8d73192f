"""Reading answers up to a size, also compressed ones: a kilobyte can contain gigabytes."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from typing import Final

import httpx

from receiver.model.errors import TooLarge

CHUNK: Final = 64 * 1024
BROKEN: Final = (httpx.HTTPError, httpx.InvalidURL, UnicodeError, TimeoutError)
"""Errors of a request; httpx parses the target of a redirect even if it is not followed."""


class UnknownEncoding(httpx.DecodingError):
    """An answer in an encoding that we did not request and cannot bound."""


async def pieces(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the content in bounded pieces; httpx would inflate a whole chunk at once.

    Raise httpx.DecodingError if it is cut short, broken, or encoded more than once.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding in {"", "identity"} or response.is_stream_consumed:
        async for chunk in response.aiter_bytes(CHUNK):
            yield chunk
        return
    if encoding not in {"gzip", "x-gzip", "deflate"}:
        raise UnknownEncoding(f"encoded as {encoding!r}", request=response.request)
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        async for chunk in response.aiter_raw(CHUNK):
            rest = chunk
            while rest and not inflater.eof:
                yield inflater.decompress(rest, CHUNK)
                rest = inflater.unconsumed_tail
    except zlib.error as error:
        raise httpx.DecodingError(str(error), request=response.request) from error
    if not inflater.eof:
        raise httpx.DecodingError("the answer is cut short", request=response.request)


async def read_capped(response: httpx.Response, most: int) -> bytes:
    """Read a whole answer and close it, or raise TooLarge at the first byte over `most`."""
    body = bytearray()
    try:
        async for piece in pieces(response):
            body += piece
            if len(body) > most:
                raise TooLarge(f"an answer of more than {most} bytes")
    finally:
        await response.aclose()
    return bytes(body)
