"""Signed texts and encrypted JSON: purpose, expiry, forgery and key rotation."""

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
def test_signed_text_can_be_opened(value: str) -> None:
    assert Seals([NEW]).open(Seals([NEW]).sign(value, "a"), "a", 60) == value


def test_signed_text_fits_into_a_telegram_button() -> None:
    """The button holds 64 bytes; an id without its prefix, in base64, has 22."""
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
def test_modified_signed_text_is_rejected(change: Any) -> None:
    seals = Seals([NEW])
    with pytest.raises(Unproved, match="bad_signature"):
        seals.open(change(seals.sign("again", "button")), "button")


def test_signature_is_valid_for_one_purpose_and_until_it_expires() -> None:
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


def test_key_rotation_accepts_the_old_key_until_it_is_removed() -> None:
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


def test_sealed_value_is_encrypted_and_differs_each_time() -> None:
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
def test_oversized_or_non_json_value_cannot_be_sealed(value: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        Seals([NEW]).seal(value)
