"""Signed texts and encrypted JSON, by keys derived from the secret keys.

Nothing here is stored. The newest key signs and encrypts; every key of the list verifies and
decrypts, so a key is rotated by putting a new one in front.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from hmac import digest
from typing import TYPE_CHECKING, Any, Final

import msgspec
from itsdangerous import BadSignature, SignatureExpired
from itsdangerous.signer import SigningAlgorithm
from itsdangerous.timed import TimestampSigner

from receiver.model.errors import Unproved

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

LARGEST_PRIVATE: Final = 16 * 1024
"""Bytes of JSON in the private content of one prediction."""
_SIGNATURE: Final = 12
"""Bytes: short, as a Telegram button has 64 in all, and a guess can only be tried on our server."""
_LONGEST: Final = 4096
_SHORTEST: Final = 8
"""Characters of the shortest private text that is hidden: shorter ones occur in other words."""


class Seals:
    """Signatures and encryption by the secret keys; `keys` are texts, newest first."""

    def __init__(self, keys: Sequence[str], clock: Callable[[], float] = time.time) -> None:
        self._keys = list(keys)
        self._clock = clock

    def sign(self, value: str, salt: str) -> str:
        """Return a text with its time and a signature, 24 characters longer; it stays readable.

        `salt` names the purpose: a signature for one purpose is invalid for any other.
        """
        return self._signer(salt).sign(value).decode()

    def open(self, text: str, salt: str, max_age: float | None = None) -> str:
        """Return the text that was signed at most `max_age` seconds ago, or raise Unproved."""
        if len(text) > _LONGEST:
            raise Unproved("bad_signature")
        try:
            given = text.encode()
            age = None if max_age is None else int(max_age)
            found = self._signer(salt).unsign(given, max_age=age)
            return found.decode()
        except SignatureExpired:
            raise Unproved("stale") from None
        except (BadSignature, UnicodeError):
            raise Unproved("bad_signature") from None

    def _signer(self, salt: str) -> _Signer:
        return _Signer(self._keys, f"receiver/plugin/{salt}", self._clock)

    def secrets(self, purpose: str) -> list[str]:
        """Return a secret for a purpose, 43 characters of base64url, for each key, newest first.

        It is for platforms that send us their secret back; none of them learns our keys.
        """
        made = [digest(key.encode(), purpose.encode(), "sha256") for key in self._keys]
        return [base64.urlsafe_b64encode(one).rstrip(b"=").decode() for one in made]

    def seal(self, value: Mapping[str, Any]) -> bytes:
        """Encrypt private content; raise ValueError if it is too large, or not JSON."""
        try:
            content = msgspec.json.encode(dict(value))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"private must be a JSON object: {error}") from None
        if len(content) > LARGEST_PRIVATE:
            raise ValueError(f"private has {len(content):,} bytes, more than {LARGEST_PRIVATE:,}")
        return self._fernet.encrypt(content)

    def unseal(self, sealed: bytes | str | None) -> dict[str, Any]:
        """Decrypt private content; empty if there is none, or none of our keys made it."""
        if not sealed:
            return {}
        from cryptography.fernet import InvalidToken  # noqa: PLC0415 - few predictions have any

        try:
            found = msgspec.json.decode(self._fernet.decrypt(sealed), type=dict[str, Any])
        except (InvalidToken, msgspec.MsgspecError):
            return {}
        return found

    @cached_property
    def _fernet(self) -> MultiFernet:
        from cryptography.fernet import Fernet, MultiFernet  # noqa: PLC0415 - see above
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

        def derived(key: str) -> Fernet:
            kdf = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"receiver/private")
            return Fernet(base64.urlsafe_b64encode(kdf.derive(key.encode())))

        return MultiFernet([derived(key) for key in self._keys])


def texts_in(value: Any) -> list[str]:
    """Return the texts of private content that must be hidden, the longest first."""
    found: set[str] = set()
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str) and len(item) >= _SHORTEST:
            found.add(item)
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list):
            left += item
    return sorted(found, key=len, reverse=True)


def hidden(text: str, private: Iterable[str]) -> str:
    """Return a text with private texts replaced by "…": an error may quote a private URL."""
    for each in private:
        text = text.replace(each, "…")
    return text


class _Short(SigningAlgorithm):
    """Truncated HMAC-SHA256."""

    def get_signature(self, key: bytes, value: bytes) -> bytes:
        return digest(key, value, "sha256")[:_SIGNATURE]


class _Signer(TimestampSigner):
    """A signer that uses the newest key, and our clock."""

    def __init__(self, keys: Sequence[str], salt: str, clock: Callable[[], float]) -> None:
        newest_last = list(reversed(keys))
        super().__init__(newest_last, salt=salt, digest_method=sha256, algorithm=_Short())
        self._clock = clock

    def get_timestamp(self) -> int:
        return int(self._clock())
