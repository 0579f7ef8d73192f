"""`discord` posts results through Discord's API, as a bot or by a webhook, as documented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

import pytest

from receiver import Output
from receiver.model.errors import HandlerError
from receiver.testing import make_event
from tests.handlers.chat import (
    KEPT,
    MP4,
    NASTY,
    PNG,
    Kits,
    Service,
    keeping,
    note,
    parts_of,
    speaking,
)
from tests.handlers.parts import Answer, Asked, built_in, waits

TOKEN: Final = "MTIz.hushed.token-1"
CHANNEL, OTHER, THREAD, MESSAGE = (
    "100000000000000001",
    "100000000000000002",
    "200000000000000001",
    "3" * 18,
)
HOOK: Final = "/webhooks/400000000000000001/hook-hushed_1"
DISCORD: Final = built_in("discord")


def said(status: int, headers: dict[str, str] | None = None, **words: Any) -> Answer:
    return (
        status,
        {"content-type": "application/json", **(headers or {})},
        json.dumps(words).encode(),
    )


class Discord(Service):
    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.posts: list[dict[str, Any]] = []
        self.nonces: set[str] = set()

    def speak(self, asked: Asked) -> Answer:
        path, query = urlsplit(asked.path).path, dict(parse_qsl(urlsplit(asked.path).query))
        assert asked.headers["user-agent"].startswith("DiscordBot (")
        if path.startswith("/api/webhooks/"):
            assert "authorization" not in asked.headers
            if path != f"/api{HOOK}":
                return said(404, message="Unknown Webhook", code=10015)
            assert query.keys() <= {"wait", "thread_id"}
            assert query["wait"] == "true"
            return self.take(asked, f"hook {query.get('thread_id', '')}".strip())
        if asked.headers.get("authorization") != f"Bot {TOKEN}":
            return said(401, message="401: Unauthorized", code=0)
        assert query == {}
        channel = re.fullmatch(r"/api/v10/channels/(\d+)/messages", path)
        assert channel
        if channel[1] not in {CHANNEL, OTHER, THREAD}:
            return said(404, message="Unknown Channel", code=10003)
        return self.take(asked, channel[1])

    def take(self, asked: Asked, place: str) -> Answer:
        assert len(asked.body) <= 25_000_000
        first, *files = parts_of(asked)
        assert (first.name, first.filename) == ("payload_json", None)
        payload = json.loads(first.content)
        known = {"content", "embeds", "attachments", "allowed_mentions"}
        of_bots = {"nonce", "enforce_nonce", "message_reference"}
        assert payload.keys() <= (known | of_bots if place.isdecimal() else known)
        check_files(payload, files)
        check_embeds(payload["embeds"], {file.filename for file in files})
        assert payload["allowed_mentions"] == {"parse": []}
        assert len(payload["content"]) <= 2000
        assert payload["content"] or payload["embeds"] or files
        if nonce := payload.get("nonce"):
            assert len(nonce) <= 25
            assert payload["enforce_nonce"] is True
        if not nonce or nonce not in self.nonces:
            self.posts.append({"place": place, "files": [f.content for f in files], **payload})
        self.nonces.add(nonce)
        return said(200, id="500000000000000001")


def check_files(payload: dict[str, Any], files: list[Any]) -> None:
    assert len(files) <= 10
    assert [file.name for file in files] == [f"files[{n}]" for n in range(len(files))]
    assert payload["attachments"] == [
        {"id": n, "filename": file.filename} for n, file in enumerate(files)
    ]
    assert all(re.fullmatch(r"[\w.-]+", file.filename) for file in files)
    assert all(len(file.content) <= 10 * 1024 * 1024 for file in files)


def check_embeds(embeds: list[dict[str, Any]], names: set[str | None]) -> None:
    assert len(embeds) <= 10
    for embed in embeds:
        assert embed.keys() <= {"title", "description", "color", "fields", "image"}
        if "image" in embed:
            assert embed["image"]["url"].removeprefix("attachment://") in names
        assert len(embed.get("title", "")) <= 256
        assert len(embed.get("description", "")) <= 4096
        assert 0 <= embed.get("color", 0) <= 0xFFFFFF
        for field in embed.get("fields", []):
            assert 0 < len(field["name"]) <= 256
            assert 0 < len(field["value"]) <= 1024
    fields = [field for embed in embeds for field in embed.get("fields", [])]
    texts = [embed.get(name, "") for embed in embeds for name in ("title", "description")]
    texts += [field[name] for field in fields for name in ("name", "value")]
    assert sum(map(len, texts)) <= 6000


@pytest.fixture
def discord(monkeypatch: pytest.MonkeyPatch) -> Iterator[Discord]:
    monkeypatch.setenv("DISCORD_TOKEN", TOKEN)
    monkeypatch.setenv("DISCORD_CHANNEL", CHANNEL)
    with speaking(Discord) as discord:
        monkeypatch.setenv("DISCORD_URL", f"{discord.url}/api/v10")
        yield discord


@pytest.fixture
def webhook(discord: Discord, monkeypatch: pytest.MonkeyPatch) -> Discord:
    monkeypatch.delenv("DISCORD_TOKEN")
    monkeypatch.delenv("DISCORD_CHANNEL")
    monkeypatch.setenv("DISCORD_WEBHOOK", f"{discord.url}/api{HOOK}")
    return discord


def test_files_and_text_are_sent_in_one_message(receiver_kit: Kits, discord: Discord) -> None:
    urls = [discord.put("a", PNG), discord.put("b", MP4), discord.put("c", PNG)]
    delivered = receiver_kit(DISCORD, online=True).deliver(make_event(output=urls))
    assert delivered.delivery.state == "done"
    [post] = discord.posts
    assert post["place"] == CHANNEL
    assert post["files"] == [PNG, MP4, PNG]
    first, second = post["embeds"]
    assert (first["title"], first["description"]) == ("fal-ai/nano-banana", "a lighthouse")
    assert [field["name"] for field in first["fields"]] == ["provider", "seconds"]
    assert first["image"]["url"].endswith("-0.png")
    assert second["image"]["url"].endswith("-2.png")


@pytest.mark.parametrize("kind", ["failed", "canceled"])
def test_failed_and_canceled_predictions_have_another_colour(
    receiver_kit: Kits, discord: Discord, kind: Any
) -> None:
    kit = receiver_kit(DISCORD, online=True)
    kit.deliver(make_event(kind, error=("provider_error", "out of memory")))
    kit.deliver(make_event(output=[]))
    [bad], [good] = (post["embeds"] for post in discord.posts)
    assert "out of memory" in bad["description"] or kind == "canceled"
    assert bad["color"] != good["color"]


def test_text_output_is_sent_as_a_message(receiver_kit: Kits, discord: Discord) -> None:
    event = make_event(provider="eachlabs", output=[Output(text="some\nwords")])
    receiver_kit(DISCORD, online=True).deliver(event)
    assert discord.posts[0]["embeds"][0]["description"] == "a lighthouse\nsome\nwords"


def test_more_than_ten_files_are_sent_in_several_messages(
    receiver_kit: Kits, discord: Discord
) -> None:
    urls = [discord.put(f"{n}", PNG + bytes([n])) for n in range(12)]
    discord.refusals = [None, (503, {}, b"")]
    kit = receiver_kit(DISCORD, online=True)
    delivered = kit.deliver(make_event(output=urls))
    kit.exhaust(delivered)
    assert [len(post["files"]) for post in discord.posts] == [10, 2]
    assert [len(post["embeds"]) for post in discord.posts] == [10, 2]
    assert "title" not in discord.posts[1]["embeds"][0]


def test_bot_replies_to_the_channel_message_and_thread_in_the_metadata(
    receiver_kit: Kits, discord: Discord
) -> None:
    kit = receiver_kit(DISCORD, online=True)
    where = {"discord_channel": OTHER, "discord_message": MESSAGE}
    kit.deliver(make_event("failed", metadata=where))
    kit.deliver(make_event("failed", metadata={**where, "discord_thread": int(THREAD)}))
    reference = {"message_id": MESSAGE, "fail_if_not_exists": False}
    assert [(p["place"], p["message_reference"]) for p in discord.posts] == [
        (OTHER, reference),
        (THREAD, reference),
    ]


def test_webhook_posts_files_and_supports_only_the_thread_of_the_metadata(
    receiver_kit: Kits, webhook: Discord
) -> None:
    kit = receiver_kit(DISCORD, online=True)
    kit.deliver(make_event(output=[webhook.put("a", PNG)], metadata={"discord_message": MESSAGE}))
    where = {"discord_channel": OTHER, "discord_thread": THREAD}
    kit.deliver(make_event("failed", metadata=where), times=2)
    assert [post["place"] for post in webhook.posts] == ["hook", f"hook {THREAD}"]
    assert webhook.posts[0]["files"] == [PNG]


def test_invalid_metadata_is_ignored(receiver_kit: Kits, discord: Discord) -> None:
    kit = receiver_kit(DISCORD, online=True)
    for odd in (7, 1.5, None, True, [OTHER], {"a": 1}, "", f"{OTHER}/../..", f"{OTHER}\n"):
        names = ("discord_channel", "discord_message", "discord_thread")
        event = make_event("failed", metadata=dict.fromkeys(names, odd))
        assert kit.deliver(event).delivery.state == "done"
        post = discord.posts.pop()
        assert (post["place"], "message_reference" in post) == (CHANNEL, False)


def test_hostile_prompt_is_escaped_and_fits_the_limits(
    receiver_kit: Kits, discord: Discord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISCORD_TEXT", "{prompt}")
    kit = receiver_kit(DISCORD, online=True)
    for prompt in (NASTY, "*" * 5000, " " + "*" * 5000):
        event = make_event("failed", model="a" * 180 + "*_`" * 9, input={"prompt": prompt})
        assert kit.deliver(event).delivery.state == "done"
        embed = discord.posts.pop()["embeds"][0]
        for text in (embed["title"], embed["description"]):
            assert not re.search(r"[*_~`|<>\[\]()@#:\\]", re.sub(r"\\[!-/:-@\[-`{-~]", "", text))


def test_hostile_flag_is_escaped(receiver_kit: Kits, discord: Discord) -> None:
    kit = receiver_kit(DISCORD, online=True)
    kit.deliver(make_event("failed", metadata={"flagged": "a_b\\ @everyone"}))
    text = discord.posts[0]["embeds"][0]["description"]
    assert text.startswith("(flagged: a b\\\\ \\@everyone)\n")


def test_missing_or_oversized_results_are_linked(receiver_kit: Kits, discord: Discord) -> None:
    large = PNG + bytes(9_000_000)
    urls = [f"{discord.url}/gone?a=<b>c", *(discord.put(f"{n}", large) for n in range(3))]
    urls += [discord.put("huge", PNG + bytes(10 * 1024 * 1024)), "data:image/png;base64,%"]
    delivered = receiver_kit(DISCORD, online=True).deliver(make_event(output=urls))
    assert delivered.delivery.state == "done"
    [post] = discord.posts
    assert len(post["files"]) == 2
    assert post["content"].splitlines() == [
        f"{discord.url}/gone?a=%3Cb%3Ec",
        f"{discord.url}/results/2",
        f"{discord.url}/results/huge",
        "(a result that has no address)",
    ]
    assert note(delivered, "discord").count("\n") == 3


def test_empty_file_is_linked(receiver_kit: Kits, discord: Discord) -> None:
    url = discord.put("empty", b"")
    delivered = receiver_kit(DISCORD, online=True).deliver(make_event(output=[url]))
    [post] = discord.posts
    assert (post["files"], post["content"].strip()) == ([], url)
    assert note(delivered, "discord") == "output 0: it is empty"


def test_links_that_do_not_fit_are_left_out(receiver_kit: Kits, discord: Discord) -> None:
    urls = [f"{discord.url}/gone/{n}{'a' * 900}" for n in range(4)]
    receiver_kit(DISCORD, online=True).deliver(make_event(output=urls))
    assert len(discord.posts[0]["content"].splitlines()) == 2


def test_all_black_result_is_flagged_and_its_saved_file_linked(
    receiver_kit: Kits, discord: Discord
) -> None:
    kit = receiver_kit(keeping, DISCORD, online=True)
    delivered = kit.deliver(make_event(output=[f"{discord.url}/gone"]))
    assert delivered.deliveries["discord"].state == "done"
    [post] = discord.posts
    assert post["content"] == f"{KEPT}\n"
    assert post["embeds"][0]["description"] == "(flagged: all black)\na lighthouse"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        (said(429, {"retry-after": "1"}, message="slow", retry_after=64.57), 64.57),
        ((429, {"retry-after": "30"}, b"<html>"), 30),
        (said(429, {"retry-after": "30"}, retry_after=-5), 30),
    ],
)
def test_429_is_retried_after_the_time_that_discord_asks_for(
    receiver_kit: Kits, discord: Discord, limit: Answer, seconds: float
) -> None:
    kit = receiver_kit(DISCORD, online=True)
    discord.refusals = [limit]
    delivered = kit.deliver(make_event(output=[discord.put("a", PNG)]))
    assert waits(delivered) == pytest.approx(seconds, abs=0.001)
    kit.move(seconds + 1)
    assert delivered.delivery.state == "done"
    assert len(discord.posts) == 1


def test_retry_after_a_lost_answer_is_deduplicated_by_its_nonce(
    receiver_kit: Kits, discord: Discord
) -> None:
    kit = receiver_kit(DISCORD, online=True)
    discord.lost = [(502, {}, b"")]
    delivered = kit.deliver(make_event(output=[discord.put("a", PNG)]))
    kit.exhaust(delivered)
    assert (delivered.delivery.state, delivered.delivery.attempts) == ("done", 2)
    assert (len(discord.asked), len(discord.posts)) == (2, 1)
    kit.replay(delivered)
    assert len(discord.posts) == 2


def test_duplicate_callbacks_and_crashes_post_once(receiver_kit: Kits, discord: Discord) -> None:
    event = make_event(output=[discord.put("a", PNG)])
    kit = receiver_kit(DISCORD, online=True)
    for n, happen in enumerate((kit.crash_after_ack, kit.crash_after_run), 1):
        delivered = happen(event)
        kit.exhaust(delivered)
        assert delivered.delivery.state == "done"
        assert len(discord.asked) == n
    kit.deliver(event, times=2)
    assert len(discord.asked) == 3


def test_invalid_token_or_channel_ends_dead_without_revealing_secrets(
    receiver_kit: Kits,
    discord: Discord,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    kit = receiver_kit(DISCORD, online=True)
    delivered = kit.deliver(make_event("failed", metadata={"discord_channel": "9" * 18}))
    assert delivered.delivery.state == "dead"
    assert "Unknown Channel" in delivered.delivery.reason
    monkeypatch.setenv("DISCORD_TOKEN", "wrong.hushed.token")
    delivered = receiver_kit(DISCORD, online=True).deliver(make_event("failed"))
    assert "401: Unauthorized" in delivered.delivery.reason
    assert discord.posts == []
    assert "hushed" not in f"{logged} {caplog.text}"


def test_deleted_webhook_ends_dead_without_revealing_secrets(
    receiver_kit: Kits,
    webhook: Discord,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("DISCORD_WEBHOOK", f"{webhook.url}/api{HOOK}2")
    kit = receiver_kit(DISCORD, online=True)
    delivered = kit.deliver(make_event("failed"))
    assert delivered.delivery.state == "dead"
    assert "Unknown Webhook" in delivered.delivery.reason
    webhook.refusals = [(404, {}, f"<p>{HOOK}2 was not found</p>".encode())]
    delivered = kit.deliver(make_event("failed"))
    assert delivered.delivery.reason == "HTTP 404 from something before Discord"
    assert "hushed" not in f"{logged} {caplog.text} {delivered.delivery}"


WAYS: Final = {
    "DISCORD_TOKEN": TOKEN,
    "DISCORD_CHANNEL": CHANNEL,
    "DISCORD_WEBHOOK": f"https://discord.com/api{HOOK}",
}


@pytest.mark.parametrize(
    "given",
    [
        {},
        WAYS,
        {"DISCORD_TOKEN": TOKEN},
        {"DISCORD_CHANNEL": CHANNEL},
        {**WAYS, "DISCORD_TOKEN": ""},
        {"DISCORD_TOKEN": "a\nhunter2", "DISCORD_CHANNEL": CHANNEL},
        {"DISCORD_TOKEN": TOKEN, "DISCORD_CHANNEL": "#art"},
    ],
)
def test_invalid_settings_are_rejected(
    receiver_kit: Kits, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HandlerError, match=r"needs either DISCORD_TOKEN|must be") as caught:
        receiver_kit(DISCORD)
    assert not re.search("hushed|hunter2", str(caught.value))
