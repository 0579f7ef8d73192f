"""The two families of signed callbacks: HMAC with a shared secret, and Ed25519 with public keys.

An adapter specifies the signed headers and the form of the signature; the checks are the same for
all. Any invalid callback raises Unproved, and bytes are compared, never numbers or text.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from base64 import urlsafe_b64decode
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

from receiver.model.errors import Unproved, Unreadable
from receiver.providers.adapter import Callback
from receiver.providers.parsing import decode_object, first_text, identifier

if TYPE_CHECKING:  # imported on first use, as not every provider needs it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

TOLERANCE: Final = 300
"""Seconds by which a signature's time may differ from ours, in both directions."""
_LONGEST_TIMESTAMP: Final = 12
_VERIFYING_KEYS: Final[set[bytes]] = set()
"""Public keys that have verified a signature: they are tried first, as each try takes 100 us."""
_KEY_BYTES: Final = 32
_SIGNATURE_DIGITS: Final = 128


def check_time(stamp: bytes, now: float) -> None:
    """Raise Unproved for a time that is malformed, or not within TOLERANCE of now."""
    # Digits only: int() would also take signs, blanks, underscores and other scripts' digits.
    if not stamp.isdigit() or len(stamp) > _LONGEST_TIMESTAMP:
        raise Unproved("bad_timestamp")
    if abs(now - int(stamp)) > TOLERANCE:
        raise Unproved("stale_timestamp")


# --- HMAC ---


def as_text(secret: bytes) -> bytes:
    """Return a secret as it is."""
    return secret


WHSEC: Final = "whsec_"
"""The prefix of the secrets of Standard Webhooks."""


def after_prefix(secret: bytes) -> bytes:
    """Return the text of a secret without its `whsec_`."""
    return secret.removeprefix(WHSEC.encode())


def decoded(secret: bytes) -> bytes:
    """Decode the base64 after `whsec_`; return an empty key, which proves nothing, if invalid."""
    try:
        return base64.b64decode(after_prefix(secret), validate=True)
    except ValueError:
        return b""


def read_whsec(secret: Any) -> list[bytes]:
    """Return the secret that a provider shows to an account, or raise Unreadable."""
    text = first_text(secret)
    if not text.startswith(WHSEC):
        raise Unreadable("no secret")
    return [text.encode()]


def as_hex(digest: bytes) -> bytes:
    return digest.hex().encode()


class Hmac(msgspec.Struct, frozen=True, kw_only=True):
    """A provider's form of HMAC-SHA256 signatures; the defaults are Standard Webhooks."""

    header: bytes = b"webhook-signature"
    """Contains the signature, or several separated by blanks while a secret is rotated."""
    covers: tuple[bytes, ...] = (b"webhook-id", b"webhook-timestamp")
    """The headers that are signed before the body, in order; the last is the time."""
    own_time: bool = False
    """True if the time is before the signature in its header, as `t=1767225600,`."""
    joiner: bytes = b"."
    label: bytes = b"v1,"
    """The prefix of each signature."""
    write: Callable[[bytes], bytes] = base64.b64encode
    key: Callable[[bytes], bytes] = decoded
    """Derives the key from a secret."""

    def verify(self, callback: Callback, *, now: float, keys: Sequence[bytes]) -> None:
        """Raise Unproved unless one of the secrets signed the callback, and any time is recent."""
        given = callback.header(self.header)
        covered = [callback.header(name) for name in self.covers]
        if self.own_time:
            time, comma, given = given.partition(b",")
            if not comma or not time.startswith(b"t="):
                raise Unproved("bad_timestamp")
            covered = [time.removeprefix(b"t=")]
        if covered:
            check_time(covered[-1], now)
        signed = self.joiner.join([*covered, callback.body])
        offered = self._offered(given)
        right = [
            self.write(hmac.digest(key, signed, "sha256")) for key in map(self.key, keys) if key
        ]
        # All are compared, so that the duration does not reveal which one nearly matched.
        if not any([hmac.compare_digest(one, other) for one in offered for other in right]):  # noqa: C419
            raise Unproved("bad_signature")

    def _offered(self, given: bytes) -> list[bytes]:
        """Return the signatures with our label; raise Unproved if any part of the header is odd.

        So a valid signature has only one valid spelling.
        """
        entries = given.split(b" ")
        if len(entries) > _MOST_SIGNATURES or not all(map(_ENTRY.fullmatch, entries)):
            raise Unproved("bad_signature")
        return [each[len(self.label) :] for each in entries if each.startswith(self.label)]


_ENTRY: Final = re.compile(rb"\w+[,=][A-Za-z0-9+/_-]{1,200}={0,2}")
_MOST_SIGNATURES: Final = 10


# --- Ed25519 ---


def verify_ed25519(
    callback: Callback, prefix: bytes, id_header: bytes, *, now: float, keys: Sequence[bytes]
) -> str:
    """Return the id that a signature over id, user, time and body covers, or raise Unproved.

    Every key is tried, as no header that names one can be trusted.
    """
    stamp = callback.header(prefix + b"timestamp")
    check_time(stamp, now)
    signature = _signature(callback.header(prefix + b"signature"))
    named = callback.header(prefix + id_header)
    digest = hashlib.sha256(callback.body).hexdigest().encode()
    message = b"\n".join((named, callback.header(prefix + b"user-id"), stamp, digest))
    likely = sorted(keys, key=lambda key: key not in _VERIFYING_KEYS)
    signed_by = next((key for key in likely if _verifies(key, signature, message)), None)
    if signed_by is None:
        raise Unproved("bad_signature")
    _VERIFYING_KEYS.add(signed_by)
    proved_id = identifier(named.decode("latin-1"))
    if proved_id is None:
        raise Unproved("bad_request_id")
    return proved_id


def read_jwks(body: bytes) -> list[bytes]:
    """Return the Ed25519 keys of a JWKS as raw bytes; `x` may be padded, other keys are ignored."""
    keys = decode_object(body).get("keys")
    texts = (
        [key.get("x") for key in keys if isinstance(key, dict)] if isinstance(keys, list) else []
    )
    return [raw for raw in map(_raw_key, texts) if raw]


def _signature(text: bytes) -> bytes:
    if len(text) != _SIGNATURE_DIGITS:
        raise Unproved("bad_signature")
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        raise Unproved("bad_signature") from None


@lru_cache(maxsize=64)
def _public_key(raw: bytes) -> Ed25519PublicKey:
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415 - see above

    return ed25519.Ed25519PublicKey.from_public_bytes(raw)


def _verifies(key: bytes, signature: bytes, message: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - see above

    try:
        _public_key(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


def _raw_key(text: Any) -> bytes | None:
    try:
        raw = urlsafe_b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4))
    except (AttributeError, ValueError):
        return None
    return raw if len(raw) == _KEY_BYTES else None
