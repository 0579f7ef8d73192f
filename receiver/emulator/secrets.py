"""The secret of an account, with which a provider signs its callbacks."""

from __future__ import annotations

import base64
import hmac
import random
from collections.abc import Callable

_BYTES = 24
_PREFIX = "whsec_"


def standard(secret: str, message_id: str, at: int, body: bytes) -> str:
    """Return the signature by Standard Webhooks."""
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    digest = hmac.digest(key, f"{message_id}.{at}.".encode() + body, "sha256")
    return f"v1,{base64.b64encode(digest).decode()}"


class AccountSecret:
    """The secret that the account sees, and a wrong one for forged signatures."""

    def __init__(
        self, rng: random.Random, sign: Callable[[str, str, int, bytes], str] = standard
    ) -> None:
        self._rng = rng
        self._sign = sign
        self.shown = self._new()
        """The secret in the form that the provider shows to the account."""
        self._wrong = self._new()

    def rotate(self) -> None:
        """Replace the secret by a new one."""
        self.shown = self._new()

    def headers(
        self, message_id: str, at: int, body: bytes, *, forged: bool = False
    ) -> dict[str, str]:
        """Return the three headers that prove a body; a forged one is signed by another secret."""
        secret = self._wrong if forged else self.shown
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(at),
            "webhook-signature": self._sign(secret, message_id, at, body),
        }

    def _new(self) -> str:
        return _PREFIX + base64.b64encode(self._rng.randbytes(_BYTES)).decode()
