"""`expect`: which HTTP responses of another service end a delivery, and which are retried."""

from __future__ import annotations

import httpx
import pytest

from receiver import Dead, Retry, expect


def answer(status: int, text: str = "", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, text=text, headers=named)


@pytest.mark.parametrize("status", [200, 201, 204])
def test_success_response_is_returned(status: int) -> None:
    given = answer(status)
    assert expect(given) is given


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 410, 422])
def test_permanent_error_status_raises_dead_with_status_and_body(status: int) -> None:
    with pytest.raises(Dead, match=f"HTTP {status}: no such channel"):
        expect(answer(status, "no such\n  channel"))


@pytest.mark.parametrize("status", [408, 423, 425, 429, 500, 502, 503])
def test_transient_error_status_raises_retry_without_a_delay(status: int) -> None:
    with pytest.raises(Retry, match=f"HTTP {status}") as raised:
        expect(answer(status))
    assert raised.value.after is None


@pytest.mark.parametrize(
    ("header", "seconds"), [("30", 30), ("1.5", 1.5), ("90000", 90000), ("0", None), ("x", None)]
)
def test_retry_after_header_of_429_sets_the_retry_delay(header: str, seconds: float | None) -> None:
    with pytest.raises(Retry) as raised:
        expect(answer(429, retry_after=header))
    assert raised.value.after == seconds


def test_caller_can_override_final_statuses_and_the_retry_delay() -> None:
    with pytest.raises(Retry) as raised:
        expect(answer(404, retry_after="9"), final={410}, after=2.5)
    assert raised.value.after == 2.5
    with pytest.raises(Dead):
        expect(answer(500), final={500})


def test_long_error_body_is_truncated_in_the_message() -> None:
    with pytest.raises(Dead) as raised:
        expect(answer(400, "x" * 10_000))
    assert len(str(raised.value)) < 250
