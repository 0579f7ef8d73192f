"""Thumbnails of untrusted pictures: few formats, few pixels, the first frame.

Pillow is in the extra `storage`; without it, small pictures are shown as they are.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "AVIF")
MOST_PIXELS: Final = 64_000_000
EDGE: Final = 480
"""Pixels of the longer edge: twice what a tile of the grid is wide."""
_QUALITY: Final = 78


class Unshowable(Exception):
    """A file that is not a picture, or not one that we decode."""


def thumbnail(path: Path) -> bytes | None:
    """Return a small WebP of a picture; None if Pillow is not installed. Raises Unshowable."""
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 - optional, and slow to import
    except ModuleNotFoundError:
        return None
    try:
        with Image.open(path, formats=FORMATS) as image:
            _check(image.width * image.height)
            image.draft("RGB", (2 * EDGE, 2 * EDGE))  # JPEG: decode no more than is needed
            image.thumbnail((EDGE, EDGE))
            small = ImageOps.exif_transpose(image)  # after it: this copies the picture
            made = io.BytesIO()
            mode = "RGBA" if "A" in small.getbands() or "transparency" in small.info else "RGB"
            small.convert(mode).save(made, "WEBP", quality=_QUALITY)
            return made.getvalue()
    except Unshowable:
        raise
    except Exception as error:  # not a picture, or a malformed one
        raise Unshowable(type(error).__name__) from error


def _check(pixels: int) -> None:
    if pixels > MOST_PIXELS:
        raise Unshowable("too many pixels")
