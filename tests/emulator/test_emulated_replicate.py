"""What only the emulated Replicate has: deadlines, expired outputs, paged lists, rate limits."""

from __future__ import annotations

import re

import httpx
import pytest

from receiver.emulator.options import Shape
from tests.emulator.conftest import Start
from tests.emulator.serving import Emulated, Mailbox, eventually

KEY = {"authorization": "Bearer key-1"}
MODEL = "/replicate/v1/models/google/nano-banana/predictions"
ONE = "/replicate/v1/predictions"


def submit(emulated: Emulated, prompt: str = "x", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return emulated.http.post(MODEL, json={"input": {"prompt": prompt}}, headers=KEY | named)


def state(emulated: Emulated, name: str) -> dict[str, object]:
    found: dict[str, object] = emulated.http.get(f"{ONE}/{name}", headers=KEY).json()
    return found


def test_deadline_aborts_a_queued_prediction_and_cancels_a_running_one(
    start: Start, mailbox: Mailbox
) -> None:
    waiting, running = start(generation=1000, jitter=0), start()
    body = {
        "input": {"prompt": "[never]"},
        "webhook": mailbox.url,
        "webhook_events_filter": ["completed"],
    }
    for emulated, end in ((waiting, "aborted"), (running, "canceled")):
        headers = KEY | {"cancel-after": "1s"}
        made = emulated.http.post(MODEL, json=body, headers=headers).json()
        assert mailbox.one().json["status"] == end
        assert state(emulated, made["id"])["status"] == end


def test_output_is_removed_one_hour_after_the_end(start: Start) -> None:
    now = [1000.0]
    emulated = start(clock=lambda: now[0])
    name = submit(emulated).json()["id"]
    found = eventually(lambda: state(emulated, name), lambda s: s["status"] == "succeeded")
    assert (found["data_removed"], str(found["output"])[:7]) == (False, "http://")
    now[0] += 3601
    found = state(emulated, name)
    assert (found["status"], found["data_removed"], found["output"]) == ("succeeded", True, None)


def test_list_is_newest_first_with_pages_and_time_filters(start: Start) -> None:
    now = [1000.0]
    emulated = start(clock=lambda: now[0], replicate_per_minute=None)
    names = []
    for _ in range(103):
        now[0] += 1
        names.append(submit(emulated, "[never]").json()["id"])
    first = emulated.http.get(ONE, headers=KEY).json()
    assert [row["id"] for row in first["results"]] == names[:2:-1]
    rest = emulated.http.get(first["next"], headers=KEY).json()
    assert ([row["id"] for row in rest["results"]], rest["next"]) == (names[2::-1], None)
    between = {
        "created_after": "1970-01-01T00:16:50+00:00",
        "created_before": "1970-01-01T00:16:52+00:00",
    }
    some = emulated.http.get(ONE, params=between, headers=KEY).json()["results"]
    assert [row["id"] for row in some] == names[11:8:-1]


@pytest.mark.parametrize("shape", ["new", "old", "mixed"])
def test_rate_limited_submit_returns_429_and_the_time_to_retry(start: Start, shape: Shape) -> None:
    emulated = start(shape=shape, replicate_per_minute=2)
    assert [submit(emulated).status_code for _ in range(2)] == [201, 201]
    refused = submit(emulated)
    assert refused.status_code == 429
    words = re.search(r"resets in ~(\d+)s", refused.json()["detail"])
    told = refused.headers.get("retry-after") or refused.json().get("retry_after")
    assert 0 < int(told or (words and words[1]) or 0) <= 61
    assert [row["rule"] for row in emulated.ledger()["violations"]] == ["per_minute"]


def test_prefer_wait_returns_the_current_status_after_its_timeout(emulated: Emulated) -> None:
    assert submit(emulated, "[never]", prefer="wait=1").json()["status"] == "processing"
    assert submit(emulated, prefer="wait").json()["status"] == "succeeded"


def test_invalid_submit_is_rejected_with_a_detail(emulated: Emulated) -> None:
    version = "0" * 64
    cases = [
        (MODEL, {"input": {}}, 422),
        (MODEL, {"input": 7}, 422),
        (MODEL, {"input": {"prompt": "x"}, "webhook": "ftp://x"}, 422),
        (ONE, {"input": {"prompt": "x"}}, 404),
        (ONE, {"version": "no", "input": {"prompt": "x"}}, 404),
        (ONE, {"version": version, "input": {"prompt": "x"}}, 201),
        (ONE, {"version": f"owner/model:{version}", "input": {"prompt": "x"}}, 201),
        (MODEL.replace("nano-banana", "no-such-model"), {"input": {"prompt": "x"}}, 404),
    ]
    for path, body, status in cases:
        answer = emulated.http.post(path, json=body, headers=KEY)
        assert answer.status_code == status, (path, body)
        assert answer.json()["detail" if status > 299 else "status"]


def test_rejected_callback_is_retried(start: Start, mailbox: Mailbox) -> None:
    emulated = start(time_scale=0.0001)
    body = {"input": {"prompt": "x"}, "webhook": mailbox.url}
    mailbox.statuses = [500, 404, 200]
    name = emulated.http.post(MODEL, json=body, headers=KEY).json()["id"]
    assert [each["status_code"] for each in emulated.attempts(name, 3)] == [500, 404, 200]
