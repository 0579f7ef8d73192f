"""fal.ai's signature: what it covers, its format, and its timestamp."""

from __future__ import annotations

import hashlib
import json
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from receiver.model.errors import Unproved, Unreadable
from receiver.providers.adapter import Callback
from receiver.providers.fal import Fal
from receiver.providers.signatures import TOLERANCE
from tests.providers.samples import load, swapped

KEY: Final = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC: Final = KEY.public_key().public_bytes_raw()
NOW: Final = 1767225600.0
FAL: Final = Fal("key", *(f"https://{host}.fal.ai" for host in ("queue", "run", "rest", "api")))
GENUINE: Final = load()["fal", "proved"].called()
SIGNATURE: Final = dict(GENUINE.headers)[b"x-fal-webhook-signature"]


def signed(
    body: bytes = b"{}",
    stamp: bytes = b"1767225600",
    request_id: bytes = b"req-0001",
    user: bytes = b"user-42",
) -> Callback:
    """Sign as fal does, with any parts."""
    digest = hashlib.sha256(body).hexdigest().encode()
    signature = KEY.sign(b"\n".join([request_id, user, stamp, digest])).hex().encode()
    return Callback(
        [
            (b"x-fal-webhook-request-id", request_id),
            (b"x-fal-webhook-user-id", user),
            (b"x-fal-webhook-timestamp", stamp),
            (b"x-fal-webhook-signature", signature),
        ],
        body,
        NOW,
    )


def prove(callback: Callback, now: float = NOW) -> str:
    return FAL.authenticate(callback, now=now, keys=[PUBLIC])


def test_valid_signature_returns_the_request_id_that_it_covers() -> None:
    assert prove(signed(request_id=b"req-7")) == "req-7"


def test_request_id_of_any_bytes_is_returned_as_text() -> None:
    assert prove(signed(request_id=b"\xff")) == "ÿ"


def test_any_changed_byte_of_the_body_invalidates_the_signature() -> None:
    for position in range(len(GENUINE.body)):
        body = bytearray(GENUINE.body)
        body[position] ^= 1
        with pytest.raises(Unproved, match=r"^bad_signature$"):
            prove(Callback(GENUINE.headers, bytes(body), NOW))


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(json.loads(GENUINE.body), separators=(",", ":")).encode(),
        json.dumps(json.loads(GENUINE.body), indent=1).encode(),
        GENUINE.body + b"\n",
        b"",
        GENUINE.body * 10_000,
    ],
    ids=["packed", "indented", "with a line end", "empty", "huge"],
)
def test_same_json_in_other_bytes_is_rejected(body: bytes) -> None:
    with pytest.raises(Unproved, match=r"^bad_signature$"):
        prove(Callback(GENUINE.headers, body, NOW))


@pytest.mark.parametrize(
    "stamp",
    [
        b"",
        b" 1767225600",
        b"1767225600 ",
        b"\t1767225600",
        b"+1767225600",
        b"-1767225600",
        b"1_767_225_600",
        b"1767225600.0",
        b"1.7672256e9",
        b"0x6955b900",
        b"1767225600\x00",
        b"1,767,225,600",
        b"2026-01-01T00:00:00Z",
        b"inf",
        b"nan",
        "١٧٦٧٢٢٥٦٠٠".encode(),
        "\uff11\uff17\uff16\uff17\uff12\uff12\uff15\uff16\uff10\uff10".encode(),
        "1767225600²".encode("latin-1"),
        b"1" * 13,
        b"9" * 10_000,
    ],
)
def test_timestamp_that_is_not_plain_digits_is_rejected_even_if_signed(stamp: bytes) -> None:
    with pytest.raises(Unproved, match=r"^bad_timestamp$"):
        prove(signed(stamp=stamp))


@pytest.mark.parametrize("off", [-TOLERANCE - 1, TOLERANCE + 1, 86400, -86400, 10**9])
def test_timestamp_outside_the_tolerance_is_rejected_even_if_signed(off: int) -> None:
    with pytest.raises(Unproved, match=r"^stale_timestamp$"):
        prove(signed(), now=NOW + off)


@pytest.mark.parametrize("off", [-TOLERANCE, -1, 0, 0.5, TOLERANCE])
def test_timestamp_within_the_tolerance_is_accepted(off: float) -> None:
    assert prove(signed(), now=NOW + off) == "req-0001"


@pytest.mark.parametrize(
    "signature",
    [
        b"",
        SIGNATURE[:-1],
        SIGNATURE[:-2],
        SIGNATURE + b"00",
        b"0x" + SIGNATURE[:-2],
        b"g" * 128,
        b" " * 128,
        SIGNATURE[:-2] + b"  ",
        b" " + SIGNATURE[:-1],
        b"\xff" * 128,
        "٣".encode() * 64,
        b"0" * 128,
        b"f" * 128,
        bytes.fromhex(SIGNATURE.decode()) * 2,
    ],
)
def test_malformed_or_wrong_signature_is_rejected(signature: bytes) -> None:
    headers = swapped(GENUINE.headers, b"x-fal-webhook-signature", signature)
    with pytest.raises(Unproved, match=r"^bad_signature$"):
        prove(Callback(headers, GENUINE.body, NOW))


@pytest.mark.parametrize("key", [b"\x00" * 32, b"\xff" * 32, bytes(range(32))])
def test_invalid_public_key_is_skipped(key: bytes) -> None:
    with pytest.raises(Unproved, match=r"^bad_signature$"):
        FAL.authenticate(GENUINE, now=NOW, keys=[key])
    assert FAL.authenticate(GENUINE, now=NOW, keys=[key, PUBLIC]) == "req-0001"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"[" * 100_000])
def test_signature_is_verified_without_parsing_the_body(body: bytes) -> None:
    assert prove(signed(body)) == "req-0001"
    with pytest.raises(Unreadable):
        FAL.read(body)
