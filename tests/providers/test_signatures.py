"""HMAC signatures of callbacks: the published ones of each form, and malformed ones."""

from __future__ import annotations

from typing import Final

import pytest

from receiver.model.errors import Unproved
from receiver.providers.adapter import Callback
from receiver.providers.signatures import Hmac, after_prefix, as_hex, as_text

NOW: Final = 1767225600.0
SECRET: Final = b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PICTURE: Final = (
    b'{"id":"rep0001","model":"google/nano-banana","version":"hidden","input":{"prompt":"a '
    b'lighthouse"},"logs":"","output":"https://replicate.delivery/xezq/abc/out.jpg","error":null,'
    b'"status":"succeeded","metrics":{"predict_time":7.5,"total_time":8.1}}'
)
VIDEO: Final = (
    b'{"type":"video.generation.completed","created_at":"2026-01-01T00:00:00.000Z","data":'
    b'{"id":"job_0001","status":"completed"}}'
)
RIGHT: Final = b"v1,sD/VtZOAYTKeOpfvcByCK5XY35Ztvb8aM/fHeBPH9zw="
STANDARD: Final = Hmac()
BODY_ALONE: Final = Hmac(
    header=b"x-bfl-signature", covers=(), label=b"sha256=", write=as_hex, key=as_text
)
HEX_V3: Final = Hmac(label=b"v3,", write=as_hex, key=after_prefix)
IN_ONE_HEADER: Final = Hmac(
    header=b"x-openrouter-signature",
    covers=(),
    own_time=True,
    joiner=b",",
    label=b"v1=",
    write=as_hex,
    key=as_text,
)


def called(body: bytes, **headers: bytes) -> Callback:
    given = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return Callback(list(given.items()), body, NOW)


def standard(body: bytes, signature: bytes, name: bytes = b"msg_0001") -> Callback:
    stamp = b"1767225600"
    return called(body, webhook_id=name, webhook_timestamp=stamp, webhook_signature=signature)


# As published by the providers, or signed by the libraries of Standard Webhooks.
VECTORS: Final[list[tuple[Hmac, bytes, Callback]]] = [
    (STANDARD, SECRET, standard(PICTURE, RIGHT)),
    (
        HEX_V3,
        b"whsec_abc123",
        standard(
            b'{"id":"t1","status":"failed","error":"no"}',
            b"v3,637bf6dff135265dcc5c77ec93dcb4f44dfd8a0e110eac0be93f9b1800350382",
            b"wh_2",
        ),
    ),
    (
        IN_ONE_HEADER,
        b"dev_secret",
        called(
            VIDEO,
            x_openrouter_signature=b"t=1767225600,v1="
            b"3afe3b46f14fad5a7350aefb4220562e2c06d72e5a829e14f6f5f02e2fddacde",
        ),
    ),
    (
        BODY_ALONE,
        b"s3cret",
        called(
            b'{"id":"t2","status":"Error","error":"content_policy_violation","message":"refused"}',
            x_bfl_signature=b"sha256="
            b"cbce8c9846a0ef73a4a5b22897ecb49c853f3e7c66657871ce42044573fd2e38",
        ),
    ),
]


@pytest.mark.parametrize(("scheme", "secret", "callback"), VECTORS)
def test_published_signatures_verify_only_with_their_secret_and_time(
    scheme: Hmac, secret: bytes, callback: Callback
) -> None:
    scheme.verify(callback, now=NOW, keys=[b"whsec_b2xk", secret])
    for keys in ([], [b""], [secret[:-1] + b"x"]):
        with pytest.raises(Unproved, match=r"^bad_signature$"):
            scheme.verify(callback, now=NOW, keys=keys)
    if scheme.covers or scheme.own_time:
        for seconds in (-301, 301):
            with pytest.raises(Unproved, match=r"^stale_timestamp$"):
                scheme.verify(callback, now=NOW + seconds, keys=[secret])


@pytest.mark.parametrize(
    "signature",
    [
        b"v1,aaaa " + RIGHT,  # while a secret is rotated, both secrets sign
        b" ".join([b"v1,aaaa"] * 9 + [RIGHT]),
        RIGHT + b" v1a,b3RoZXI=",
        RIGHT + b" v2,b3RoZXI=",
    ],
)
def test_one_valid_signature_among_several_is_enough(signature: bytes) -> None:
    STANDARD.verify(standard(PICTURE, signature), now=NOW, keys=[SECRET])


@pytest.mark.parametrize(
    "signature",
    [
        RIGHT.removeprefix(b"v1,"),
        RIGHT.replace(b"v1", b"v2"),
        RIGHT + b"=",
        RIGHT + b" ",
        b" ".join([b"v1,aaaa"] * 10 + [RIGHT]),
        RIGHT + b" what",
    ],
)
def test_signature_in_another_spelling_is_rejected(signature: bytes) -> None:
    with pytest.raises(Unproved, match=r"^bad_signature$"):
        STANDARD.verify(standard(PICTURE, signature), now=NOW, keys=[SECRET])


def test_v3_hex_and_standard_signatures_do_not_verify_each_other() -> None:
    _, secret, dialect = VECTORS[1]
    for scheme, callback, key in ((STANDARD, dialect, secret), (HEX_V3, VECTORS[0][2], SECRET)):
        with pytest.raises(Unproved, match=r"^bad_signature$"):
            scheme.verify(callback, now=NOW, keys=[key])


@pytest.mark.parametrize(
    "given", [b"v1=3afe", b"t=,v1=3afe", b"t=1767225600", b"x=1767225600,v1=3afe", b"t=+1,v1=3afe"]
)
def test_malformed_timestamp_inside_the_signature_is_rejected(given: bytes) -> None:
    callback = called(VIDEO, x_openrouter_signature=given)
    with pytest.raises(Unproved, match=r"^bad_timestamp$"):
        IN_ONE_HEADER.verify(callback, now=NOW, keys=[b"dev_secret"])
