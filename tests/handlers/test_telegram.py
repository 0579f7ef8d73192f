"""`telegram` posts results through Telegram's Bot API, as documented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from receiver import Output
from receiver.testing import make_event
from tests.handlers.chat import (
    GIF,
    KEPT,
    MP3,
    MP4,
    NASTY,
    PDF,
    PNG,
    Kits,
    Part,
    Service,
    fields_of,
    keeping,
    note,
    parts_of,
    speaking,
)
from tests.handlers.parts import Answer, Asked, built_in, waits

TOKEN: Final = "123456:AAF-hushed_token"
CHAT, OTHER, MOVED, PLAIN = "-1001", "@others", "-1009", "-1003"
TELEGRAM: Final = built_in("telegram")
SINGLE: Final = {"photo", "video", "animation", "audio", "document"}
BAD: Final = PNG + b"of odd dimensions"


def said(**result: Any) -> Answer:
    return 200, {}, json.dumps({"ok": True, "result": result}).encode()


def refused(status: int, description: str, **parameters: Any) -> Answer:
    words = {"ok": False, "error_code": status, "description": description}
    more = {"parameters": parameters} if parameters else {}
    return status, {"content-type": "application/json"}, json.dumps({**words, **more}).encode()


class Telegram(Service):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.chats = {CHAT: "", OTHER: "", "-1002": MOVED, MOVED: "", PLAIN: ""}
        """For each chat id, the new id if the chat has migrated."""
        self.posts: list[dict[str, Any]] = []

    def speak(self, asked: Asked) -> Answer:
        token, method = asked.path.removeprefix("/bot").split("/")
        if token != TOKEN:
            return refused(401, "Unauthorized")
        is_form = asked.headers["content-type"].startswith("multipart/")
        parts = parts_of(asked) if is_form else []
        fields = {part.name: part.content.decode() for part in parts if part.filename is None}
        files = [part for part in parts if part.filename is not None]
        return self.take(method, fields if is_form else fields_of(asked), files)

    def take(self, method: str, fields: dict[str, str], files: list[Part]) -> Answer:
        chat = fields.pop("chat_id")
        if chat not in self.chats:
            return refused(400, "Bad Request: chat not found")
        if moved := self.chats[chat]:
            words = "Bad Request: group chat was upgraded to a supergroup chat"
            return refused(400, words, migrate_to_chat_id=int(moved))
        if chat == PLAIN and "message_thread_id" in fields:
            return refused(400, "Bad Request: message thread not found")
        post = {"chat": chat, "method": method, **self.where(fields)}
        post["files"] = [file.content for file in files]
        content = {"sendMessage": self.message, "sendMediaGroup": self.group}.get(method, self.one)
        if (refusal := content(post, fields, files)) is not None:
            return refusal
        assert fields == {}
        self.posts.append(post)
        return said(message_id=len(self.posts))

    def where(self, fields: dict[str, str]) -> dict[str, Any]:
        reply = json.loads(fields.pop("reply_parameters", "null"))
        assert reply is None or reply.keys() == {"message_id", "allow_sending_without_reply"}
        thread = fields.pop("message_thread_id", None)
        return {"reply": reply and reply["message_id"], "thread": thread and int(thread)}

    def message(self, post: dict[str, Any], fields: dict[str, str], files: list[Part]) -> None:
        assert files == []
        assert json.loads(fields.pop("link_preview_options")) == {"is_disabled": True}
        post["text"] = fields.pop("text")
        assert 0 < units(post["text"]) <= 4096

    def one(self, post: dict[str, Any], fields: dict[str, str], files: list[Part]) -> Answer | None:
        kind = post["method"].removeprefix("send").lower()
        assert kind in SINGLE
        [file] = files
        assert file.name == kind
        post["text"] = fields.pop("caption", "")
        assert units(post["text"]) <= 1024
        if kind == "photo" and file.content.startswith(BAD):
            return refused(400, "Bad Request: PHOTO_INVALID_DIMENSIONS")
        return check(kind, file)

    def group(
        self, post: dict[str, Any], fields: dict[str, str], files: list[Part]
    ) -> Answer | None:
        media = json.loads(fields.pop("media"))
        assert 2 <= len(media) == len(files) <= 10
        assert sum(len(file.content) for file in files) <= 50_000_000
        assert all(item.keys() <= {"type", "media", "caption"} for item in media)
        assert [item["media"] for item in media] == [f"attach://{file.name}" for file in files]
        kinds = {item["type"] for item in media}
        assert kinds <= {"photo", "video"} or kinds in ({"audio"}, {"document"})
        post["kinds"] = [item["type"] for item in media]
        post["text"] = media[0].get("caption", "")
        assert units(post["text"]) <= 1024
        if "photo" in kinds and any(file.content.startswith(BAD) for file in files):
            words = 'failed to send message #1 with the error message "PHOTO_INVALID_DIMENSIONS"'
            return refused(400, f"Bad Request: {words}")
        return next(filter(None, map(check, post["kinds"], files)), None)


def check(kind: str, file: Part) -> Answer | None:
    assert file.filename
    assert re.fullmatch(r"[\w.-]+", file.filename)
    assert 0 < len(file.content) <= (10_000_000 if kind == "photo" else 50_000_000)
    return None


def units(text: str) -> int:
    return len(text.encode("utf-16-le")) // 2


@pytest.fixture
def telegram(monkeypatch: pytest.MonkeyPatch) -> Iterator[Telegram]:
    monkeypatch.setenv("TELEGRAM_TOKEN", TOKEN)
    monkeypatch.setenv("TELEGRAM_CHAT", CHAT)
    with speaking(Telegram) as telegram:
        monkeypatch.setenv("TELEGRAM_URL", telegram.url)
        yield telegram


def test_content_type_determines_the_api_method(receiver_kit: Kits, telegram: Telegram) -> None:
    kit = receiver_kit(TELEGRAM, online=True)
    for content, method in {
        PNG: "sendPhoto",
        MP4: "sendVideo",
        GIF: "sendAnimation",
        MP3: "sendAudio",
        PDF: "sendDocument",
        PNG + bytes(10_000_000): "sendDocument",
        BAD: "sendDocument",
    }.items():
        delivered = kit.deliver(make_event(output=[telegram.put("a", content)]))
        assert delivered.delivery.state == "done"
        [post] = telegram.posts
        assert (post["method"], post["chat"], post["files"]) == (method, CHAT, [content])
        assert post["text"] == "succeeded: a lighthouse\nfal · fal-ai/nano-banana"
        telegram.posts.clear()


@pytest.mark.parametrize(("width", "height"), [(9000, 1001), (4200, 200), (100, 2001)])
def test_photo_with_unsupported_dimensions_is_sent_as_a_document(
    receiver_kit: Kits, telegram: Telegram, width: int, height: int
) -> None:
    output = Output(url=telegram.put("a", PNG), width=width, height=height)
    receiver_kit(TELEGRAM, online=True).deliver(make_event(output=[output]))
    assert [post["method"] for post in telegram.posts] == ["sendDocument"]


def test_photos_and_videos_form_albums_and_other_files_are_sent_alone(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    contents = [PDF, MP4, *(PNG + bytes([n]) for n in range(10)), GIF]
    urls = [telegram.put(f"{n}", content) for n, content in enumerate(contents)]
    telegram.refusals = [None, (502, {}, b"")]
    kit = receiver_kit(TELEGRAM, online=True)
    delivered = kit.deliver(make_event(output=urls))
    kit.exhaust(delivered)
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 2)
    assert [
        (post["method"], len(post["files"]), bool(post["text"])) for post in telegram.posts
    ] == [
        ("sendMediaGroup", 10, True),
        ("sendPhoto", 1, False),
        ("sendDocument", 1, False),
        ("sendAnimation", 1, False),
    ]
    assert telegram.posts[0]["kinds"] == ["video"] + ["photo"] * 9


def test_oversized_album_is_split(
    receiver_kit: Kits, telegram: Telegram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TELEGRAM_MAX_BYTES", "1000")
    film = MP4 + bytes(200)
    urls = [telegram.put(f"{n}", film) for n in range(3)]
    receiver_kit(TELEGRAM, online=True).deliver(make_event(output=urls))
    assert [post["method"] for post in telegram.posts] == ["sendMediaGroup", "sendVideo"]


def test_album_with_a_rejected_photo_is_sent_as_documents(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    urls = [telegram.put("a", BAD), telegram.put("b", PNG)]
    receiver_kit(TELEGRAM, online=True).deliver(make_event(output=urls))
    [post] = telegram.posts
    assert post["kinds"] == ["document", "document"]
    assert post["text"]


@pytest.mark.parametrize("kind", ["failed", "canceled"])
def test_failed_and_canceled_predictions_are_sent_as_messages(
    receiver_kit: Kits, telegram: Telegram, kind: Any
) -> None:
    receiver_kit(TELEGRAM, online=True).deliver(make_event(kind))
    [post] = telegram.posts
    assert post["method"] == "sendMessage"
    assert post["text"].startswith(f"{kind}: a lighthouse\nfal · fal-ai/nano-banana\n")


def test_text_output_is_cut_to_the_message_limit(
    receiver_kit: Kits, telegram: Telegram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TELEGRAM_TEXT", "{text}")
    event = make_event(provider="eachlabs", output=[Output(text="a\N{PILE OF POO}" * 2000)])
    receiver_kit(TELEGRAM, online=True).deliver(event)
    text = telegram.posts[0]["text"]
    assert text.endswith("…")
    assert 4090 < units(text) <= 4096


def test_reply_goes_to_the_chat_message_and_thread_in_the_metadata(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    where = {"telegram_chat": OTHER, "telegram_message": 17, "telegram_thread": "4"}
    kit = receiver_kit(TELEGRAM, online=True)
    kit.deliver(make_event("failed", metadata=where))
    kit.deliver(make_event(output=[telegram.put("a", PNG)], metadata=where))
    assert [(p["chat"], p["reply"], p["thread"]) for p in telegram.posts] == [(OTHER, 17, 4)] * 2


def test_chat_without_topics_gets_the_post_without_a_thread(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    where = {"telegram_chat": PLAIN, "telegram_message": 17, "telegram_thread": "4"}
    event = make_event(output=[telegram.put("a", PNG)], metadata=where)
    receiver_kit(TELEGRAM, online=True).deliver(event)
    [post] = telegram.posts
    assert (post["chat"], post["reply"], post["files"]) == (PLAIN, 17, [PNG])


def test_invalid_metadata_is_ignored(receiver_kit: Kits, telegram: Telegram) -> None:
    kit = receiver_kit(TELEGRAM, online=True)
    for odd in (1.5, None, True, [OTHER], {"a": 1}, "", "17\n", "1&chat_id=2"):
        names = ("telegram_chat", "telegram_message", "telegram_thread")
        event = make_event("failed", metadata=dict.fromkeys(names, odd))
        assert kit.deliver(event).delivery.state == "done"
        post = telegram.posts.pop()
        assert (post["chat"], post["reply"], post["thread"]) == (CHAT, None, None)


def test_hostile_prompt_mentions_no_one_and_fits_the_limits(
    receiver_kit: Kits, telegram: Telegram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TELEGRAM_TEXT", "{prompt}{prompt}")
    kit = receiver_kit(TELEGRAM, online=True)
    event = {"input": {"prompt": NASTY}, "metadata": {"flagged": NASTY}}
    kit.deliver(make_event("failed", **event))  # type: ignore[arg-type] # the types match
    kit.deliver(make_event(output=[telegram.put("a", PNG)], **event))  # type: ignore[arg-type]
    assert [post["method"] for post in telegram.posts] == ["sendMessage", "sendPhoto"]
    for post in telegram.posts:
        assert post["text"].startswith("(flagged: ")
        assert not re.search(r"@\w", post["text"])


def test_missing_or_oversized_results_are_linked_in_the_first_message(
    receiver_kit: Kits, telegram: Telegram, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TELEGRAM_MAX_BYTES", "1000")
    urls = [telegram.put("fits", PNG), telegram.put("large", PNG + bytes(1000))]
    urls += [f"{telegram.url}/gone?a=<b>c", "data:image/png;base64,%", telegram.put("empty", b"")]
    delivered = receiver_kit(TELEGRAM, online=True).deliver(make_event(output=urls))
    assert delivered.delivery.state == "done"
    message, photo = telegram.posts
    assert message["text"].splitlines()[2:] == [
        f"{telegram.url}/results/large",
        f"{telegram.url}/gone?a=%3Cb%3Ec",
        "(a result that has no address)",
        f"{telegram.url}/results/empty",
    ]
    assert (photo["files"], photo["text"]) == ([PNG], "")
    assert note(delivered, "telegram").startswith("output 1: the result ")


def test_long_links_shorten_the_text_and_are_not_cut(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    urls = [f"{telegram.url}/gone/{n}{'a' * 1900}" for n in range(3)]
    event = make_event(output=urls, input={"prompt": NASTY})
    receiver_kit(TELEGRAM, online=True).deliver(event)
    assert telegram.posts[0]["text"].splitlines()[-2:] == urls[:2]


def test_all_black_result_is_flagged_and_its_saved_file_linked(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    kit = receiver_kit(keeping, TELEGRAM, online=True)
    kit.deliver(make_event(output=[f"{telegram.url}/gone"]))
    [post] = telegram.posts
    assert post["text"].startswith("(flagged: all black)\nsucceeded: a lighthouse")
    assert post["text"].endswith(f"\n{KEPT}")


def test_post_to_a_migrated_chat_goes_to_its_new_id(receiver_kit: Kits, telegram: Telegram) -> None:
    event = make_event(output=[telegram.put("a", BAD)], metadata={"telegram_chat": "-1002"})
    delivered = receiver_kit(TELEGRAM, online=True).deliver(event)
    assert delivered.delivery.state == "done"
    assert [(post["chat"], post["method"]) for post in telegram.posts] == [(MOVED, "sendDocument")]


def test_429_is_retried_after_the_time_that_telegram_asks_for(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    kit = receiver_kit(TELEGRAM, online=True)
    telegram.refusals = [refused(429, "Too Many Requests: retry after 30", retry_after=30)]
    delivered = kit.deliver(make_event(output=[telegram.put("a", PNG)]))
    assert waits(delivered) == pytest.approx(30, abs=0.001)
    kit.move(31)
    assert delivered.delivery.state == "done"
    assert len(telegram.posts) == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "Forbidden: bot was blocked by the user"),
        (400, "Bad Request: message thread not found"),
        (404, "Not Found"),
    ],
)
def test_permanent_error_ends_dead_after_one_attempt(
    receiver_kit: Kits, telegram: Telegram, status: int, words: str
) -> None:
    telegram.refusals = [refused(status, words)]
    delivered = receiver_kit(TELEGRAM, online=True).deliver(make_event("failed"))
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("dead", 1)
    assert words in delivered.delivery.reason


def test_invalid_token_or_chat_ends_dead_without_revealing_secrets(
    receiver_kit: Kits,
    telegram: Telegram,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    kit = receiver_kit(TELEGRAM, online=True)
    delivered = kit.deliver(make_event("failed", metadata={"telegram_chat": 5}))
    assert delivered.delivery.state == "dead"
    assert "chat not found" in delivered.delivery.reason
    page = f"<p>/bot{TOKEN}/sendMessage was not found</p>".encode()
    telegram.refusals = [(404, {}, page)]
    delivered = kit.deliver(make_event("failed"))
    assert delivered.delivery.reason == "HTTP 404 from something before Telegram"
    monkeypatch.setenv("TELEGRAM_TOKEN", "123456:wrong-hushed")
    wrong = receiver_kit(TELEGRAM, online=True).deliver(make_event("failed"))
    assert "Unauthorized" in wrong.delivery.reason
    assert telegram.posts == []
    assert "hushed" not in f"{logged} {caplog.text} {delivered.delivery}"


def test_duplicate_callbacks_and_crashes_post_once(receiver_kit: Kits, telegram: Telegram) -> None:
    event = make_event(output=[telegram.put("a", PNG), telegram.put("b", PDF)])
    kit = receiver_kit(TELEGRAM, online=True)
    for n, happen in enumerate((kit.crash_after_ack, kit.crash_after_run), 1):
        delivered = happen(event)
        kit.exhaust(delivered)
        assert delivered.delivery.state == "done"
        assert len(telegram.posts) == 2 * n
    kit.deliver(event, times=2)
    assert len(telegram.posts) == 6


def test_posted_result_is_not_fetched_again_after_a_crash(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    telegram.is_fleeting = True
    kit = receiver_kit(TELEGRAM, online=True)
    delivered = kit.crash_after_run(make_event(output=[telegram.put("a", PNG)]))
    kit.exhaust(delivered)
    assert [post["method"] for post in telegram.posts] == ["sendPhoto"]


def test_result_that_disappears_between_attempts_is_linked(
    receiver_kit: Kits, telegram: Telegram
) -> None:
    urls = [telegram.put("a", PNG), telegram.put("b", PDF)]
    telegram.refusals = [None, (502, {}, b"")]
    kit = receiver_kit(TELEGRAM, online=True)
    delivered = kit.deliver(make_event(output=urls))
    telegram.results.clear()
    kit.exhaust(delivered)
    assert [post["method"] for post in telegram.posts] == ["sendPhoto", "sendMessage"]
    assert urls[1] in telegram.posts[1]["text"]
