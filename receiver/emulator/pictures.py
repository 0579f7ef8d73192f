"""Pictures drawn from a prompt's hash: PNG gradients, reproducible and never stored."""

import base64
import hashlib
import io
import re
from functools import lru_cache

LONG_SIDE = 256
_NAME = re.compile(r"([0-9a-f]{32})-(\d{2,3})x(\d{2,3})\.png")
_RATIO = re.compile(r"(\d{1,2}):(\d{1,2})")
_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
)


def name_for(prompt: str, index: int = 0, aspect_ratio: str = "1:1") -> str:
    """Return a picture's name, which contains all that is needed to draw it."""
    digest = hashlib.sha256(f"{index}\n{prompt}".encode()).hexdigest()[:32]
    width, height = size_of(aspect_ratio)
    return f"{digest}-{width}x{height}.png"


def size_of(aspect_ratio: str) -> tuple[int, int]:
    """Return width and height; a square for a text that is no ratio (`auto`)."""
    match = _RATIO.fullmatch(aspect_ratio)
    wide, high = (int(match[1]), int(match[2])) if match else (1, 1)
    longest = max(wide, high, 1)
    return max(16, LONG_SIDE * wide // longest), max(16, LONG_SIDE * high // longest)


FILM = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"
"""Only the first bytes of an MP4 file."""


@lru_cache(maxsize=128)
def draw(name: str) -> bytes | None:
    """Return the picture with this name; None if it is not the name of a picture.

    Pillow draws it; without Pillow, which comes with `[storage]`, every picture is one grey pixel.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    size = int(match[2]), int(match[3])
    if not all(0 < side <= LONG_SIDE for side in size):
        return None
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415 - an optional package, slow to import
    except ModuleNotFoundError:
        return _PIXEL
    seed = bytes.fromhex(match[1])
    top, bottom = (seed[0], seed[1], seed[2]), (seed[3], seed[4], seed[5])
    file = io.BytesIO()
    ImageOps.colorize(Image.linear_gradient("L"), top, bottom).resize(size).save(file, "PNG")
    return file.getvalue()


def data_uri(name: str, padding: int = 0) -> str:
    """Return the picture as a data URI, with `padding` bytes at its end, which viewers ignore."""
    picture = (draw(name) or b"") + bytes(padding)
    return "data:image/png;base64," + base64.b64encode(picture).decode()
