"""`notify` sends notifications through apprise, by HTTP and by mail: once, without secrets."""

from __future__ import annotations

import asyncio
import base64
import email.message
import email.policy
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session

from receiver import Output, Stored
from receiver.model.errors import HandlerError
from receiver.testing import Kit, make_event
from tests.handlers.parts import Answer, Asked, built_in
from tests.handlers.services import service
from tests.patience import PATIENCE

# apprise's plugins import imghdr.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")

Kits = Callable[..., Kit]
Notify = Callable[..., str]

URL: Final = "https://cdn.example/a.png"
VIDEO: Final = "https://cdn.example/b.mp4"
PNG: Final = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
MP4: Final = b"\0\0\0\x18ftypisom" + bytes(64)
FILES: Final = {URL: PNG, VIDEO: MP4}
SECRET: Final = "s3cr3t-of-a-hook"
THIN: Final = "\N{ZERO WIDTH SPACE}"
OK: Final[Answer] = (200, {}, b"")


@dataclass
class Hook:
    """Accepts and checks the requests of apprise's json://, form:// and gotify://."""

    answers: list[Answer] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    most: int = 1_000_000
    place: str = ""
    """Host and port."""

    def __call__(self, asked: Asked) -> Answer:
        assert asked.method == "POST"
        assert asked.headers["user-agent"] == "prediction-receiver"
        assert self.kinds[asked.path.split("/")[1]] in asked.headers["content-type"]
        if len(asked.body) > self.most:
            return 413, {}, b""
        self.asked.append(asked)
        return self.answers.pop(0) if self.answers else OK

    kinds = {"json": "application/json", "form": "form", "gotify": "application/json"}  # noqa: RUF012

    @property
    def told(self) -> list[dict[str, Any]]:
        return [json.loads(asked.body) for asked in self.asked]


@dataclass
class Post:
    """A mail server that keeps the mails it accepts."""

    refuses: bool = False
    mails: list[email.message.EmailMessage] = field(default_factory=list)

    async def handle_DATA(self, _: SMTP, __: Session, envelope: Envelope) -> str:  # noqa: N802
        if self.refuses:
            return "451 4.7.1 greylisted, try later"
        assert envelope.mail_from == "art@example.com"
        assert envelope.rcpt_tos == ["ann@example.com"]
        content = envelope.original_content or b""
        self.mails.append(email.message_from_bytes(content, policy=email.policy.default))
        return "250 OK"


@pytest.fixture
def hook() -> Iterator[Hook]:
    hook = Hook()
    with service(hook) as url:
        hook.place = url.removeprefix("http://")
        yield hook


@pytest.fixture
def post() -> Iterator[tuple[Post, str]]:
    """Run a mail server; return it and the apprise URL that sends it mail without TLS."""
    post = Post()
    loop = asyncio.new_event_loop()
    listening = loop.create_server(lambda: SMTP(post, loop=loop), "127.0.0.1", 0)
    server = loop.run_until_complete(listening)
    assert isinstance(server, asyncio.Server)
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    port = server.sockets[0].getsockname()[1]
    try:
        yield post, f"mailto://127.0.0.1:{port}?from=art@example.com&to=ann@example.com"
    finally:
        asyncio.run_coroutine_threadsafe(over(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def over(server: asyncio.Server) -> None:
    server.close()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


@pytest.fixture
def notify(monkeypatch: pytest.MonkeyPatch) -> Notify:
    """Return a function that sets the handler's settings and returns its file."""

    def notify(*urls: str, **more: str) -> str:
        for name in ("TITLE", "TEXT", "MAX_BYTES"):
            monkeypatch.delenv(f"NOTIFY_{name}", raising=False)
        monkeypatch.setenv("NOTIFY_URLS", " \n".join(urls))
        for name, value in more.items():
            monkeypatch.setenv(f"NOTIFY_{name.upper()}", value)
        return built_in("notify")

    return notify


def attached(told: dict[str, Any]) -> dict[str, bytes]:
    return {
        f"{item['filename']} {item['mimetype']}": base64.b64decode(item["base64"])
        for item in told["attachments"]
    }


def kept(url: str, flagged: str | None = None) -> Stored:
    return Stored(url=url, sha256=64 * "0", size=8, content_type="image/png", flagged=flagged)


# --- content ---


def test_duplicate_callback_sends_one_notification_with_the_picture(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/"), files=FILES)
    assert kit.deliver(make_event(), times=2).delivery.state == "done"
    [told] = hook.told
    assert told["title"] == "fal-ai/nano-banana succeeded"
    assert told["message"] == "a lighthouse"
    assert told["type"] == "success"
    assert attached(told) == {"result-1.png image/png": PNG}


def test_pictures_and_videos_are_attached_together(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/"), files=FILES)
    kit.deliver(make_event(output=[URL, VIDEO]))
    assert attached(hook.told[0]) == {
        "result-1.png image/png": PNG,
        "result-2.mp4 video/mp4": MP4,
    }


def test_form_service_gets_the_picture_as_a_file_part(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"form://{hook.place}/form/"), files=FILES)
    assert kit.deliver(make_event()).delivery.state == "done"
    [asked] = hook.asked
    head = f"Content-Type: {asked.headers['content-type']}\r\n\r\n".encode()
    form = email.message_from_bytes(head + asked.body, policy=email.policy.HTTP)
    parts = {part.get_param("name", header="content-disposition"): part for part in form.walk()}
    assert parts["message"].get_payload() == "a lighthouse"
    assert parts["file01"].get_filename() == "result-1.png"
    assert parts["file01"].get_payload(decode=True) == PNG


@pytest.mark.parametrize("form", ["html", "text"])
def test_mail_has_the_results_attached_and_no_injected_header(
    notify: Notify, receiver_kit: Kits, post: tuple[Post, str], form: str
) -> None:
    server, url = post
    kit = receiver_kit(notify(f"{url}&format={form}"), files=FILES)
    prompt = "a <b>lighthouse</b>\r\nBcc: all@example.com"
    delivered = kit.deliver(make_event(input={"prompt": prompt}, output=[URL, VIDEO]))
    assert delivered.delivery.state == "done"
    [mail] = server.mails
    assert (mail["subject"], mail["bcc"]) == ("fal-ai/nano-banana succeeded", None)
    assert mail["from"].addresses[0].addr_spec == "art@example.com"
    found = {part.get_filename(): part for part in mail.walk() if part.get_filename()}
    assert {name: part.get_content_type() for name, part in found.items()} == {
        "result-1.png": "image/png",
        "result-2.mp4": "video/mp4",
    }
    assert found["result-1.png"].get_payload(decode=True) == PNG
    body = mail.get_body((form if form == "html" else "plain",))
    assert body is not None
    assert ("&lt;b&gt;" if form == "html" else "<b>") in body.get_content()


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        ("failed", "failure", "model timed out"),
        ("canceled", "warning", "cancelled by the client"),
    ],
)
def test_failed_and_canceled_predictions_are_notified(
    notify: Notify, receiver_kit: Kits, hook: Hook, kind: Any, word: str, message: str
) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/"))
    assert kit.deliver(make_event(kind)).delivery.state == "done"
    [told] = hook.told
    assert (told["type"], told["title"]) == (word, f"fal-ai/nano-banana {kind}")
    assert told["message"].startswith("a lighthouse\n")
    assert told["message"].endswith(message)
    assert told["attachments"] == []


def test_title_and_text_are_templates(notify: Notify, receiver_kit: Kits, hook: Hook) -> None:
    title, text = "{metadata[order]}: {type}", "{provider}\n\n\n{code}\n{url}"
    kit = receiver_kit(notify(f"json://{hook.place}/json/", title=title, text=text), files=FILES)
    kit.deliver(make_event(metadata={"order": 7}))
    [told] = hook.told
    assert (told["title"], told["message"]) == ("7: succeeded", f"fal\n{URL}")


def test_empty_text_is_replaced_by_the_title(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/", text="{code}"))
    kit.deliver(make_event(output=[Output(text="words")]))
    assert hook.told[0]["message"] == "fal-ai/nano-banana succeeded"


# --- results that cannot be attached ---


def test_service_without_attachments_gets_the_urls(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"gotify://{hook.place}/gotify/token"))
    assert kit.deliver(make_event(output=[URL, VIDEO])).delivery.state == "done"
    assert hook.asked[0].headers["x-gotify-key"] == "token"
    assert hook.told[0]["message"] == f"a lighthouse\n{URL}\n{VIDEO}"


def test_missing_result_is_sent_as_its_url(notify: Notify, receiver_kit: Kits, hook: Hook) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/"), files={VIDEO: MP4})
    assert kit.deliver(make_event(output=[URL, VIDEO])).delivery.state == "done"
    [told] = hook.told
    assert told["message"] == f"a lighthouse\n{URL}"
    assert attached(told) == {"result-2.mp4 video/mp4": MP4}


def test_oversized_result_is_sent_as_its_url(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/", max_bytes="50"), files=FILES)
    kit.deliver(make_event(output=[URL, "data:image/png;base64," + 100 * "AAAA"]))
    [told] = hook.told
    assert told["message"] == f"a lighthouse\n{URL}\nresult 2 has no address"
    assert told["attachments"] == []


def test_result_that_the_service_rejects_with_413_is_sent_as_its_url(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    hook.most = 5_000
    kit = receiver_kit(notify(f"json://{hook.place}/json/"), files={URL: PNG + bytes(5_000)})
    assert kit.deliver(make_event()).delivery.state == "done"
    assert hook.told[0]["message"] == f"a lighthouse\n{URL}"


def test_url_that_is_in_the_text_is_not_repeated(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/", text="{urls}"))
    kit.deliver(make_event(output=[URL, VIDEO]))
    assert hook.told[0]["message"] == f"{URL}\n{VIDEO}"


def test_results_after_the_tenth_are_only_counted(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"gotify://{hook.place}/gotify/token"))
    kit.deliver(make_event(output=[f"{URL}?{n}" for n in range(12)]))
    lines = hook.told[0]["message"].split("\n")
    assert (len(lines), lines[-1]) == (12, "and 2 more")


# --- hostile and unusual fields ---


def test_prompt_cannot_mention_people_or_add_lines_to_the_title(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    prompt = "@everyone <@123> <!channel> <#C1> \x00\x1b[31m https://x.example/@here {url}"
    file = notify(f"json://{hook.place}/json/", title="{prompt}", text="{prompt}\n{metadata[link]}")
    kit = receiver_kit(file, files=FILES)
    link = "https://x.example/@everyone"
    kit.deliver(make_event(input={"prompt": prompt + "\nnew line"}, metadata={"link": link}))
    [told] = hook.told
    tamed = (
        f"@{THIN}everyone <{THIN}@{THIN}123> <{THIN}!channel> <{THIN}#C1>   [31m "
        f"https://x.example/@{THIN}here {{url}}"
    )
    assert told["message"] == f"{tamed}\nnew line\nhttps://x.example/%40everyone"
    assert told["title"] == f"{' '.join(tamed.split())} new line"


@pytest.mark.parametrize("note", [7, None, [1, {"a": 2}], {"b": True}, 10_000 * "x@"])
def test_metadata_of_any_type_or_size_does_not_break_the_notification(
    notify: Notify, receiver_kit: Kits, hook: Hook, note: Any
) -> None:
    file = notify(f"json://{hook.place}/json/", title="{metadata[note]}", text="{metadata[note]}")
    kit = receiver_kit(file, files=FILES)
    assert kit.deliver(make_event(metadata={"note": note})).delivery.state == "done"
    assert len(hook.told[0]["title"]) <= 200
    assert len(hook.told[0]["message"]) <= 8_000


def test_text_over_the_limit_of_the_service_is_split_into_messages(
    notify: Notify, receiver_kit: Kits, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apprise.plugins.custom_json import NotifyJSON  # noqa: PLC0415 - only needed here

    monkeypatch.setattr(NotifyJSON, "body_maxlen", 1_000)
    kit = receiver_kit(notify(f"json://{hook.place}/json/", text="{prompt}"), files=FILES)
    kit.deliver(make_event(input={"prompt": 300 * "wide sea "}))
    assert len(hook.told) == 3
    assert sum(told["message"].count("wide") for told in hook.told) == 300
    assert [len(told["attachments"]) for told in hook.told] == [1, 0, 0]


# --- failing and slow services, crashes ---


def test_retry_sends_only_to_the_service_that_failed(
    notify: Notify, receiver_kit: Kits, hook: Hook, post: tuple[Post, str]
) -> None:
    server, url = post
    hook.answers = [(503, {}, b""), (429, {}, b"")]
    kit = receiver_kit(notify(f"json://{hook.place}/json/", url), files=FILES)
    delivered = kit.deliver(make_event())
    assert delivered.delivery.state == "pending"
    assert delivered.delivery.reason == "not sent to 1 (json): HTTP 503"
    kit.exhaust(delivered)
    reasons = [attempt["reason"] for attempt in delivered.delivery.history]
    assert reasons[1:] == ["not sent to 1 (json): HTTP 429", ""]
    assert (delivered.delivery.state, len(hook.asked), len(server.mails)) == ("done", 3, 1)


def test_mail_refused_with_451_is_retried(
    notify: Notify,
    receiver_kit: Kits,
    post: tuple[Post, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from apprise.plugins.email import NotifyEmail  # noqa: PLC0415 - only needed here

    # Otherwise apprise waits between two mails.
    monkeypatch.setattr(NotifyEmail, "request_rate_per_sec", 0)
    server, url = post
    server.refuses = True
    kit = receiver_kit(notify(url), files=FILES)
    delivered = kit.deliver(make_event())
    assert delivered.delivery.reason == "not sent to 1 (mailto): apprise could not send it"
    server.refuses = False
    kit.exhaust(delivered)
    assert (delivered.delivery.state, len(server.mails)) == ("done", 1)


def test_401_or_404_ends_dead_after_all_services_were_tried(
    notify: Notify, receiver_kit: Kits, hook: Hook, post: tuple[Post, str]
) -> None:
    server, url = post
    hook.answers = [(401, {}, b""), (404, {}, b"")]
    files = [f"json://{hook.place}/json/{n}" for n in (1, 2)]
    delivered = receiver_kit(notify(*files, url), files=FILES).deliver(make_event())
    reason = str(delivered.delivery.reason)
    assert delivered.delivery.state == "dead"
    assert min(reason.removeprefix("not sent to ").split("; ")).startswith("1 (json): HTTP 4")
    assert {"HTTP 401", "HTTP 404"} == {part.partition(": ")[2] for part in reason.split("; ")}
    assert len(server.mails) == 1


def test_secrets_of_a_failing_service_are_not_revealed(
    notify: Notify,
    receiver_kit: Kits,
    hook: Hook,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    hook.answers = [(500, {}, SECRET.encode())]
    urls = [
        f"json://user:{SECRET}@{hook.place}/json/{SECRET}?+X-Key={SECRET}&-key={SECRET}&:a={SECRET}",
        f"json://127.0.0.1:9/json/{SECRET}",
        f"mailto://user:{SECRET}@127.0.0.1:9?from=art@example.com&to={SECRET}@example.com",
    ]
    delivered = receiver_kit(notify(*urls), files=FILES).deliver(make_event())
    assert delivered.delivery.reason == (
        "not sent to 1 (json): HTTP 500; 2 (json): apprise could not send it; "
        "3 (mailto): apprise could not send it"
    )
    assert SECRET in str(hook.asked[0].headers)
    assert SECRET not in str([delivered.delivery, capfd.readouterr(), caplog.text])
    # The first import of apprise logs its language.
    said = [record for record in caplog.records if record.module != "locale"]
    assert "apprise" not in {record.name for record in said}


def test_slow_service_does_not_delay_the_others(notify: Notify, receiver_kit: Kits) -> None:
    others = threading.Event()
    held: list[bool] = []

    def slow(asked: Asked) -> Answer:
        if asked.path == "/slow":
            held.append(others.wait(PATIENCE))
        else:
            others.set()
        return OK

    with service(slow) as url:
        place = url.removeprefix("http://")
        file = notify(f"json://{place}/slow", f"json://{place}/quick")
        kit = receiver_kit(file, files=FILES)
        assert kit.deliver(make_event()).delivery.state == "done"
    assert held == [True]


def test_crash_before_the_handler_runs_sends_once(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/"), files=FILES)
    assert kit.crash_after_ack(make_event()).delivery.state == "done"
    assert len(hook.asked) == 1


def test_crash_after_the_handler_ran_does_not_send_again(
    notify: Notify, receiver_kit: Kits, hook: Hook
) -> None:
    kit = receiver_kit(notify(f"json://{hook.place}/json/"), files=FILES)
    assert kit.crash_after_run(make_event()).delivery.state == "done"
    assert len(hook.asked) == 1


# --- settings ---


@pytest.mark.parametrize(
    ("urls", "more", "said"),
    [
        ([], {}, "needs NOTIFY_URLS"),
        (["json://127.0.0.1", f"nope://{SECRET}"], {}, r"number 2 \(nope\)"),
        ([f"slack://{SECRET}"], {}, r"number 1 \(slack\)"),
        ([SECRET], {}, r"number 1 \(\?\)"),
        (["json://127.0.0.1"], {"title": "{nothing}"}, "is not a field"),
        (["json://127.0.0.1"], {"text": "{prompt.__class__}"}, "is not a field"),
    ],
)
def test_invalid_settings_are_rejected_without_revealing_secrets(
    notify: Notify,
    receiver_kit: Kits,
    capfd: pytest.CaptureFixture[str],
    urls: list[str],
    more: dict[str, str],
    said: str,
) -> None:
    with pytest.raises(HandlerError, match=said) as raised:
        receiver_kit(notify(*urls, **more))
    assert SECRET not in str(raised.value) + "".join(capfd.readouterr())


def test_missing_apprise_is_reported_with_the_pip_command(
    notify: Notify, receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(HandlerError, match=r"pip install 'prediction-receiver\[notify\]'"):
        receiver_kit(notify("json://127.0.0.1"))
