"""What is WaveSpeed's own: wrappers, a dialect of signatures, two ways to refuse, its client."""

from __future__ import annotations

from typing import Any

import pytest
from wavespeed import Client  # type: ignore[import-untyped]

from receiver.emulator.options import Shape
from receiver.emulator.wavespeed import signature
from receiver.model.errors import Unproved, Unreadable
from receiver.providers.adapter import Refused
from tests.emulator.conftest import Start
from tests.emulator.serving import Emulated, Mailbox
from tests.emulator.test_adapters_agree import Talk

MODEL = "google/nano-banana-pro/text-to-image"
KEY = {"authorization": "Bearer key-1"}
of_shapes = pytest.mark.parametrize("shape", ["new", "old"])


@pytest.fixture
def talk(emulated: Emulated) -> Talk:
    return Talk("wavespeed", emulated)


def test_the_signature_is_that_of_the_vector() -> None:
    body = b'{"id":"t1","status":"failed","error":"no"}'
    made = signature("whsec_abc123", "wh_2", 1767225600, body)
    assert made == "v3,637bf6dff135265dcc5c77ec93dcb4f44dfd8a0e110eac0be93f9b1800350382"


@of_shapes
def test_the_official_client_finds_nothing_amiss(start: Start, shape: Shape) -> None:
    emulated = start(shape=shape)
    client = Client(api_key="key-1", base_url=f"{emulated.url}/wavespeed", retry_interval=0.005)

    def run(prompt: str, **more: Any) -> dict[str, Any]:
        seen: dict[str, Any] = client.run_no_throw(
            MODEL, {"prompt": prompt}, poll_interval=0.005, **more
        )
        return seen

    for more in ({}, {"enable_sync_mode": True}):
        seen = run("a lighthouse", **more)
        assert (seen["status"], seen["error"]) == ("completed", None)
        assert seen["outputs"][0].startswith(f"{emulated.url}/files/")
        assert client.get_result(seen["task_id"])["data"]["status"] == "completed"
        assert "sensitive" in run("[moderated]", **more)["error"]
    refused = run("[refuse]")
    assert (refused["status"], refused["task_id"]) == ("failed", "unknown")
    assert "Insufficient credits" in refused["error"]


def test_a_callback_is_the_bare_task_with_what_was_asked_for(talk: Talk, mailbox: Mailbox) -> None:
    ticket, _ = talk.submit("a lighthouse", mailbox.url)
    body = mailbox.one().json
    assert (body["id"], body["input"]) == (ticket.provider_id, ticket.input)
    assert not {"code", "data"} & body.keys()


def test_a_callback_under_a_new_secret_wants_it_fetched_again(
    emulated: Emulated, talk: Talk, mailbox: Mailbox
) -> None:
    before = talk.keys()
    emulated.break_with({"fault": "rotate_keys"})
    ticket, _ = talk.submit("a lighthouse", mailbox.url)
    mail = mailbox.one()
    with pytest.raises(Unproved, match=r"^bad_signature$"):
        talk.read(mail, before)
    assert talk.read(mail).provider_id == ticket.provider_id


@of_shapes
def test_the_url_that_is_given_is_followed(start: Start, shape: Shape) -> None:
    talk = Talk("wavespeed", start(shape=shape))
    ticket, _ = talk.submit("a lighthouse")
    assert ticket.links["get"].endswith("/result") == (shape == "new")
    assert talk.ended(ticket).kind == "succeeded"


def test_the_older_refusal_is_a_yes_with_a_code(start: Start) -> None:
    emulated = start(shape="old")
    body = {"prompt": "[refuse]"}
    answer = emulated.http.post(f"/wavespeed/api/v3/{MODEL}", headers=KEY, json=body)
    assert (answer.status_code, answer.json()["code"]) == (200, 402)
    assert isinstance(Talk("wavespeed", emulated).submit("[refuse]")[1], Refused)


@pytest.mark.parametrize(
    ("content", "query"),
    [
        ({"json": {"prompt": ""}}, ""),
        ({"content": b"["}, ""),
        ({"json": {"prompt": "x"}}, "?webhook=ftp"),
    ],
)
def test_what_cannot_be_made_is_refused(
    emulated: Emulated, content: dict[str, Any], query: str
) -> None:
    path = f"/wavespeed/api/v3/{MODEL}{query}"
    answer = emulated.http.post(path, headers=KEY, **content)
    assert (answer.status_code, answer.json()["code"]) == (400, 400)
    assert emulated.ledger()["requests"]["wavespeed"]["rejected"] == 1


def test_words_are_words(talk: Talk) -> None:
    outcome = talk.ended(talk.submit("[text]")[0])
    assert [output.text for output in outcome.output] == ["the model answered in words"]


def test_a_secret_that_is_not_given_is_unreadable(emulated: Emulated, talk: Talk) -> None:
    emulated.break_with({"fault": "break_jwks", "answer": "garbage"})
    with pytest.raises(Unreadable):
        talk.keys()
