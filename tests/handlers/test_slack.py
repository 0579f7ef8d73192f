"""`slack` posts results through Slack's API, as documented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from receiver import Output
from receiver.testing import make_event
from tests.handlers.chat import (
    KEPT,
    MP4,
    NASTY,
    PNG,
    Kits,
    Service,
    fields_of,
    keeping,
    note,
    parts_of,
    speaking,
)
from tests.handlers.parts import Answer, Asked, built_in, waits

TOKEN: Final = "xoxb-1234-hushed"
CHANNELS: Final = {"C0123456789", "C0OTHER"}


def said(**more: Any) -> Answer:
    return 200, {"content-type": "application/json"}, json.dumps({"ok": True, **more}).encode()


def refused(
    error: str, status: int = 200, headers: dict[str, str] | None = None, **more: Any
) -> Answer:
    content = json.dumps({"ok": False, "error": error, **more}).encode()
    return status, {"content-type": "application/json", **(headers or {})}, content


class Slack(Service):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.promised: dict[str, tuple[str, int]] = {}
        self.uploaded: dict[str, bytes] = {}
        self.posts: list[dict[str, Any]] = []
        self.upload_url = f"{url}/upload"

    def speak(self, asked: Asked) -> Answer:
        if asked.path.startswith("/upload/"):
            return self.take(asked)
        if asked.headers.get("authorization") != f"Bearer {TOKEN}":
            return refused("invalid_auth")
        fields = fields_of(asked)
        return {
            "/api/files.getUploadURLExternal": self.promise,
            "/api/files.completeUploadExternal": self.complete,
            "/api/chat.postMessage": self.post,
        }[asked.path](fields)

    def promise(self, fields: dict[str, str]) -> Answer:
        assert fields.keys() == {"filename", "length"}
        assert re.fullmatch(r"[\w.-]+", fields["filename"])
        assert int(fields["length"]) > 0
        file = f"F{len(self.promised)}"
        self.promised[file] = fields["filename"], int(fields["length"])
        return said(upload_url=f"{self.upload_url}/{file}", file_id=file)

    def take(self, asked: Asked) -> Answer:
        assert "authorization" not in asked.headers
        file = asked.path.rpartition("/")[2]
        [part] = parts_of(asked)
        assert (part.filename, len(part.content)) == self.promised[file]
        self.uploaded[file] = part.content
        return 200, {}, f"OK - {len(part.content)}".encode()

    def complete(self, fields: dict[str, str]) -> Answer:
        assert fields.keys() <= {"files", "channel_id", "thread_ts", "blocks"}
        files = json.loads(fields["files"])
        assert 0 < len(files) <= 10
        assert all(file.keys() == {"id", "title"} and file["id"] in self.uploaded for file in files)
        return self.show(fields["channel_id"], fields, files=[file["id"] for file in files])

    def post(self, fields: dict[str, str]) -> Answer:
        assert 0 < len(fields["text"]) <= 4000
        return self.show(fields["channel"], fields, files=[])

    def show(self, channel: str, fields: dict[str, str], files: list[str]) -> Answer:
        if channel not in CHANNELS:
            return refused("channel_not_found")
        blocks = json.loads(fields["blocks"])
        assert 0 < len(blocks) <= 50
        texts = [block["text"] for block in blocks if block["type"] == "section"]
        texts += [text for block in blocks for text in block.get("elements", [])]
        assert all(text["type"] == "mrkdwn" and text["verbatim"] is True for text in texts)
        assert all(0 < len(text["text"]) <= 3000 for text in texts)
        thread = fields.get("thread_ts")
        assert thread is None or re.fullmatch(r"\d+\.\d{6}", thread)
        shown = {"channel": channel, "thread": thread, "files": files}
        self.posts.append({**shown, "texts": [text["text"] for text in texts]})
        return said(ts="1.000001")


@pytest.fixture
def slack(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slack]:
    monkeypatch.setenv("SLACK_TOKEN", TOKEN)
    monkeypatch.setenv("SLACK_CHANNEL", "C0123456789")
    with speaking(Slack) as slack:
        monkeypatch.setenv("SLACK_URL", f"{slack.url}/api")
        yield slack


SLACK: Final = built_in("slack")


def test_all_files_are_sent_in_one_message(receiver_kit: Kits, slack: Slack) -> None:
    urls = [slack.put("a", PNG), slack.put("b", MP4), slack.put("c", PNG + b"c")]
    kit = receiver_kit(SLACK, online=True)
    delivered = kit.deliver(make_event(output=urls))
    assert delivered.delivery.state == "done"
    [post] = slack.posts
    assert (post["channel"], post["thread"], post["files"]) == (
        "C0123456789",
        None,
        ["F0", "F1", "F2"],
    )
    assert list(slack.uploaded.values()) == [PNG, MP4, PNG + b"c"]
    assert [name.rpartition(".")[2] for name, _ in slack.promised.values()] == ["png", "mp4", "png"]
    text, about = post["texts"]
    assert text == "*succeeded*: a lighthouse"
    assert re.fullmatch(r"fal · fal-ai/nano-banana · [\d.]+ s", about)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("failed", "*failed*: a lighthouse\nInvalid status code: 500"),
        ("canceled", "*canceled*: a lighthouse"),
    ],
)
def test_failed_and_canceled_predictions_are_sent_as_messages(
    receiver_kit: Kits, slack: Slack, kind: Any, text: str
) -> None:
    kit = receiver_kit(SLACK, online=True)
    assert kit.deliver(make_event(kind)).delivery.state == "done"
    [post] = slack.posts
    assert post["texts"][0].startswith(text)
    assert post["files"] == []


def test_text_output_is_sent_as_a_message(receiver_kit: Kits, slack: Slack) -> None:
    event = make_event(provider="eachlabs", output=[Output(text="a <b> & c")])
    receiver_kit(SLACK, online=True).deliver(event)
    assert slack.posts[0]["texts"][0] == "*succeeded*: a lighthouse\na &lt;b&gt; &amp; c"


def test_reply_goes_to_the_channel_and_thread_in_the_metadata(
    receiver_kit: Kits, slack: Slack
) -> None:
    where = {"slack_channel": "C0OTHER", "slack_thread": "1524523204.000192"}
    kit = receiver_kit(SLACK, online=True)
    kit.deliver(make_event(output=[slack.put("a", PNG)], metadata=where))
    kit.deliver(make_event("failed", metadata=where))
    assert [(p["channel"], p["thread"]) for p in slack.posts] == [tuple(where.values())] * 2


def test_invalid_metadata_is_ignored(receiver_kit: Kits, slack: Slack) -> None:
    kit = receiver_kit(SLACK, online=True)
    for odd in (7, 1.5, None, True, ["C0OTHER"], {"a": 1}, "", "a&channel=C0OTHER", "C0OTHER\n"):
        metadata = {"slack_channel": odd, "slack_thread": odd}
        assert kit.deliver(make_event("failed", metadata=metadata)).delivery.state == "done"
        post = slack.posts.pop()
        assert (post["channel"], post["thread"]) == ("C0123456789", None)


def test_hostile_prompt_is_escaped_and_fits_the_limits(
    receiver_kit: Kits, slack: Slack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLACK_TEXT", "{prompt} {input[n]:.3f} {metadata[flagged]}")
    kit = receiver_kit(SLACK, online=True)
    event = make_event("failed", input={"prompt": NASTY, "n": NASTY}, metadata={"flagged": NASTY})
    assert kit.deliver(event).delivery.state == "done"
    text = slack.posts[0]["texts"][0]
    assert not re.search(r"[<>]|&(?!(amp|lt|gt);)", text)
    assert "(flagged: &lt;!channel&gt;" in text


def test_missing_oversized_or_surplus_results_are_linked(
    receiver_kit: Kits, slack: Slack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLACK_MAX_BYTES", str(len(PNG)))
    urls = [f"{slack.url}/gone?a=<b|c>&d", slack.put("large", PNG + b"1")]
    urls += ["data:image/png;base64,%", *(slack.put(f"{n}", PNG) for n in range(9))]
    delivered = receiver_kit(SLACK, online=True).deliver(make_event(output=urls))
    assert delivered.delivery.state == "done"
    [post] = slack.posts
    assert len(post["files"]) == 7
    assert post["texts"][1:-1] == [
        f"<{slack.url}/gone?a=%3Cb%7Cc%3E&amp;d>",
        f"<{slack.url}/results/large>",
        "(a result that has no address)",
        f"<{slack.url}/results/7>",
        f"<{slack.url}/results/8>",
    ]
    noted = note(delivered, "slack")
    assert "output 0: the result is gone" in noted
    assert "output 1: the result has 265 bytes" in noted
    assert "output 11: 10 files" in noted


def test_message_has_only_links_if_no_file_can_be_uploaded(
    receiver_kit: Kits, slack: Slack
) -> None:
    urls = [f"{slack.url}/gone", slack.put("empty", b"")]
    receiver_kit(SLACK, online=True).deliver(make_event(output=urls))
    assert slack.posts[0]["texts"][1:-1] == [f"<{url}>" for url in urls]


def test_all_black_result_is_flagged_and_its_saved_file_linked(
    receiver_kit: Kits, slack: Slack
) -> None:
    kit = receiver_kit(keeping, SLACK, online=True)
    delivered = kit.deliver(make_event(output=[f"{slack.url}/gone"]))
    assert delivered.deliveries["slack"].state == "done"
    assert slack.posts[0]["texts"][:2] == [
        "(flagged: all black)\n*succeeded*: a lighthouse",
        f"<{KEPT}>",
    ]


@pytest.mark.parametrize(
    "limit",
    [
        refused("ratelimited", 429, {"retry-after": "30"}),
        refused("ratelimited", 200, {"retry-after": "30"}),
    ],
)
def test_rate_limit_is_retried_after_retry_after_and_uploads_once(
    receiver_kit: Kits, slack: Slack, limit: Answer
) -> None:
    url = slack.put("a", PNG)
    kit = receiver_kit(SLACK, online=True)
    slack.refusals = [None, None, limit]
    delivered = kit.deliver(make_event(output=[url]))
    assert waits(delivered) == pytest.approx(30, abs=0.001)
    kit.move(31)
    assert delivered.delivery.state == "done"
    assert len(slack.posts) == len(slack.uploaded) == 1


PASSES: Final[tuple[Answer, ...]] = (
    (503, {}, b"<html>"),
    (200, {}, b"<html>"),
    refused("internal_error"),
    refused("fatal_error"),
    refused("service_unavailable"),
    refused("request_timeout"),
    refused("something_new"),
    refused("ratelimited", 200, {"retry-after": "soon"}),
)


def test_temporary_errors_are_retried(receiver_kit: Kits, slack: Slack) -> None:
    """The base of 1e-9 seconds makes the policy's retries due at once."""
    kit = receiver_kit(SLACK, online=True, settings={"RECEIVER_RETRY_BASE": "1e-9"})
    for answer in PASSES:
        slack.refusals = [answer]
        delivered = kit.deliver(make_event("failed"))
        assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 2)
    assert len(slack.posts) == len(PASSES)


ENDS: Final = (
    *("invalid_auth", "not_authed", "token_revoked", "account_inactive", "channel_not_found"),
    *("not_in_channel", "is_archived", "invalid_blocks", "msg_too_long", "restricted_action"),
)


def test_permanent_errors_end_dead_after_one_attempt(receiver_kit: Kits, slack: Slack) -> None:
    kit = receiver_kit(SLACK, online=True)
    for error in ENDS:
        slack.refusals = [refused(error)]
        delivered = kit.deliver(make_event("failed"))
        assert (delivered.delivery.state, delivered.delivery.attempts) == ("dead", 1)
        assert delivered.delivery.reason == f"chat.postMessage: {error}"


def test_missing_scope_is_named_in_the_reason(receiver_kit: Kits, slack: Slack) -> None:
    slack.refusals = [refused("missing_scope", needed="files:write", provided="chat:write")]
    delivered = receiver_kit(SLACK, online=True).deliver(make_event(output=[slack.put("a", PNG)]))
    assert delivered.delivery.state == "dead"
    assert "missing_scope files:write" in delivered.delivery.reason


def test_invalid_token_or_channel_ends_dead_without_revealing_secrets(
    receiver_kit: Kits,
    slack: Slack,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    kit = receiver_kit(SLACK, online=True)
    other = make_event("failed", metadata={"slack_channel": "C0NOWHERE"})
    assert kit.deliver(other).delivery.reason == "chat.postMessage: channel_not_found"
    monkeypatch.setenv("SLACK_TOKEN", "xoxb-wrong-hushed")
    delivered = receiver_kit(SLACK, online=True).deliver(make_event("failed"))
    assert delivered.delivery.reason == "chat.postMessage: invalid_auth"
    assert slack.posts == []
    assert "hushed" not in f"{logged} {caplog.text}"


def test_files_are_uploaded_only_to_https_urls(receiver_kit: Kits, slack: Slack) -> None:
    slack.upload_url = "http://169.254.169.254/upload"
    delivered = receiver_kit(SLACK, online=True).deliver(make_event(output=[slack.put("a", PNG)]))
    assert (delivered.delivery.state, slack.posts) == ("dead", [])
    assert "not https" in delivered.delivery.reason


def test_duplicate_callbacks_and_crashes_post_once(receiver_kit: Kits, slack: Slack) -> None:
    event = make_event(output=[slack.put("a", PNG)])
    kit = receiver_kit(SLACK, online=True)
    for n, happen in enumerate((kit.crash_after_ack, kit.crash_after_run), 1):
        delivered = happen(event)
        kit.exhaust(delivered)
        assert delivered.delivery.state == "done"
        assert len(slack.posts) == n
    delivered = kit.deliver(event, times=2)
    assert len(slack.posts) == 3
    kit.replay(delivered)
    assert (len(slack.posts), len(slack.uploaded)) == (4, 4)
