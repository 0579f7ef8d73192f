"""What only the emulated WaveSpeed has: wrapped tasks, its signatures, two kinds of rejection."""

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


def test_signature_matches_the_known_vector() -> None:
    body = b'{"id":"t1","status":"failed","error":"no"}'
    made = signature("whsec_abc123", "wh_2", 1767225600, body)
    assert made == "v3,637bf6dff135265dcc5c77ec93dcb4f44dfd8a0e110eac0be93f9b1800350382"


@of_shapes
def test_official_client_works_with_the_emulator(start: Start, shape: Shape) -> None:
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


def test_callback_body_is_the_unwrapped_task_with_its_input(talk: Talk, mailbox: Mailbox) -> None:
    ticket, _ = talk.submit("a lighthouse", mailbox.url)
    body = mailbox.one().json
    assert (body["id"], body["input"]) == (ticket.provider_id, ticket.input)
    assert not {"code", "data"} & body.keys()


def test_callback_after_key_rotation_is_accepted_with_the_new_secret(
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
def test_poll_uses_the_url_of_the_submit_response(start: Start, shape: Shape) -> None:
    talk = Talk("wavespeed", start(shape=shape))
    ticket, _ = talk.submit("a lighthouse")
    assert ticket.links["get"].endswith("/result") == (shape == "new")
    assert talk.ended(ticket).kind == "succeeded"


def test_old_shape_rejection_is_http_200_with_an_error_code(start: Start) -> None:
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
def test_invalid_submit_returns_400_and_counts_as_rejected(
    emulated: Emulated, content: dict[str, Any], query: str
) -> None:
    path = f"/wavespeed/api/v3/{MODEL}{query}"
    answer = emulated.http.post(path, headers=KEY, **content)
    assert (answer.status_code, answer.json()["code"]) == (400, 400)
    assert emulated.ledger()["requests"]["wavespeed"]["rejected"] == 1


def test_text_output_is_read_as_text(talk: Talk) -> None:
    outcome = talk.ended(talk.submit("[text]")[0])
    assert [output.text for output in outcome.output] == ["the model answered in words"]


def test_malformed_secret_response_is_unreadable(emulated: Emulated, talk: Talk) -> None:
    emulated.break_with({"fault": "break_jwks", "answer": "garbage"})
    with pytest.raises(Unreadable):
        talk.keys()
