"""What another service's answer means for a delivery."""

from __future__ import annotations

import httpx
import pytest

from receiver import Dead, Retry, expect


def answer(status: int, text: str = "", **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, text=text, headers=named)


@pytest.mark.parametrize("status", [200, 201, 204])
def test_a_yes_is_given_back(status: int) -> None:
    given = answer(status)
    assert expect(given) is given


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 410, 422])
def test_a_no_is_final(status: int) -> None:
    with pytest.raises(Dead, match=f"HTTP {status}: no such channel"):
        expect(answer(status, "no such\n  channel"))


@pytest.mark.parametrize("status", [408, 423, 425, 429, 500, 502, 503])
def test_not_now_is_tried_again_by_the_policy(status: int) -> None:
    with pytest.raises(Retry, match=f"HTTP {status}") as raised:
        expect(answer(status))
    assert raised.value.after is None


@pytest.mark.parametrize(
    ("header", "seconds"), [("30", 30), ("1.5", 1.5), ("90000", 90000), ("0", None), ("x", None)]
)
def test_it_is_tried_again_when_the_answer_says_so(header: str, seconds: float | None) -> None:
    with pytest.raises(Retry) as raised:
        expect(answer(429, retry_after=header))
    assert raised.value.after == seconds


def test_the_caller_may_know_better() -> None:
    with pytest.raises(Retry) as raised:
        expect(answer(404, retry_after="9"), final={410}, after=2.5)
    assert raised.value.after == 2.5
    with pytest.raises(Dead):
        expect(answer(500), final={500})


def test_a_long_answer_is_cut() -> None:
    with pytest.raises(Dead) as raised:
        expect(answer(400, "x" * 10_000))
    assert len(str(raised.value)) < 250
