"""The emulator's retry schedules, settings, ledger and options."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from receiver.emulator import Options, settings_for
from receiver.emulator.callback_sender import Callback
from receiver.emulator.options import Provider
from receiver.emulator.providers import CALLING
from tests.emulator.conftest import Start
from tests.emulator.parts import prediction
from tests.emulator.serving import Emulated, Mailbox, serve


def waits(provider: Provider, body: bytes, status: int = 500) -> list[float]:
    """Return every wait of a callback that always gets this status."""
    callback = Callback(prediction(), body, dict, CALLING[provider].schedule)
    found: list[float] = []
    callback.tries = 1
    while (wait := callback.wait_after(status)) is not None:
        found.append(wait)
        callback.waited += wait
        callback.tries += 1
    return found


def test_retry_schedules_are_as_long_as_documented() -> None:
    assert waits("eachlabs", b"") == [10, 10]
    assert waits("replicate", b"") == [1, 2, 4, 8, 16]
    tried = waits("fal", b"")
    assert len(tried) == 31
    assert tried == sorted(tried)
    assert 3000 < sum(tried) <= 3600
    assert 200 < sum(waits("fal", bytes(10_000))) <= 360


@pytest.mark.parametrize(
    ("provider", "status", "count"),
    [
        *(("fal", 204, 0), ("fal", 301, 0)),
        *(("eachlabs", 299, 0), ("eachlabs", 301, 2)),
        *(("replicate", 200, 0), ("replicate", 308, 0)),
    ],
)
def test_success_and_for_two_providers_a_redirect_end_the_retries(
    provider: Provider, status: int, count: int
) -> None:
    assert len(waits(provider, b"", status)) == count


def test_settings_contain_the_urls_of_every_provider(emulated: Emulated) -> None:
    settings = settings_for(emulated.url + "/")
    assert set(settings) == {
        "OXEN_BASE_URL",
        "EACHLABS_BASE_URL",
        "FAL_QUEUE_URL",
        "FAL_RUN_URL",
        "FAL_JWKS_URL",
        "FAL_META_URL",
        "FAL_API_URL",
        "REPLICATE_BASE_URL",
        "IDEOGRAM_BASE_URL",
        "BFL_BASE_URL",
        "WAVESPEED_BASE_URL",
        "OPENROUTER_BASE_URL",
        "OPENROUTER_WEBHOOK_SECRET",
    }
    assert emulated.http.get(settings["FAL_JWKS_URL"]).status_code == 200
    assert emulated.http.get(settings["OXEN_BASE_URL"] + "/api/ai/models/x").status_code == 401


def test_ledger_counts_requests_and_billed_predictions(start: Start, mailbox: Mailbox) -> None:
    emulated = start(eachlabs_in_flight=None)
    for provider in ("oxen", "eachlabs", "fal") * 5:
        emulated.submit(provider, "x", mailbox.url)
    mailbox.take(10)
    cancelled = emulated.submit("fal", "[never]")
    emulated.call("fal", "PUT", f"/queue/fal-ai/nano-banana/requests/{cancelled}/cancel")
    emulated.poll("fal", cancelled)
    ledger = emulated.ledger()
    assert sum(row["billed"] for row in ledger["predictions"]) == 16
    assert {row["provider"] for row in ledger["predictions"]} == {"oxen", "eachlabs", "fal"}
    assert ledger["requests"]["fal"] == {"submits": 6, "polls": 1, "cancels": 1, "rejected": 0}
    row = ledger["predictions"][-1]
    assert (row["id"], row["status"], row["polls"]) == (cancelled, "cancelled", 1)
    assert ledger["violations"] == []


def test_ledger_drops_the_oldest_predictions(start: Start) -> None:
    emulated = start(ledger_size=2)
    made = [emulated.submit("fal", "[never]") for _ in range(3)]
    assert [row["id"] for row in emulated.ledger()["predictions"]] == made[1:]
    latest = emulated.http.get("/_emulator/ledger?limit=1").json()
    assert [row["id"] for row in latest["predictions"]] == made[2:]


def test_same_seed_produces_the_same_ids(start: Start) -> None:
    first, second = (start(seed=7).submit("fal", "x") for _ in range(2))
    assert first == second


def test_options_can_be_read_from_json() -> None:
    text = msgspec.json.encode({"generation": 2, "shape": "old", "fal_sources": []})
    assert msgspec.json.decode(text, type=Options).generation == 2


def test_trailing_slash_is_never_redirected(emulated: Emulated) -> None:
    assert emulated.call("oxen", "GET", "/api/ai/models/x/").status_code == 200
    assert emulated.call("oxen", "GET", "/api/events/").status_code == 404


async def streamed(scope: Scope, receive: Receive, send: Send) -> None:
    await StreamingResponse(iter([b"no length"]))(scope, receive, send)


async def silent(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize(("app", "status"), [(streamed, 200), (silent, 204)])
def test_callback_response_without_content_length_is_read(
    emulated: Emulated, app: Callable[..., Awaitable[Any]], status: int
) -> None:
    with serve(app, lifespan="off") as port:
        for _ in range(2):
            one = emulated.submit("fal", "x", f"http://127.0.0.1:{port}/a b?c=d e")
            assert emulated.attempts(one, 1)[0]["status_code"] == status


def test_callback_url_that_is_not_http_is_recorded_as_failed_attempts(emulated: Emulated) -> None:
    one = emulated.submit("eachlabs", "x", "mailto:nobody")
    assert all(attempt["error"] for attempt in emulated.attempts(one, 3))
