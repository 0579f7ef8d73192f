"""Telegram's files, their limits, and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from starlette.responses import Response

from receiver.emulator import wire
from receiver.emulator.chats.board import File, kind_of
from receiver.emulator.chats.forms import Upload

KINDS: Final = ("photo", "video", "animation", "audio", "document")
_MOST_PHOTO: Final = 10_000_000
_MOST_DOWN: Final = 20_000_000
_MOST_PIXELS, _MOST_RATIO = 10_000, 20
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PICTURES: Final = (_PNG, b"\xff\xd8\xff", b"RIFF", b"GIF8")


class Problem(Exception):
    """An error that ends a call with its status and description."""

    def __init__(self, status: int, description: str, **parameters: int) -> None:
        super().__init__(description)
        self.status, self.parameters = status, parameters

    def response(self) -> Response:
        body: dict[str, Any] = {"ok": False, "error_code": self.status, "description": str(self)}
        if self.parameters:
            body["parameters"] = self.parameters
        return wire.answer(body, self.status)


def bad(words: str) -> Problem:
    return Problem(400, f"Bad Request: {words}")


@dataclass
class Files:
    """All files that were sent, by their ids."""

    LARGEST: ClassVar[int] = 50_000_000
    kept: dict[str, File] = field(default_factory=dict)

    def take(self, kind: str, given: Any, uploads: Mapping[str, Upload], default: str) -> File:
        """Return the file of an upload, a URL or a known file id; raise Problem otherwise."""
        name = str(given or "")
        upload = uploads.get(name.removeprefix("attach://") if name else default)
        if upload is not None:
            return self.keep(kind, upload)
        if name in self.kept:
            return self.kept[name]
        if name.startswith(("https://", "http://")):
            return self._named(name, kind_of(name.partition("?")[0]), b"", name)
        if name:
            raise bad("wrong file identifier/HTTP URL specified")
        raise bad(f"there is no {kind} in the request")

    def keep(self, kind: str, upload: Upload) -> File:
        if not upload.content:
            raise bad("file must be non-empty")
        if kind == "photo":
            check_photo(upload.content)
        return self._named(upload.name, kind_of(upload.name, upload.content_type), upload.content)

    def file_info(self, file_id: str) -> dict[str, Any]:
        """Return the result of `getFile`; raise Problem if the file is unknown or too big."""
        file = self.kept.get(file_id)
        if file is None:
            raise bad("wrong file_id or the file is temporarily unavailable")
        if len(file.content) > _MOST_DOWN:
            raise bad("file is too big")
        about = {"file_id": file.id, "file_unique_id": f"u{file.id}"}
        return {**about, "file_size": len(file.content), "file_path": f"files/{file.id}"}

    def _named(self, name: str, kind: str, content: bytes, url: str = "") -> File:
        file_id = f"file-{len(self.kept) + 1}"
        file = File(file_id, name.rpartition("/")[2], kind, content, url)
        self.kept[file_id] = file
        return file


def check_photo(content: bytes) -> None:
    """Raise Problem if Telegram would refuse the content as a photo."""
    if len(content) > _MOST_PHOTO:
        raise Problem(413, "Request Entity Too Large")
    if not content.startswith(_PICTURES):
        raise bad("IMAGE_PROCESS_FAILED")
    if content.startswith(_PNG):
        wide, high = (int.from_bytes(content[at : at + 4]) for at in (16, 20))
        if wide + high > _MOST_PIXELS or max(wide, high) > _MOST_RATIO * max(1, min(wide, high)):
            raise bad("PHOTO_INVALID_DIMENSIONS")
