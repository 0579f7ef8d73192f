"""Pictures made from a prompt's hash: real PNGs, a gradient each, never stored, always the same."""

import base64
import hashlib
import re
import struct
import zlib
from functools import lru_cache

LONG_SIDE = 256
_NAME = re.compile(r"([0-9a-f]{32})-(\d{2,3})x(\d{2,3})\.png")
_RATIO = re.compile(r"(\d{1,2}):(\d{1,2})")


def name_for(prompt: str, index: int = 0, aspect_ratio: str = "1:1") -> str:
    """Name a picture so that the name alone is enough to draw it."""
    digest = hashlib.sha256(f"{index}\n{prompt}".encode()).hexdigest()[:32]
    width, height = size_of(aspect_ratio)
    return f"{digest}-{width}x{height}.png"


def size_of(aspect_ratio: str) -> tuple[int, int]:
    """Return width and height; what is no ratio (`auto`) is a square."""
    match = _RATIO.fullmatch(aspect_ratio)
    wide, high = (int(match[1]), int(match[2])) if match else (1, 1)
    longest = max(wide, high, 1)
    return max(16, LONG_SIDE * wide // longest), max(16, LONG_SIDE * high // longest)


@lru_cache(maxsize=128)
def draw(name: str) -> bytes | None:
    """Return the picture of that name, or None when it is no picture's name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    width, height = int(match[2]), int(match[3])
    if not (0 < width <= LONG_SIDE and 0 < height <= LONG_SIDE):
        return None
    seed = bytes.fromhex(match[1])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(_rows(seed, width, height), 6))
        + _chunk(b"IEND", b"")
    )


def data_uri(name: str, padding: int = 0) -> str:
    """Return the picture as a data URI, made larger by a chunk that viewers skip."""
    picture = draw(name) or b""
    padded = picture[:-12] + _chunk(b"paDd", bytes(padding)) + picture[-12:] if padding else picture
    return "data:image/png;base64," + base64.b64encode(padded).decode()


def _rows(seed: bytes, width: int, height: int) -> bytes:
    """Blend one colour into another from top to bottom, with a third from left to right."""
    top, bottom, side = seed[0:3], seed[3:6], seed[6:9]
    rows = []
    for y in range(height):
        down = [a + (b - a) * y // height for a, b in zip(top, bottom, strict=True)]
        row = bytes(
            colour + (end - colour) * x // (2 * width)
            for x in range(width)
            for colour, end in zip(down, side, strict=True)
        )
        rows.append(b"\0" + row)
    return b"".join(rows)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
