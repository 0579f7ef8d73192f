"""What only the emulated OpenRouter has: callbacks with a cost, an event per status, video keys."""

from __future__ import annotations

from typing import Any

import pytest

from receiver.emulator.openrouter import signature
from receiver.providers.adapter import Guarding
from tests.emulator.serving import Emulated, Mailbox
from tests.emulator.test_adapters_agree import Talk

VIDEOS = "/openrouter/api/v1/videos"
KEY = {"authorization": "Bearer k"}


@pytest.fixture
def talk(emulated: Emulated) -> Talk:
    return Talk("openrouter", emulated)


def test_signature_matches_the_known_vector() -> None:
    body = (
        b'{"type":"video.generation.completed","created_at":"2026-01-01T00:00:00.000Z","data":'
        b'{"id":"job_0001","status":"completed"}}'
    )
    digest = "3afe3b46f14fad5a7350aefb4220562e2c06d72e5a829e14f6f5f02e2fddacde"
    assert signature("dev_secret", 1767225600, body) == f"t=1767225600,v1={digest}"


def test_callback_envelope_contains_the_cost(talk: Talk, mailbox: Mailbox) -> None:
    ticket, _ = talk.submit("a lighthouse", mailbox.url)
    mail = mailbox.one()
    assert mail.json["type"] == "video.generation.completed"
    assert mail.headers["x-openrouter-idempotency-key"] == f"{ticket.provider_id}-completed"
    assert talk.read(mail).cost == talk.ended(ticket).cost == 250_000


@pytest.mark.parametrize(
    ("prompt", "status"), [("[timeout]", "expired"), ("[moderated]", "failed")]
)
def test_each_failure_status_has_its_own_event_type(
    talk: Talk, mailbox: Mailbox, prompt: str, status: str
) -> None:
    talk.submit(prompt, mailbox.url)
    assert mailbox.one().json["type"] == f"video.generation.{status}"


def test_video_download_sends_the_key_only_to_its_own_host(emulated: Emulated, talk: Talk) -> None:
    [video] = talk.ended(talk.submit("a lighthouse")[0]).output
    assert isinstance(talk.provider, Guarding)
    assert video.url
    assert talk.provider.authorization(video.url) == "Bearer k"
    for url in ("https://openrouter.ai/api/v1/videos/1/content", f"{emulated.url}1/x"):
        assert talk.provider.authorization(url) is None
    for number, status in (("0", 200), ("1", 404), ("x", 404)):
        url = video.url.replace("index=0", f"index={number}")
        assert emulated.http.get(url, headers=KEY).status_code == status


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": "x"}, 404),
        ({"model": "m", "prompt": "x", "callback_url": 7}, 400),
        ({"model": "m", "prompt": "x", "callback_url": "ftp://x"}, 400),
    ],
)
def test_invalid_submit_is_rejected_and_counted(
    emulated: Emulated, body: dict[str, Any], status: int
) -> None:
    answer = emulated.http.post(VIDEOS, headers=KEY, json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
    assert emulated.ledger()["requests"]["openrouter"]["rejected"] == 1
