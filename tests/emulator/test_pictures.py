"""The pictures that the emulator draws and serves."""

import base64
import io
import sys

import pytest
from PIL import Image

from receiver.emulator import pictures
from tests.emulator.serving import Emulated


def opened(png: bytes) -> Image.Image:
    """Read a whole PNG, checking every checksum."""
    Image.open(io.BytesIO(png)).verify()
    picture = Image.open(io.BytesIO(png))
    picture.load()
    return picture


def drawn(prompt: str, index: int = 0, ratio: str = "1:1") -> bytes:
    picture = pictures.draw(pictures.name_for(prompt, index, ratio))
    assert picture is not None
    return picture


def test_picture_is_a_valid_png() -> None:
    picture = opened(drawn("a lighthouse"))
    assert (picture.format, picture.size, picture.mode) == ("PNG", (256, 256), "RGB")


def test_same_prompt_draws_the_same_picture_and_another_differs() -> None:
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
def test_ratio_sets_the_size_and_an_invalid_ratio_is_still_drawn(
    ratio: str, size: tuple[int, int]
) -> None:
    assert opened(drawn("x", 0, ratio)).size == size


@pytest.mark.parametrize("name", ["x.png", f"{'0' * 32}-999x999.png", f"{'0' * 32}-00x10.png"])
def test_invalid_picture_name_draws_nothing(name: str) -> None:
    assert pictures.draw(name) is None


def test_padded_data_uri_is_still_a_valid_png() -> None:
    uri = pictures.data_uri(pictures.name_for("x"), padding=50_000)
    png = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert len(png) > 50_000
    assert opened(png).size == (256, 256)


def test_picture_without_pillow_is_a_grey_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    pictures.draw.cache_clear()
    png = drawn("a lighthouse")
    monkeypatch.undo()
    pictures.draw.cache_clear()
    picture = opened(png)
    assert (picture.size, picture.getpixel((0, 0))) == ((1, 1), 128)


def test_pictures_are_served(emulated: Emulated) -> None:
    answer = emulated.http.get("/files/" + pictures.name_for("a lighthouse"))
    assert answer.content == drawn("a lighthouse")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert emulated.http.get("/files/other.png").status_code == 404
