"""Signed texts and encrypted JSON: whose they are, for how long, and over a change of keys."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.model.errors import Unproved
from receiver.model.sealing import Seals
from tests.receiving import Clock

OLD, NEW = "the-old-key-of-the-receiver-1234", "the-new-key-of-the-receiver-5678"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=100))
def test_whatever_is_signed_is_opened(value: str) -> None:
    assert Seals([NEW]).open(Seals([NEW]).sign(value, "a"), "a", 60) == value


def test_a_signed_text_fits_into_the_smallest_of_buttons() -> None:
    """Telegram's has 64 bytes; an id without its prefix, in base64, has 22."""
    assert len(Seals([NEW]).sign("x" * 40, "button")) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text + "x",
        lambda text: text[:-1],
        lambda text: "y" + text[1:],
        lambda text: text.replace(".", ":"),
        lambda _: "",
        lambda _: ".",
        lambda _: "é.é.é",
        lambda _: "\ud800.a.b",
        lambda _: "x" * 100_000,
    ],
)
def test_what_was_changed_is_not_opened(change: Any) -> None:
    seals = Seals([NEW])
    with pytest.raises(Unproved, match="bad_signature"):
        seals.open(change(seals.sign("again", "button")), "button")


def test_a_signature_is_for_one_purpose_and_for_a_time() -> None:
    clock = Clock()
    seals = Seals([NEW], clock)
    text = seals.sign("again", "button")
    with pytest.raises(Unproved, match="bad_signature"):
        seals.open(text, "link")
    clock.ahead = 59
    assert seals.open(text, "button", 60) == "again"
    for seconds in (62, -10):
        clock.ahead = seconds
        with pytest.raises(Unproved, match="stale"):
            seals.open(text, "button", 60)
    assert seals.open(text, "button") == "again"


def test_a_key_is_changed_by_putting_a_new_one_in_front() -> None:
    before, during, after = Seals([OLD]), Seals([NEW, OLD]), Seals([NEW])
    text, sealed = before.sign("again", "button"), before.seal({"a": [1]})
    assert during.open(text, "button") == "again"
    assert during.unseal(sealed) == {"a": [1]}
    assert after.open(during.sign("again", "button"), "button") == "again"
    assert after.unseal(during.seal({"a": [1]})) == {"a": [1]}
    with pytest.raises(Unproved):
        after.open(text, "button")
    assert after.unseal(sealed) == {}
    assert during.secrets("shop") == [*after.secrets("shop"), *before.secrets("shop")]
    assert before.secrets("shop") != before.secrets("other")


def test_what_is_sealed_shows_nothing_and_is_made_anew_each_time() -> None:
    seals = Seals([NEW])
    one, two = seals.seal({"token": "sealing-wax"}), seals.seal({"token": "sealing-wax"})
    assert one != two
    assert b"sealing" not in one
    assert seals.unseal(one[:-4] + b"AAAA") == {}
    assert seals.unseal(None) == seals.unseal("no token") == {}


@pytest.mark.parametrize(
    "value",
    [{"a": "x" * 16_384}, {"a": object()}, {1j: 1}, 3],
    ids=["large", "object", "key", "number"],
)
def test_what_is_too_large_or_no_json_is_refused(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Seals([NEW]).seal(value)
