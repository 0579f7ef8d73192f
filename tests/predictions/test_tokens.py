"""Callback tokens and webhook secrets: forged, malformed and foreign ones are rejected."""

from __future__ import annotations

import string
from itertools import product
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.model.errors import Unproved
from receiver.predictions.tokens import Tokens
from receiver.providers import NAMES

OLD: Final = "o" * 32
NEW: Final = "n" * 32
ID: Final = "pred_019b76da880000112233445566778899"
TOKEN: Final = Tokens([OLD]).callback("fal", ID)
ALPHABET: Final = string.ascii_letters + string.digits + "-_.=+/~ "


def refused(tokens: Tokens, token: str, provider: str = "fal") -> None:
    with pytest.raises(Unproved, match=r"^bad_token$"):
        tokens.open_callback(provider, token)


@pytest.mark.parametrize("provider", NAMES)
def test_token_opens_to_its_prediction_id(provider: str) -> None:
    tokens = Tokens([OLD])
    assert tokens.open_callback(provider, tokens.callback(provider, ID)) == ID


def test_token_is_one_path_segment_without_quoting() -> None:
    assert set(TOKEN) <= set(string.ascii_letters + string.digits + "-_.")
    assert len(TOKEN) <= 200


def test_every_key_opens_tokens_but_only_the_newest_signs() -> None:
    both = Tokens([NEW, OLD])
    assert both.open_callback("fal", TOKEN) == ID
    assert both.callback("fal", ID) == Tokens([NEW]).callback("fal", ID)
    assert both.open_callback("fal", both.callback("fal", ID)) == ID


def test_token_of_a_removed_key_is_rejected() -> None:
    refused(Tokens([NEW]), TOKEN)


def test_token_with_one_changed_character_is_rejected() -> None:
    tokens = Tokens([NEW, OLD])
    for position, other in product(range(len(TOKEN)), ALPHABET):
        if other != TOKEN[position]:
            refused(tokens, TOKEN[:position] + other + TOKEN[position + 1 :])


def test_token_with_an_added_or_missing_part_is_rejected() -> None:
    tokens = Tokens([OLD])
    for position in range(len(TOKEN) + 1):
        before, after = TOKEN[:position], TOKEN[position:]
        for more in "A.=_\n\x00":
            refused(tokens, before + more + after)
        for less in (before, after[1:], before + after[1:]):
            if less != TOKEN:
                refused(tokens, less)


@pytest.mark.parametrize(("mine", "other"), [(a, b) for a in NAMES for b in NAMES if a != b])
def test_token_of_another_provider_is_rejected(mine: str, other: str) -> None:
    tokens = Tokens([OLD])
    refused(tokens, tokens.callback(mine, ID), other)


def test_token_with_the_signature_of_another_prediction_is_rejected() -> None:
    tokens = Tokens([OLD])
    other = tokens.callback("fal", ID[:-1] + "0")
    refused(tokens, f"{ID}.{other.partition('.')[2]}")


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        ID,
        f"{ID}.",
        f".{TOKEN}",
        "é.é",
        f"{TOKEN}é",
        TOKEN.replace("p", "\uff50"),
        "\ud800.x",
        "%00.x",
        "a" * 201,
        f"{ID}.{'a' * 200}",
        "a." * 100_000,
        TOKEN.swapcase(),
    ],
)
def test_malformed_token_is_rejected(token: str) -> None:
    refused(Tokens([OLD]), token)


def test_token_over_the_longest_length_is_rejected() -> None:
    tokens = Tokens([OLD])
    longest = 200 - len(tokens.callback("fal", ""))
    assert tokens.open_callback("fal", tokens.callback("fal", "x" * longest))
    refused(tokens, tokens.callback("fal", "x" * (longest + 1)))


@settings(max_examples=100)
@given(token=st.text(max_size=220))
def test_random_text_is_rejected_as_a_token(token: str) -> None:
    refused(Tokens([OLD]), token)


def test_webhook_secret_depends_on_the_prediction_and_the_key() -> None:
    [old] = Tokens([OLD]).webhook_secrets(ID)
    [new] = Tokens([NEW]).webhook_secrets(ID)
    assert Tokens([NEW, OLD]).webhook_secrets(ID) == [new, old]
    assert Tokens([OLD]).webhook_secrets(ID + "0") != [old]
    assert len({old, new}) == 2


def test_webhook_secret_is_not_the_signature_in_the_callback_url() -> None:
    signatures = {Tokens([OLD]).callback(name, ID).partition(".")[2] for name in NAMES}
    [secret] = Tokens([OLD]).webhook_secrets(ID)
    assert secret.decode() not in signatures
    assert len(signatures) == len(NAMES)


def test_webhook_secret_is_long_and_valid_in_a_header() -> None:
    [secret] = Tokens([OLD]).webhook_secrets(ID)
    assert len(secret) >= 43  # 256 bits as base64
    assert set(secret.decode()) <= set(string.ascii_letters + string.digits + "-_")


def test_tokens_secrets_and_echo_answers_are_the_same_in_every_release() -> None:
    """A callback may return a token of an older release, and tokens are not stored."""
    tokens = Tokens(["a key of which every release makes the same"])
    one = "pred_0123456789abcd0123456789abcdef0123"
    assert tokens.callback("fal", one) == f"{one}.NbdKCWax2aCw9IP8CZ5tqBs5KlmQY57iZ6cOE2TU3YM"
    assert tokens.webhook_secrets(one) == [b"NgvuaYUOaWb5xdFUjFZ0lJvXTxcjYn9FfHJ9rGlKE_k"]
    echo = "1750000000-0123456789abcdef.dpSwvKzeeiZGDQLupXnAQlqsEb9ttYZ5MjH2rJMJa6w"
    answer = tokens.answer_echo(echo, "digest", 1_750_000_000.0)
    assert answer == "tKu1jD6FgtZTQRdsEsFCV13gG3NF3cbtqsOzGSvdcoI"
