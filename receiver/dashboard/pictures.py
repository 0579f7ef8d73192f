"""The outputs that pages show: thumbnails, pictures, films with ranges, and all else as downloads.

They come from the files that `save` has stored, or from the provider by the guarded download; a
browser never fetches them from other servers. All but a few types are downloads, SVG too.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote, unquote, urlsplit
from weakref import WeakValueDictionary

import httpx
import structlog
from msgspec import Meta
from starlette.responses import FileResponse, Response

from receiver.dashboard.cache import PictureCache
from receiver.dashboard.context import PageContext
from receiver.dashboard.declare import page
from receiver.dashboard.media import SHOWN
from receiver.dashboard.rendering import Static
from receiver.dashboard.thumbnails import Unshowable, thumbnail
from receiver.deliveries.handlers import Dead
from receiver.http.declare import PredictionId
from receiver.http.parts import Parts
from receiver.model.errors import Problem
from receiver.model.extensions import type_of
from receiver.model.values import Output, Prediction, Stored

log = structlog.get_logger("receiver")

Number = Annotated[str, Meta(pattern="^[0-9]{1,3}$")]
_ENDINGS: Final = {*SHOWN.values(), "bin"}
"""Endings of the names of copies."""
_LARGEST: Final = 256 * 1024 * 1024
_LARGEST_BARE: Final = 4 * 1024 * 1024
"""Bytes of a picture that is shown as it is, if no thumbnail can be made."""
_SMALL: Final = "image/webp"
"""The type of a thumbnail that was made."""
_PATIENCE: Final = 60.0
_AT_ONCE: Final = 4
_DECODED_AT_ONCE: Final = 2
"""Pictures: one of the largest takes a quarter of a gigabyte of memory, even from a small file."""
_RETRY_AFTER: Final = 60.0
"""Seconds after which a missing output is fetched again."""
_SANDBOX: Final = {
    "Content-Security-Policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
}
_REVALIDATE: Final = {"Cache-Control": "private, no-cache"}
"""A browser may cache a thumbnail, and revalidates it before each use."""


class Gone(Exception):
    """The output has expired, or is invalid."""


class Later(Exception):
    """The output cannot be fetched just now."""


class PicturePages:
    """The routes of outputs."""

    def __init__(self, parts: Parts, cache: PictureCache, static: Static) -> None:
        self._static = static
        self._predictions = parts.store.predictions
        self._deliveries = parts.deliveries
        self._cache = cache
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._room = asyncio.Semaphore(_AT_ONCE)
        self._decoding = asyncio.Semaphore(_DECODED_AT_ONCE)

    @page("/predictions/{id}/outputs/{number}/thumbnail", is_part=True)
    async def small(self, context: PageContext, id: PredictionId, number: Number) -> Response:
        """Return a thumbnail, or a picture that shows why there is none."""
        _, output = await self._output(id, number)
        try:
            path, kind = await self._thumbnail(id, int(number), output)
            return _tagged(context, path, kind)
        except Gone:
            return self._placeholder("gone.svg", 410)
        except (Later, OSError):  # the cache's disk may be full, or the copy just removed
            return self._placeholder("later.svg", 502)
        except Unshowable:
            return self._placeholder("unshowable.svg", 415)

    @page("/predictions/{id}/outputs/{number}", is_part=True)
    async def whole(self, context: PageContext, id: PredictionId, number: Number) -> Response:
        """Return an output: to be shown, or as a download."""
        prediction, output = await self._output(id, number)
        try:
            path, kind = await self._file(id, int(number), output)
        except Gone as error:
            raise Problem(410, "gone", f"it is not there any more: {error}") from None
        except Later as error:
            raise Problem(502, "unavailable", f"it cannot be fetched now: {error}") from None
        is_shown = kind in SHOWN and "save" not in context.query
        return FileResponse(
            path,
            headers=_SANDBOX,
            media_type=kind if kind in SHOWN else "application/octet-stream",
            filename=f"{prediction.id}-{number}.{SHOWN.get(kind, 'bin')}",
            content_disposition_type="inline" if is_shown else "attachment",
        )

    async def _output(self, id: str, number: str) -> tuple[Prediction, Output]:
        prediction = await self._predictions.get(id)
        outputs = prediction.output or [] if prediction else []
        if prediction is None or int(number) >= len(outputs) or outputs[int(number)].url is None:
            raise Problem(404, "not-found", "there is no such output")
        return prediction, outputs[int(number)]

    async def _thumbnail(self, id: str, number: int, output: Output) -> tuple[Path, str]:
        """Return a thumbnail and its type: from the cache, made, or the picture as it is."""
        async with self._locks.setdefault(f"{id}/{number}/thumbnail", asyncio.Lock()):
            if (found := self._cache.find(id, number, ("small",))) is not None:
                return found, _SMALL
            path, kind = await self._file(id, number, output)
            if not kind.startswith("image/") or kind not in SHOWN:
                raise Unshowable(kind)
            async with self._decoding:
                small = await asyncio.to_thread(self._reduce, id, number, path)
            return small, kind if small == path else _SMALL

    def _reduce(self, id: str, number: int, path: Path) -> Path:
        made = thumbnail(path)
        if made is None:
            if path.stat().st_size > _LARGEST_BARE:
                raise Unshowable("Pillow is not installed")
            return path
        digest = hashlib.sha256(made).hexdigest()
        place = self._cache.place(id) / f"{number}-{digest}.small"
        _write(place, made)
        self._cache.added(len(made))
        return place

    async def _file(self, id: str, number: int, output: Output) -> tuple[Path, str]:
        """Return the file of an output, and its type: as stored by `save`, cached, or fetched."""
        if (kept := _kept(output.stored)) is not None and output.stored is not None:
            return kept, output.stored.content_type
        async with self._locks.setdefault(f"{id}/{number}", asyncio.Lock()):
            gone = self._cache.find(id, number, ("gone",))
            if gone is not None and time.time() - gone.stat().st_mtime < _RETRY_AFTER:
                raise Gone("it was asked for a moment ago")
            if (found := self._cache.find(id, number, _ENDINGS)) is not None:
                return found, str(type_of(found.name))
            return await self._fetch(id, number, output)

    async def _fetch(self, id: str, number: int, output: Output) -> tuple[Path, str]:
        wanted = output
        if output.stored is not None and output.stored.url.startswith(("http://", "https://")):
            wanted = Output(url=output.stored.url, content_type=output.stored.content_type)
        async with self._room:
            try:
                place = self._cache.place(id)
                fetched = await self._deliveries.fetch(
                    wanted, place, max_bytes=_LARGEST, seconds=_PATIENCE
                )
                ending = SHOWN.get(fetched.content_type, "bin")
                kept = fetched.path.replace(place / f"{number}-{fetched.sha256}.{ending}")
            except Dead as error:
                with contextlib.suppress(OSError):
                    (self._cache.place(id) / f"{number}-.gone").touch()
                raise Gone(str(error)) from None
            except (httpx.HTTPError, TimeoutError, OSError) as error:
                raise Later(type(error).__name__) from None
        self._cache.added(fetched.size)
        return kept, fetched.content_type

    def _placeholder(self, name: str, status: int) -> Response:
        """Return a placeholder picture."""
        return Response(self._static.files[name], status, media_type="image/svg+xml")


def _tagged(context: PageContext, path: Path, kind: str) -> Response:
    """Return a thumbnail, or 304 if the browser already has it."""
    headers = {**_SANDBOX, **_REVALIDATE, "ETag": f'"{quote(path.name)}"'}
    if context.request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(path.read_bytes(), headers=headers, media_type=kind)


def _kept(stored: Stored | None) -> Path | None:
    """Return the file that `save` has written on this machine, if it still has its size."""
    if stored is None or not stored.url.startswith("file:///"):
        return None
    path = Path(unquote(urlsplit(stored.url).path))
    return path if path.is_file() and path.stat().st_size == stored.size else None


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    part.replace(path)
