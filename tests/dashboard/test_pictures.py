"""Outputs and thumbnails are served by the receiver: safe types, size limits, a bounded cache."""

from __future__ import annotations

import asyncio
import hashlib
import io
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from receiver.dashboard import thumbnails
from receiver.dashboard.cache import PictureCache
from receiver.dashboard.thumbnails import EDGE, Unshowable, thumbnail
from tests.conftest import Start
from tests.dashboard.people import ON, Person, person
from tests.patience import PATIENCE
from tests.receiving import PICTURE, Station, eventually

pytestmark = pytest.mark.anyio


def png(width: int = 900, height: int = 600, **more: Any) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(made, "PNG", **more)
    return made.getvalue()


class Results(httpx.AsyncBaseTransport):
    """A network that serves results by URL."""

    def __init__(self) -> None:
        self.there: dict[str, tuple[bytes, str]] = {PICTURE: (png(), "image/png")}
        self.asked: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(str(request.url))
        if str(request.url) not in self.there:
            return httpx.Response(404)
        content, kind = self.there[str(request.url)]
        return httpx.Response(200, content=content, headers={"content-type": kind})


@pytest.fixture
def results() -> Results:
    return Results()


async def shown(station: Station, prompt: str = "a picture") -> tuple[Person, str, str]:
    """Let a prediction succeed; return a signed-in user, its id, and the path of its output."""
    sent = await station.submitted("fal", prompt)
    assert (await station.push(sent)).status_code == 200
    someone = person(station)
    await someone.sign_in()
    return someone, sent.prediction_id, f"/ui/predictions/{sent.prediction_id}/outputs/0"


async def test_thumbnail_is_small_and_the_output_is_fetched_once(
    start: Start, results: Results
) -> None:
    async with start(**ON, results=results) as station:
        someone, name, output = await shown(station)
        first = await someone.http.get(f"{output}/thumbnail")
        assert first.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(first.content)).size == (EDGE, EDGE * 2 // 3)
        assert first.headers["etag"].endswith(f'{hashlib.sha256(first.content).hexdigest()}.small"')
        assert first.headers["cache-control"] == "private, no-cache"
        again = {"if-none-match": first.headers["etag"]}
        assert (await someone.http.get(f"{output}/thumbnail", headers=again)).status_code == 304
        assert results.asked == [PICTURE]
        assert (await station.world.get(f"{output}/thumbnail")).status_code == 303
        grid = await someone.see("/predictions", view="grid")
        assert f'src="{output}/thumbnail"' in grid
        assert f'data-full="{output}"' in grid
        assert "cdn.test" not in grid
        assert name in grid


async def test_picture_is_shown_inline_and_video_supports_ranges(
    start: Start, results: Results
) -> None:
    film = b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom" + bytes(range(256)) * 8
    async with start(**ON, results=results) as station:
        someone, _, output = await shown(station)
        whole = await someone.http.get(output)
        assert whole.content == png()
        assert whole.headers["content-type"] == "image/png"
        assert whole.headers["content-disposition"].startswith("inline")
        assert "sandbox" in whole.headers["content-security-policy"]
        saved = await someone.http.get(output, params={"save": "1"})
        assert saved.headers["content-disposition"].startswith("attachment")
        results.there[PICTURE] = (film, "video/mp4")
        someone, _, output = await shown(station, "a film")
        part = await someone.http.get(output, headers={"range": "bytes=4-11"})
        assert part.status_code == 206
        assert part.content == b"ftypmp42"
        assert part.headers["content-type"] == "video/mp4"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (
            b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
            "image/svg+xml",
        ),
        (b"<!doctype html><script>alert(1)</script>", "text/html"),
        (b"\x7fELF", "application/octet-stream"),
    ],
)
async def test_svg_html_and_binary_outputs_are_never_shown_inline(
    start: Start, results: Results, content: bytes, kind: str
) -> None:
    results.there[PICTURE] = (content, kind)
    async with start(**ON, results=results) as station:
        someone, _, output = await shown(station)
        answer = await someone.http.get(output)
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment")
        small = await someone.http.get(f"{output}/thumbnail")
        assert small.status_code == 415
        assert small.headers["content-type"] == "image/svg+xml"
        assert b"script" not in small.content


async def test_missing_output_returns_410_and_is_not_refetched_at_once(
    start: Start, results: Results
) -> None:
    results.there.clear()
    async with start(**ON, results=results) as station:
        someone, _, output = await shown(station)
        for _ in range(2):
            small = await someone.http.get(f"{output}/thumbnail")
            assert small.status_code == 410
            assert b"gone at the provider" in small.content
        assert len(results.asked) == 1
        assert (await someone.http.get(output)).status_code == 410
        for odd in ("/1", "/999", "/x", "/0/nothing"):
            missing = await someone.http.get(output.removesuffix("/0") + odd)
            assert missing.status_code == 404


async def test_copies_that_cannot_be_written_are_a_placeholder_and_a_502(
    start: Start, results: Results, tmp_path: Path
) -> None:
    async with start(**ON, results=results) as station:
        someone, name, output = await shown(station)
        folder = tmp_path / "receiver.db.pictures" / name
        folder.write_text("a file where the folder must be")
        small = await someone.http.get(f"{output}/thumbnail")
        assert (small.status_code, small.headers["content-type"]) == (502, "image/svg+xml")
        assert (await someone.http.get(output)).status_code == 502
        folder.unlink()
        assert (await someone.http.get(f"{output}/thumbnail")).status_code == 200


def test_cache_folder_is_for_its_user_only_even_if_it_exists(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir(mode=0o755)
    PictureCache(folder).open()
    assert folder.stat().st_mode & 0o777 == 0o700


async def test_output_at_a_private_address_is_not_fetched(start: Start) -> None:
    async with start(**ON) as station:
        someone, name, output = await shown(station)
        station.edit(
            "UPDATE predictions SET output = "
            f"'[{{\"url\":\"http://127.0.0.1:1/a.png\"}}]' WHERE id = '{name}'"
        )
        answer = await someone.http.get(output)
        assert (answer.status_code, "will not fetch" in answer.text) == (410, True)
        assert (await someone.http.get(f"{output}/thumbnail")).status_code == 410
        again = await someone.http.get(output)
        assert (again.status_code, "a moment ago" in again.text) == (410, True)


@pytest.mark.parametrize(("file", "has_pillow"), [("a.png", True), ("a.PNG", False), ("写", False)])
async def test_saved_output_is_served_from_its_file(
    start: Start,
    results: Results,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    *,
    has_pillow: bool,
) -> None:
    if not has_pillow:
        monkeypatch.setattr("receiver.dashboard.pictures.thumbnail", lambda _: None)
    kept = tmp_path / "kept results" / file
    kept.parent.mkdir()
    kept.write_bytes(png(30, 30))
    async with start(**ON, results=results) as station:
        someone, name, output = await shown(station)
        digest = hashlib.sha256(kept.read_bytes()).hexdigest()
        stored = (
            f'{{"url":"{kept.as_uri()}","sha256":"{digest}","size":{kept.stat().st_size},'
            '"content_type":"image/png"}'
        )
        station.edit(
            f'UPDATE predictions SET output = \'[{{"url":"{PICTURE}","stored":{stored}}}]\' '
            f"WHERE id = '{name}'"
        )
        assert (await someone.http.get(output)).content == kept.read_bytes()
        small = await someone.http.get(f"{output}/thumbnail")
        assert small.headers["content-type"] == ("image/webp" if has_pillow else "image/png")
        assert results.asked == []
        assert "saved" in await someone.see(f"/predictions/{name}")


async def test_erasing_a_prediction_deletes_its_cached_pictures(
    start: Start, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("receiver.dashboard.facade._TIDY", 0.05)
    async with start(**ON, results=results) as station:
        someone, name, output = await shown(station)
        assert (await someone.http.get(f"{output}/thumbnail")).status_code == 200
        assert isinstance(station.database, Path)
        copies = Path(f"{station.database}.pictures") / name
        assert len(list(copies.iterdir())) == 2
        assert (await station.http.post(f"/v1/predictions/{name}/erase")).status_code == 200
        assert (await someone.http.get(f"{output}/thumbnail")).status_code == 404
        await eventually(copies.exists, lambda there: not there)


def test_cache_is_bounded_and_keeps_recently_viewed_pictures(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path / "cache", most=1000)
    cache.open()
    names = [f"pred_{number:032x}" for number in range(20)]
    for name in names:
        (cache.place(name) / f"0-{name}.small").write_bytes(bytes(100))
        cache.find(names[0], 0, ("small",))
        cache.added(100)
    assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.small")) <= 1000
    assert names[0] in cache.predictions()
    cache.drop(["../cache", names[0]])
    assert names[0] not in cache.predictions()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_cache_does_not_use_a_symlinked_folder(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "theirs")
    cache = PictureCache(tmp_path / "cache")
    cache.open()
    cache.place(f"pred_{'0' * 32}")
    assert not list((tmp_path / "theirs").iterdir())


def test_malformed_or_oversized_picture_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    bad: list[bytes] = [b"", b"no picture", png()[:200], b"%!PS-Adobe-3.0\n", b"II*\x00"]
    for content in bad:
        file.write_bytes(content)
        with pytest.raises(Unshowable):
            thumbnail(file)
    monkeypatch.setattr(thumbnails, "MOST_PIXELS", 100)
    file.write_bytes(png(11, 10))
    with pytest.raises(Unshowable, match="pixels"):
        thumbnail(file)


async def test_at_most_two_pictures_are_decoded_at_once(
    start: Start, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []
    may_end = threading.Event()

    def held(path: Path) -> bytes | None:
        begun.append(path)
        assert may_end.wait(PATIENCE)
        return thumbnail(path)

    monkeypatch.setattr("receiver.dashboard.pictures.thumbnail", held)
    async with start(**ON, results=results) as station:
        places = [await shown(station, f"number {number}") for number in range(6)]
        someone, *_ = places[0]
        asked = [
            asyncio.create_task(someone.http.get(f"{output}/thumbnail")) for *_, output in places
        ]
        copies = Path(f"{station.database}.pictures")
        try:
            await eventually(lambda: [*copies.rglob("*.png")], lambda found: len(found) == 6)
            await eventually(lambda: begun, lambda found: len(found) >= 2)
            await asyncio.to_thread(int)  # a third one would have its thread before this call
            assert len(begun) == 2
        finally:
            may_end.set()
        answers = await asyncio.gather(*asked)
    assert {answer.status_code for answer in answers} == {200}
    assert len(begun) == 6


def test_thumbnail_applies_the_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for ending in ("jpg", "png", "webp"):
        Image.new("RGB", (900, 300), "teal").save(tmp_path / f"a.{ending}", exif=exif)
        made = thumbnail(tmp_path / f"a.{ending}")
        assert made is not None
        assert Image.open(io.BytesIO(made)).size == (EDGE // 3, EDGE)


def test_thumbnail_of_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    made = thumbnail(tmp_path / "a.gif")
    assert made is not None
    found = Image.open(io.BytesIO(made))
    red, _, blue = found.convert("RGB").getpixel((4, 4))  # type: ignore[misc]
    assert red > 200
    assert blue < 50
    assert getattr(found, "n_frames", 1) == 1
