"""Landscapes drawn from a prompt's hash: real PNGs, never stored, always the same."""

import base64
import hashlib
import math
import re
import struct
import zlib
from functools import lru_cache

LONG_SIDE = 256
SKY_SHADES = 48
SUN, FAR, MIDDLE, NEAR = range(SKY_SHADES, SKY_SHADES + 4)
_NAME = re.compile(r"([0-9a-f]{32})-(\d{2,3})x(\d{2,3})\.png")
_RATIO = re.compile(r"(\d{1,2}):(\d{1,2})")

Colour = tuple[int, int, int]


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
    """Draw the picture of that name, or None when it is no picture's name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    width, height = int(match[2]), int(match[3])
    if not (0 < width <= LONG_SIDE and 0 < height <= LONG_SIDE):
        return None
    seed = bytes.fromhex(match[1])
    return _png(width, height, _palette(seed), _rows(seed, width, height))


def data_uri(name: str, padding: int = 0) -> str:
    """Return the picture as a data URI, made larger by a chunk that viewers skip."""
    picture = draw(name) or b""
    padded = picture[:-12] + _chunk(b"paDd", bytes(padding)) + picture[-12:] if padding else picture
    return "data:image/png;base64," + base64.b64encode(padded).decode()


def _rows(seed: bytes, width: int, height: int) -> bytes:
    """Draw column by column, since each is a run of sky and hills, then turn the lot."""
    sky = bytes(y * SKY_SHADES // height for y in range(height))
    columns = [_column(seed, x, width, height, sky) for x in range(width)]
    return b"".join(b"\0" + bytes(row) for row in zip(*columns, strict=True))


def _column(seed: bytes, x: int, width: int, height: int, sky: bytes) -> bytes:
    column = bytearray(sky)
    top, bottom = _sun(seed, x, width, height)
    column[top:bottom] = bytes([SUN]) * (bottom - top)
    for layer, colour in enumerate((FAR, MIDDLE, NEAR)):
        edge = int(height * _ridge(seed, layer, x / width))
        column[edge:] = bytes([colour]) * (height - edge)
    return bytes(column)


def _sun(seed: bytes, x: int, width: int, height: int) -> tuple[int, int]:
    radius = min(width, height) * (0.08 + seed[0] / 2560)
    across = x - width * (0.2 + seed[1] / 425)
    half = int(math.sqrt(max(0.0, radius**2 - across**2)))
    middle = int(height * (0.2 + seed[2] / 1280))
    return max(0, middle - half), min(height, middle + half)


def _ridge(seed: bytes, layer: int, x: float) -> float:
    phase, slow, fast = (seed[3 + 3 * layer + n] / 255 for n in range(3))
    wave = math.sin(6.3 * (phase + x * (0.6 + slow))) + 0.4 * math.sin(25 * (slow + x * fast))
    return 0.52 + 0.15 * layer + 0.07 * wave


def _palette(seed: bytes) -> list[Colour]:
    zenith, horizon, sun, far, near = (_colour(seed[n], seed[n + 1]) for n in range(6, 16, 2))
    sky = [_mix(zenith, horizon, shade / SKY_SHADES) for shade in range(SKY_SHADES)]
    dark = _mix(near, (0, 0, 0), 0.5)
    return [
        *sky,
        _mix(sun, (255, 255, 255), 0.6),
        _mix(far, horizon, 0.4),
        _mix(far, dark, 0.5),
        dark,
    ]


def _colour(hue: int, light: int) -> Colour:
    red, green, blue = (
        int(128 + 90 * math.cos(hue / 40.6 + third) + light / 8) for third in (0.0, 2.1, 4.2)
    )
    return min(red, 255), min(green, 255), min(blue, 255)


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (int(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _png(width: int, height: int, palette: list[Colour], rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    colours = bytes(part for colour in palette for part in colour)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", colours),
        (b"IDAT", zlib.compress(rows, 6)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
