"""What only Ideogram does; that its adapter understands it is in test_adapters."""

import base64
from typing import Any

import pytest

from receiver.emulator.keys import signed_text
from receiver.model.values import Outcome
from receiver.providers.adapter import Postponed, Refused
from tests.emulator.adapting import Adapted
from tests.emulator.conftest import Start
from tests.emulator.serving import Emulated, Mailbox

BASE = "/ideogram/v2"
KEY = {"api-key": "key-1"}
PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


@pytest.fixture
def adapted(emulated: Emulated) -> Adapted:
    return Adapted(emulated, "ideogram")


def test_a_file_goes_up_in_a_form_of_parts(adapted: Adapted) -> None:
    fields = {"prompt": "make it night", "images": [PNG, PNG], "num_images": 2}
    ticket = adapted.taken("", input=fields)
    assert len(adapted.ended(ticket).output) == 2


def test_without_words_a_file_is_enough_and_nothing_is_not(adapted: Adapted) -> None:
    model = "image/upscale/auto"
    assert adapted.ended(adapted.taken("", model=model, input={"image": PNG})).kind == "succeeded"
    assert isinstance(adapted.submit(adapted.ticket("", model=model, input={})), Refused)


@pytest.mark.parametrize(
    "model", ["auto", "video/generate/seedance-2-text-to-video", "tool/colorways"]
)
def test_a_model_is_given_only_the_fields_that_it_knows(
    adapted: Adapted, mailbox: Mailbox, model: str
) -> None:
    for hook in ("", mailbox.url):
        ticket = adapted.taken("a lighthouse", hook, model=model)
        assert adapted.ended(ticket).kind == "succeeded"


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        ("image/generate/auto", {"prompt": "x", "webhook_url": "https://hooks.test/"}),
        ("video/generate/seedance-2-text-to-video", {"prompt": "x", "async": True}),
        ("image/generate/nano-banana-2", {"prompt": "x", "webhook_url": "ftp://x"}),
        ("image/generate/nano-banana-2", {"prompt": ""}),
    ],
)
def test_what_an_endpoint_does_not_know_is_refused(
    emulated: Emulated, model: str, fields: dict[str, Any]
) -> None:
    answer = emulated.http.post(f"{BASE}/{model}", headers=KEY, json=fields)
    assert (answer.status_code, answer.json()["title"]) == (400, "Bad Request")
    assert emulated.ledger()["predictions"] == []


def test_a_body_that_is_none_is_refused(emulated: Emulated) -> None:
    headers = KEY | {"content-type": "application/json"}
    answer = emulated.http.post(f"{BASE}/image/generate/x", content=b"{", headers=headers)
    assert answer.status_code == 400


def test_its_safety_check_refuses_without_a_word(adapted: Adapted) -> None:
    refused = adapted.submit(adapted.ticket("[unsafe]"))
    assert isinstance(refused, Refused)
    assert refused.code == "content_policy"


def test_a_withheld_picture_is_pushed_and_paid_for(adapted: Adapted, mailbox: Mailbox) -> None:
    ticket = adapted.taken("[moderated]", mailbox.url)
    mail = mailbox.one()
    assert mail.json["data"][0]["is_image_safe"] is False
    told, polled = adapted.provider.read(mail.body), adapted.ended(ticket)
    assert (told.error, told.cost) == (polled.error, None)
    assert polled.cost == 39_000


def test_a_failure_is_never_pushed(adapted: Adapted, mailbox: Mailbox) -> None:
    failed = adapted.taken("[fail]", mailbox.url)
    assert adapted.ended(failed).kind == "failed"
    after = adapted.taken("a lighthouse", mailbox.url)
    assert mailbox.one().json["generation_id"] == after.provider_id
    assert adapted.emulated.row(failed.provider_id or "")["callback_attempts"] == []


def test_what_always_runs_by_itself_does_not_block(adapted: Adapted) -> None:
    model = "video/generate/kling-3-standard-text-to-video"
    outcome = adapted.submit(adapted.ticket("a lighthouse", "sync", model=model))
    assert isinstance(outcome, Outcome)
    assert outcome.kind == "processing"
    assert adapted.ended(adapted.ticket("", provider_id=outcome.provider_id)).kind == "succeeded"


def test_too_many_at_once_are_put_off(start: Start) -> None:
    adapted = Adapted(start(ideogram_in_flight=2), "ideogram")
    for _ in range(2):
        adapted.taken("[never]")
    postponed = adapted.submit(adapted.ticket("a lighthouse"))
    assert isinstance(postponed, Postponed)
    assert "inflight_limit" in postponed.message


def test_the_signed_text_is_that_of_the_vector() -> None:
    body = (
        b'{"generation_id":"gen-0001","created":"2026-01-01T00:00:00Z","data":'
        b'[{"url":"https://cdn.example/a.png","is_image_safe":true}]}'
    )
    text = signed_text("gen-0001", "user-42", 1767225600, body)
    digest = b"9f95280f3b4cba56afc39c87c2b8d795cf9716c68a4f5103a2e2003e22641534"
    assert text == b"gen-0001\nuser-42\n1767225600\n" + digest


def test_a_broken_key_set_is_unreadable(adapted: Adapted) -> None:
    adapted.emulated.break_with({"fault": "break_jwks", "times": 1, "answer": "error"})
    assert adapted.keys() == []
