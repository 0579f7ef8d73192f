"""A provider's signing keys: several are published, and no header identifies the one that signs."""

import base64
import hashlib
import random
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_PUBLISHED = 3


class Keyring:
    """A set of published keys, of which the last one signs."""

    def __init__(self, rng: random.Random, prefix: str, id_header: str) -> None:
        self._rng = rng
        self._prefix = prefix
        """The prefix of the headers' names."""
        self._id_header = id_header
        """The rest of the name of the header with the id."""
        self._keys = [self._new() for _ in range(_PUBLISHED)]
        self._wrong = self._new()

    def rotate(self) -> None:
        """Withdraw the signing key and sign with a new one."""
        self._keys = [*self._keys[: _PUBLISHED - 1], self._new()]

    def published(self, *, padded: bool) -> dict[str, Any]:
        keys = [_x(key, padded=padded) for key in self._keys]
        return {
            "keys": [
                {"kty": "OKP", "crv": "Ed25519", "use": "sig", "kid": f"k{n}", "x": x}
                for n, x in enumerate(keys)
            ]
        }

    def headers(
        self, named: str, account: str, at: int, body: bytes, *, forged: bool = False
    ) -> dict[str, str]:
        """Return the four headers that prove a body; a forged one is signed by another key."""
        key = self._wrong if forged else self._keys[-1]
        user_id = "user-" + hashlib.sha256(account.encode()).hexdigest()[:12]
        return {
            self._prefix + self._id_header: named,
            self._prefix + "user-id": user_id,
            self._prefix + "timestamp": str(at),
            self._prefix + "signature": key.sign(signed_text(named, user_id, at, body)).hex(),
        }

    def _new(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self._rng.randbytes(32))


def signed_text(request_id: str, user_id: str, at: int, body: bytes) -> bytes:
    return "\n".join([request_id, user_id, str(at), hashlib.sha256(body).hexdigest()]).encode()


def _x(key: Ed25519PrivateKey, *, padded: bool) -> str:
    text = base64.urlsafe_b64encode(key.public_key().public_bytes_raw()).decode()
    return text if padded else text.rstrip("=")
