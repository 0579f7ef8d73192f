"""Callback tokens and per-prediction secrets, both derived from the secret keys (itsdangerous).

Nothing here is stored: a restart, a lost answer or a second process changes nothing. Every key of
the list opens what it once signed; only the newest signs, so a key is rotated by putting a new one
in front and dropping the old one when its predictions have ended.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from functools import cache
from typing import Final

from itsdangerous import Signer

from receiver.errors import Unproved

_LONGEST_TOKEN: Final = 200


class Tokens:
    """Signs and opens; `keys` are the texts of RECEIVER_SECRET_KEY, newest first."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._callback = cache(lambda provider: _signers(keys, f"callback/{provider}"))
        self._webhook_secret = _signers(keys, "webhook-secret")

    def callback(self, provider: str, prediction_id: str) -> str:
        """Make the unguessable last part of a callback URL."""
        return self._callback(provider)[0].sign(prediction_id).decode()

    def open_callback(self, provider: str, token: str) -> str:
        """Give back the prediction id that `token` names, or raise Unproved.

        The whole text is compared, so that no second spelling of a signature is ever good.
        """
        prediction_id, dot, _ = token.partition(".")
        if not dot or len(token) > _LONGEST_TOKEN or not token.isascii():
            raise Unproved("bad_token")
        given = token.encode()
        if not any(
            hmac.compare_digest(signer.sign(prediction_id), given)
            for signer in self._callback(provider)
        ):
            raise Unproved("bad_token")
        return prediction_id

    def webhook_secrets(self, prediction_id: str) -> list[bytes]:
        """Give every secret that a provider may present for this prediction, newest first."""
        return [signer.get_signature(prediction_id) for signer in self._webhook_secret]


def _signers(keys: Sequence[str], salt: str) -> list[Signer]:
    return [_signer(key, f"receiver/{salt}") for key in keys]


def _signer(key: str, salt: str) -> Signer:
    """Derive the key for its one purpose now, as every signature would derive it again."""
    derived = Signer(key, salt=salt, digest_method=hashlib.sha256).derive_key()
    return Signer(derived, salt=salt, digest_method=hashlib.sha256, key_derivation="none")
