"""The content types of outputs: shown as a picture, a film or a sound, or else a download."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit

from receiver.model.extensions import type_of
from receiver.model.values import Output

Kind: TypeAlias = Literal["image", "video", "audio", "text", "file"]

SHOWN: Final = {
    "image/png": "png",
    "image/jpeg": "jpg",
    "image/gif": "gif",
    "image/webp": "webp",
    "image/avif": "avif",
    "image/apng": "png",
    "video/mp4": "mp4",
    "video/webm": "webm",
    "audio/mpeg": "mp3",
    "audio/ogg": "ogg",
    "audio/wav": "wav",
    "audio/mp4": "m4a",
}
"""Types that a page may show, as they cannot contain a program; SVG can."""


def kind_of(output: Output) -> Kind:
    """Return how an output is shown, as far as this is known before it is fetched."""
    if output.text is not None and output.url is None:
        return "text"
    content_type = output.stored.content_type if output.stored else output.content_type
    content_type = (content_type or _guessed(output.url or "")).partition(";")[0].strip().lower()
    family = content_type.partition("/")[0]
    if content_type in SHOWN:
        return family  # type: ignore[return-value] # it begins with one of them
    return "file"


def _guessed(url: str) -> str:
    """Return the content type that a URL suggests, or an empty text."""
    if url.startswith("data:"):
        return url[5:].partition(",")[0]
    try:
        return type_of(urlsplit(url).path) or ""
    except ValueError:
        return ""
