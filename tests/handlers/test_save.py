"""`save` saves results in a folder or an S3 bucket, and records where."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import obstore
import pytest
from obstore.store import from_url
from PIL import Image

from receiver import Context, Event, Output, on
from receiver.emulator import pictures
from receiver.model.errors import HandlerError
from receiver.testing import Delivered, Kit, make_event
from tests.handlers.parts import Answer, built_in, serving

Kits = Callable[..., Kit]

_DRAWN = pictures.draw(pictures.name_for("a lighthouse"))
assert _DRAWN
PNG: Final = _DRAWN
JPEG: Final = b"\xff\xd8\xff" + bytes(10)


def drawn(kind: str, colour: Any, size: tuple[int, int] = (512, 512), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


def file(content: bytes = PNG, kind: str = "application/octet-stream") -> Answer:
    return 200, {"content-type": kind}, content


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "results" / "deeper"
    monkeypatch.setenv("SAVE_URL", str(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def save(receiver_kit: Kits, event: Event, files: dict[str, bytes]) -> Delivered:
    return receiver_kit(built_in("save"), files=files).deliver(event)


A, B = "https://cdn.example/a", "https://cdn.example/b"


def test_files_are_named_by_prediction_number_and_content_hash(
    receiver_kit: Kits, folder: Path
) -> None:
    event = make_event(output=[A, B])
    delivered = save(receiver_kit, event, {A: PNG, B: JPEG})
    assert delivered.delivery.state == "done"
    names = [
        f"{delivered.prediction_id}-0-{sha(PNG)[:12]}.png",
        f"{delivered.prediction_id}-1-{sha(JPEG)[:12]}.jpg",
    ]
    assert contents(folder) == dict(zip(names, (PNG, JPEG), strict=True))


def test_prediction_records_where_each_result_is_saved(receiver_kit: Kits, folder: Path) -> None:
    event = make_event(output=[Output(url=A, width=7), B])
    delivered = save(receiver_kit, event, {A: PNG, B: JPEG})
    outputs = delivered.prediction.output
    assert outputs is not None
    first, second = (output.stored for output in outputs)
    assert first is not None
    assert second is not None
    assert (first.sha256, first.size, first.content_type) == (sha(PNG), len(PNG), "image/png")
    assert first.url == next(folder.glob("*-0-*")).as_uri()
    assert (second.content_type, second.flagged) == ("image/jpeg", None)
    assert (outputs[0].url, outputs[0].width) == (A, 7)


def test_handler_after_save_sees_the_saved_url(receiver_kit: Kits, folder: Path) -> None:
    seen: list[Any] = []

    @on("succeeded", name="post", after="save")
    async def post(event: Event, ctx: Context) -> None:
        assert ctx.attempt == 1
        seen.extend(output.stored for output in event.prediction.output or [])

    kit = receiver_kit(post, built_in("save"), files={A: PNG})
    delivered = kit.deliver(make_event(output=[A]))
    assert {name: d.state for name, d in delivered.deliveries.items()} == {
        "save": "done",
        "post": "done",
    }
    [stored] = seen
    assert stored.url.startswith(folder.as_uri())


def test_handler_after_save_runs_even_if_save_ends_dead(receiver_kit: Kits, folder: Path) -> None:
    seen: list[Any] = []

    @on("succeeded", name="post", after="save")
    def post(event: Event) -> None:
        seen.append(event.prediction.output and event.prediction.output[0].stored)

    delivered = receiver_kit(built_in("save"), post).deliver(make_event(output=[A]))
    assert {name: d.state for name, d in delivered.deliveries.items()} == {
        "save": "dead",
        "post": "done",
    }
    assert (seen, contents(folder)) == ([None], {})


def test_retry_fetches_only_missing_results_and_replay_fetches_all(
    receiver_kit: Kits, folder: Path
) -> None:
    with serving(file(), (503, {}, b""), file(JPEG), file()) as server:
        kit = receiver_kit(built_in("save"), online=True)
        delivered = kit.deliver(make_event(output=[f"{server.url}?1", f"{server.url}?2"]))
        kit.exhaust(delivered)
        assert [attempt["result"] for attempt in delivered.delivery.history] == ["error", "done"]
        assert len(server.asked) == 3
        assert len(contents(folder)) == 2
        kit.replay(delivered)
        assert len(server.asked) == 5  # a replay fetches everything again


@pytest.mark.parametrize("crash", ["crash_after_ack", "crash_after_run"])
def test_crash_saves_the_result_exactly_once(receiver_kit: Kits, folder: Path, crash: str) -> None:
    with serving(file()) as server:
        kit = receiver_kit(built_in("save"), online=True)
        delivered = getattr(kit, crash)(make_event(output=[server.url]))
        assert (delivered.delivery.state, len(contents(folder))) == ("done", 1)
        assert len(server.asked) == 1
        assert delivered.prediction.output[0].stored is not None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (file(b"<html>", "text/html"), "6 bytes of text/html"),
        (file(b"<html>not found", "image/png"), "not what it says"),
        (file(b"", "image/png"), "empty"),
        (file(b""), "0 bytes"),
        (file(b"x" * 5000, "image/png"), "more than 1000"),
        ((404, {}, b""), "gone"),
        ((410, {}, b""), "gone"),
    ],
)
def test_invalid_oversized_or_missing_result_ends_dead_with_the_reason(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch, answer: Answer, words: str
) -> None:
    monkeypatch.setenv("SAVE_MAX_BYTES", "1000")
    with serving(answer) as server:
        delivered = receiver_kit(built_in("save"), online=True).deliver(
            make_event(output=[server.url])
        )
    assert delivered.delivery.state == "dead"
    assert delivered.delivery.reason.startswith("output 0: ")
    assert words in delivered.delivery.reason
    assert contents(folder) == {}


def test_missing_result_does_not_prevent_saving_the_others(
    receiver_kit: Kits, folder: Path
) -> None:
    delivered = save(receiver_kit, make_event(output=[B, A]), {A: PNG})
    assert delivered.delivery.state == "dead"
    assert delivered.delivery.reason == "output 0: the result is gone: HTTP 404"
    assert list(contents(folder).values()) == [PNG]
    assert delivered.prediction.output
    assert delivered.prediction.output[1].stored is not None


def test_content_types_named_in_save_types_are_saved(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_TYPES", "text/,application/json")
    with serving(file(b"words", "text/plain"), file(b"?", "application/json")) as server:
        kit = receiver_kit(built_in("save"), online=True)
        assert (
            kit.deliver(make_event(output=[f"{server.url}?1", f"{server.url}?2"])).delivery.state
            == "done"
        )
    assert sorted(Path(name).suffix for name in contents(folder)) == [".json", ".txt"]


def test_truncated_download_leaves_no_file(receiver_kit: Kits, folder: Path) -> None:
    with serving((200, {"content-length": "1000"}, JPEG)) as server:
        kit = receiver_kit(built_in("save"), online=True, settings={"RECEIVER_RETRY_ATTEMPTS": "3"})
        delivered = kit.deliver(make_event(output=[server.url]))
        kit.exhaust(delivered)
    assert [attempt["result"] for attempt in delivered.delivery.history] == ["error"] * 3
    assert contents(folder) == {}


def test_failed_fsync_is_retried(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = receiver_kit(built_in("save"), files={A: PNG})
    with monkeypatch.context() as disk:

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        disk.setattr("os.fsync", full)
        delivered = kit.deliver(make_event(output=[A]))
        assert "No space left" in delivered.delivery.reason
        assert delivered.prediction.output
        assert delivered.prediction.output[0].stored is None
    kit.exhaust(delivered)
    assert (delivered.delivery.state, len(contents(folder))) == ("done", 1)


@pytest.mark.parametrize("output", [[], [Output(text="words")]])
def test_prediction_without_files_is_skipped(
    receiver_kit: Kits, folder: Path, output: list[Output]
) -> None:
    delivered = save(receiver_kit, make_event(output=output), {})
    assert (delivered.delivery.state, contents(folder)) == ("skipped", {})


# --- names ---


def test_identical_results_are_saved_once_if_named_by_hash(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_NAME", "{sha256}.{extension}")
    delivered = save(receiver_kit, make_event(output=[A, B]), {A: PNG, B: PNG})
    assert contents(folder) == {f"{sha(PNG)}.png": PNG}
    urls = {output.stored.url for output in delivered.prediction.output or [] if output.stored}
    assert urls == {(folder / f"{sha(PNG)}.png").as_uri()}


def test_template_sorts_results_into_folders(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "SAVE_NAME", "{provider}/{model}/{metadata[user]}/{date:%Y}/{number}.{extension}"
    )
    event = make_event(output=[A], metadata={"user": "Ann Ü"})
    delivered = save(receiver_kit, event, {A: PNG})
    year = f"{delivered.prediction.completed_at:%Y}"
    assert list(contents(folder)) == [f"fal/fal-ai-nano-banana/Ann-Ü/{year}/0.png"]


@pytest.mark.parametrize(
    "user", ["../../up", "/etc/passwd", "..", ".", "", "\0", "a" * 5000, "\\..\\x", 7, None, ["a"]]
)
def test_template_values_cannot_leave_the_folder(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch, user: Any
) -> None:
    monkeypatch.setenv("SAVE_NAME", "{metadata[user]}/{prompt}.{extension}")
    event = make_event(output=[A], metadata={"user": user}, input={"prompt": user})
    assert save(receiver_kit, event, {A: PNG}).delivery.state == "done"
    [name] = contents(folder)
    assert len(Path(name).parts) == 2
    assert sorted(folder.parent.iterdir()) == [folder]


def stored_urls(delivered: Delivered) -> list[str]:
    return [output.stored.url for output in delivered.prediction.output or [] if output.stored]


def test_name_collision_adds_a_hash_and_replay_reuses_the_names(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_NAME", "{prompt}.{extension}")
    again = f"{A}again"
    kit = receiver_kit(built_in("save"), files={A: PNG, B: BLACK["png"], again: PNG})
    first = kit.deliver(make_event(output=[A, B, again]))
    second = kit.deliver(make_event(output=[B]))
    names = {
        "a-lighthouse.png": PNG,
        f"a-lighthouse-{sha(BLACK['png'])[:12]}.png": BLACK["png"],
    }
    assert contents(folder) == names
    urls = [(folder / name).as_uri() for name in names]
    assert stored_urls(first) == [*urls, urls[0]]
    assert stored_urls(second) == [urls[1]]
    for delivered in (first, second):
        kit.replay(delivered)
    assert contents(folder) == names


def test_prompts_in_any_script_give_distinct_names(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_NAME", "{prompt}-{number}.{extension}")
    kit = receiver_kit(built_in("save"), files={A: PNG})
    prompts = ["一只猫", "猫二", "\N{CAT FACE}", "\N{DOG FACE}", "Cafe\u0301", "a\u202eb", "x: y/z"]
    for prompt in prompts:
        kit.deliver(make_event(output=[A], input={"prompt": prompt}))
    said = ["一只猫", "猫二", "\N{CAT FACE}", "\N{DOG FACE}", "Caf\xe9", "a-b", "x-y-z"]
    assert sorted(contents(folder)) == sorted(f"{name}-0.png" for name in said)


@pytest.mark.parametrize(
    ("template", "prompt", "name"),
    [
        ("a//b/./{number}.png", "", "a/b/0.png"),
        ("/{number}.png", "", "0.png"),
        ("{prompt}", "con.x", "_con.x"),
        ("{prompt}/AUX", "a", "a/_AUX"),
        ("{prompt}. ", "a", "a"),
        ('a:b*"{number}', "", "a-b-0"),
        ("{prompt}{prompt}{prompt}.png", "猫" * 99, "猫" * 78 + ".png"),
        ("{prompt}/{number}", "..", "_/0"),
    ],
)
def test_file_names_are_made_valid_on_every_file_system(
    receiver_kit: Kits,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    prompt: str,
    name: str,
) -> None:
    monkeypatch.setenv("SAVE_NAME", template)
    event = make_event(output=[A], input={"prompt": prompt})
    assert save(receiver_kit, event, {A: PNG}).delivery.state == "done"
    assert contents(folder) == {name: PNG}


def test_file_system_without_hard_links_is_supported(
    receiver_kit: Kits, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    monkeypatch.setenv("SAVE_NAME", "one.{extension}")
    kit = receiver_kit(built_in("save"), files={A: PNG, B: BLACK["png"]})
    kit.deliver(make_event(output=[A, B, A]))
    assert sorted(contents(folder).values()) == sorted([PNG, BLACK["png"]])


def test_unwanted_content_type_is_noted_and_the_others_are_saved(
    receiver_kit: Kits, folder: Path
) -> None:
    glb = b"glTF\2\0\0\0" + bytes(56)
    delivered = save(receiver_kit, make_event(output=[A, B]), {A: PNG, B: glb})
    assert (delivered.delivery.state, list(contents(folder).values())) == ("done", [PNG])
    said = "output 1: 64 bytes of model/gltf-binary, which SAVE_TYPES does not name"
    assert delivered.delivery.history[-1]["note"] == said
    alone = save(receiver_kit, make_event(output=[B]), {B: glb})
    assert (alone.delivery.state, alone.delivery.reason) == ("dead", said.replace("1", "0", 1))


@pytest.mark.parametrize("status", [403, 404])
def test_result_with_403_or_404_is_fetched_again_in_the_same_attempt(
    receiver_kit: Kits, folder: Path, status: int
) -> None:
    with serving((status, {}, b""), file()) as server:
        kit = receiver_kit(built_in("save"), online=True)
        delivered = kit.deliver(make_event(output=[server.url]))
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 1)
    assert list(contents(folder).values()) == [PNG]


# --- flagged results ---

BLACK: Final = {
    "png": drawn("PNG", "black"),
    "png with alpha": drawn("PNG", (0, 0, 0, 255), mode="RGBA"),
    "png with a palette": drawn("PNG", 0, mode="P"),
    "grey png": drawn("PNG", 0, mode="L"),
    "nearly black jpeg": drawn("JPEG", (3, 2, 4)),
    "large jpeg": drawn("JPEG", "black", (2048, 2048)),
    "webp": drawn("WEBP", "black"),
}


@pytest.mark.parametrize("kind", BLACK)
def test_all_black_picture_is_saved_and_flagged(
    receiver_kit: Kits, folder: Path, kind: str
) -> None:
    event = make_event(output=[A], metadata={"order": 7})
    delivered = save(receiver_kit, event, {A: BLACK[kind]})
    assert list(contents(folder).values()) == [BLACK[kind]]
    prediction = delivered.prediction
    assert prediction.output
    assert prediction.output[0].stored
    assert prediction.output[0].stored.flagged == "all_black"
    assert prediction.metadata == {"order": 7, "flagged": "all_black"}


def dot() -> bytes:
    image = Image.new("RGB", (512, 512))
    image.putpixel((300, 200), (90, 90, 90))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def film() -> bytes:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


def bomb() -> bytes:
    return drawn("PNG", 0, (16_000, 16_000), mode="1")


NOT_BLACK: Final[dict[str, Callable[[], bytes]]] = {
    "white": lambda: drawn("PNG", "white"),
    "dark grey": lambda: drawn("JPEG", (40, 40, 40)),
    "a lighthouse": lambda: PNG,
    "one bright dot": dot,
    "an animation that begins in the dark": film,
    "more pixels than anyone looks at": bomb,
    "a broken file": lambda: BLACK["png"][:60],
}


@pytest.mark.parametrize("kind", NOT_BLACK)
def test_pictures_that_are_not_all_black_are_not_flagged(
    receiver_kit: Kits, folder: Path, kind: str
) -> None:
    content = NOT_BLACK[kind]()
    delivered = save(receiver_kit, make_event(output=[A]), {A: content})
    assert list(contents(folder).values()) == [content]
    assert delivered.prediction.metadata == {}


@pytest.mark.usefixtures("folder")
def test_flag_in_the_callers_metadata_is_not_overwritten(receiver_kit: Kits) -> None:
    event = make_event(output=[A], metadata={"flagged": "by me"})
    delivered = save(receiver_kit, event, {A: BLACK["png"]})
    assert delivered.prediction.metadata == {"flagged": "by me"}


# --- S3 ---


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - takes a second

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


numbers: Final = itertools.count(1)


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Create a bucket, set SAVE_URL to a folder in it, and return its name."""
    bucket = f"art{next(numbers)}"
    httpx.put(f"{s3}/{bucket}").raise_for_status()
    for name, value in {
        "SAVE_URL": f"s3://{bucket}/some/where",
        "SAVE_NAME": "{metadata[who]}/{number}.{extension}",
        "AWS_ENDPOINT_URL": s3,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anything",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return bucket


def found(bucket: str, name: str) -> tuple[bytes, Any]:
    """Return an object's content and content type."""
    answer = obstore.get(from_url(f"s3://{bucket}"), f"some/where/{name}")
    return bytes(answer.bytes()), answer.attributes["Content-Type"]


def test_small_and_large_results_are_saved_in_a_bucket(receiver_kit: Kits, bucket: str) -> None:
    large = JPEG + random.Random(1).randbytes(9_000_000)  # a multipart upload
    event = make_event(output=[A, B], metadata={"who": "ann"})
    delivered = save(receiver_kit, event, {A: PNG, B: large})
    assert delivered.delivery.state == "done", delivered.delivery.reason
    assert found(bucket, "ann/0.png") == (PNG, "image/png")
    assert found(bucket, "ann/1.jpg") == (large, "image/jpeg")
    urls = [output.stored and output.stored.url for output in delivered.prediction.output or []]
    assert urls == [f"s3://{bucket}/some/where/ann/{name}" for name in ("0.png", "1.jpg")]


def test_recorded_url_starts_with_save_public_url(
    receiver_kit: Kits, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_PUBLIC_URL", "https://art.example/")
    event = make_event(output=[A], metadata={"who": "ann"})
    delivered = save(receiver_kit, event, {A: PNG})
    assert delivered.prediction.output
    assert delivered.prediction.output[0].stored
    assert delivered.prediction.output[0].stored.url == "https://art.example/ann/0.png"
    assert found(bucket, "ann/0.png") == (PNG, "image/png")


def test_bucket_objects_are_never_overwritten(
    receiver_kit: Kits, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")  # the http:// endpoint implies it
    monkeypatch.setenv("SAVE_NAME", "{metadata[who]}.{extension}")
    large = JPEG + random.Random(2).randbytes(9_000_000)
    other = JPEG + random.Random(3).randbytes(9_000_000)
    bodies = [PNG, BLACK["png"], PNG, large, other, large]
    files = {f"{A}{number}": body for number, body in enumerate(bodies)}
    kit = receiver_kit(built_in("save"), files=files)
    delivered = kit.deliver(make_event(output=list(files), metadata={"who": "ann"}))
    assert delivered.delivery.state == "done", delivered.delivery.reason
    names = [url.rpartition("/")[2] for url in stored_urls(delivered)]
    dark = f"ann-{sha(BLACK['png'])[:12]}.png"
    assert names == [
        *("ann.png", dark, "ann.png"),
        *("ann.jpg", f"ann-{sha(other)[:12]}.jpg", "ann.jpg"),
    ]
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    assert [found(bucket, name)[0] for name in dict.fromkeys(names)] == [
        *(PNG, BLACK["png"], large, other)
    ]


@pytest.mark.usefixtures("bucket")
def test_missing_bucket_is_retried_until_the_attempts_end(
    receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAVE_URL", "s3://nobody-made-this/")
    kit = receiver_kit(built_in("save"), files={A: PNG}, settings={"RECEIVER_RETRY_ATTEMPTS": "2"})
    delivered = kit.deliver(make_event(output=[A]))
    kit.exhaust(delivered)
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("dead", 2)
    assert "NoSuchBucket" in delivered.delivery.reason


def test_missing_obstore_is_reported_with_the_extra_to_install(
    receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(HandlerError, match=r"prediction-receiver\[storage\]"):
        receiver_kit(built_in("save"))
