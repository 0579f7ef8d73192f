import base64
import struct
import zlib

import pytest

from receiver.emulator import pictures
from tests.emulator.serving import Emulated


def chunks(png: bytes) -> dict[bytes, bytes]:
    """Read a PNG, checking every checksum."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    found, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length) == (zlib.crc32(kind + data),)
        found[kind] = data
        at += 12 + length
    return found


def drawn(prompt: str, index: int = 0, ratio: str = "1:1") -> bytes:
    picture = pictures.draw(pictures.name_for(prompt, index, ratio))
    assert picture is not None
    return picture


def test_a_picture_is_a_whole_png() -> None:
    found = chunks(drawn("a lighthouse"))
    width, height, depth, colour = struct.unpack_from(">IIBB", found[b"IHDR"])
    assert (width, height, depth, colour) == (256, 256, 8, 2)
    assert len(zlib.decompress(found[b"IDAT"])) == height * (3 * width + 1)


def test_the_same_prompt_draws_the_same_and_another_differs() -> None:
    assert drawn("a lighthouse") == drawn("a lighthouse")
    assert len({drawn("a lighthouse"), drawn("a windmill"), drawn("a lighthouse", 1)}) == 3


@pytest.mark.parametrize(
    ("ratio", "size"),
    [
        ("16:9", (256, 144)),
        ("9:16", (144, 256)),
        ("auto", (256, 256)),
        ("", (256, 256)),
        ("0:0", (16, 16)),
    ],
)
def test_the_ratio_is_kept_and_nonsense_is_drawn_all_the_same(
    ratio: str, size: tuple[int, int]
) -> None:
    assert struct.unpack_from(">II", chunks(drawn("x", 0, ratio))[b"IHDR"]) == size


@pytest.mark.parametrize("name", ["x.png", f"{'0' * 32}-999x999.png", f"{'0' * 32}-00x10.png"])
def test_only_names_of_pictures_are_drawn(name: str) -> None:
    assert pictures.draw(name) is None


def test_a_padded_data_uri_is_still_a_whole_png() -> None:
    uri = pictures.data_uri(pictures.name_for("x"), padding=50_000)
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert len(png) > 50_000
    assert {b"IHDR", b"IDAT", b"IEND"} < set(chunks(png))


def test_pictures_are_served(emulated: Emulated) -> None:
    answer = emulated.http.get("/files/" + pictures.name_for("a lighthouse"))
    assert answer.content == drawn("a lighthouse")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert emulated.http.get("/files/other.png").status_code == 404
