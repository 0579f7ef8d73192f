"""What only WaveSpeed does; that its adapter understands it is in test_adapters."""

from typing import Any

import httpx
import pytest
from wavespeed import Client  # type: ignore[import-untyped]

from receiver.emulator.options import Shape
from receiver.emulator.wavespeed import signature
from receiver.model.errors import Unreadable
from receiver.model.values import Outcome
from receiver.providers.adapter import Refused
from tests.emulator.adapting import Adapted
from tests.emulator.conftest import Start
from tests.emulator.serving import Emulated, Mailbox

MODEL = "google/nano-banana-pro/text-to-image"
of_shapes = pytest.mark.parametrize("shape", ["new", "old"])


@pytest.fixture
def adapted(emulated: Emulated) -> Adapted:
    return Adapted(emulated, "wavespeed")


def test_the_signature_is_that_of_the_vector() -> None:
    made = signature(
        "whsec_abc123", "wh_2", 1767225600, b'{"id":"t1","status":"failed","error":"no"}'
    )
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


def test_a_callback_is_the_bare_task_with_what_was_asked_for(
    adapted: Adapted, mailbox: Mailbox
) -> None:
    ticket = adapted.taken("a lighthouse", mailbox.url)
    body = mailbox.one().json
    assert (body["id"], body["input"]) == (ticket.provider_id, ticket.input)
    assert not {"code", "data"} & body.keys()


@of_shapes
def test_the_url_that_is_given_is_followed(start: Start, shape: Shape) -> None:
    adapted = Adapted(start(shape=shape), "wavespeed")
    ticket = adapted.taken("a lighthouse")
    assert ticket.links["get"].endswith("/result") == (shape == "new")
    assert adapted.ended(ticket).kind == "succeeded"


def test_the_older_refusal_is_a_yes_with_a_code(start: Start) -> None:
    adapted = Adapted(start(shape="old"), "wavespeed")
    request = adapted.provider.request(adapted.ticket("[refuse]"), None)
    answer = adapted.send(request)
    assert answer.status == 200
    assert isinstance(adapted.provider.accepted(adapted.ticket("[refuse]"), answer), Refused)


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
    headers = {"authorization": "Bearer key-1"}
    answer: httpx.Response = emulated.http.post(
        f"/wavespeed/api/v3/{MODEL}{query}", headers=headers, **content
    )
    assert (answer.status_code, answer.json()["code"]) == (400, 400)
    assert emulated.ledger()["requests"]["wavespeed"]["rejected"] == 1


def test_words_are_words(adapted: Adapted) -> None:
    outcome: Outcome = adapted.ended(adapted.taken("[text]"))
    assert [output.text for output in outcome.output] == ["the model answered in words"]


def test_a_secret_that_is_not_given_is_unreadable(adapted: Adapted) -> None:
    adapted.emulated.break_with({"fault": "break_jwks", "answer": "garbage"})
    with pytest.raises(Unreadable):
        adapted.keys()
