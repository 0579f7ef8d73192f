"""Callback tokens and per-prediction secrets, both derived from the secret keys (itsdangerous).

Nothing is stored, so a restart, a lost answer or a second process changes nothing. The newest key
signs; every key of the list verifies. To rotate, put a new key in front, and drop the old one when
its predictions have ended. If several processes share the callbacks, first put the new key at the
end of all their lists, so that no process signs what another would refuse.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from functools import cache
from typing import Final

from itsdangerous.signer import Signer, SigningAlgorithm

from receiver.model.errors import Unproved

_LONGEST_TOKEN: Final = 200
_ECHO_LIFE: Final = 60
"""Seconds by which the time of an echo may differ from ours, in both directions."""


class Tokens:
    """Signs and verifies tokens; `keys` are the texts of RECEIVER_SECRET_KEY, newest first."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._callback = cache(lambda provider: _signers(keys, f"callback/{provider}"))
        self._webhook_secret = _signers(keys, "webhook-secret")
        self._wake = _signers(keys, "wake")
        self._echo = list(zip(_signers(keys, "echo"), _signers(keys, "echo-answer"), strict=True))

    def callback(self, provider: str, prediction_id: str) -> str:
        """Make the unguessable last part of a callback URL."""
        return self._callback(provider)[0].sign(prediction_id).decode()

    def open_callback(self, provider: str, token: str) -> str:
        """Return the prediction id that `token` names, or raise Unproved.

        The whole text is compared, so that no other spelling of a signature is valid.
        """
        prediction_id, given = _signed(token)
        if not any(
            hmac.compare_digest(signer.sign(prediction_id), given)
            for signer in self._callback(provider)
        ):
            raise Unproved("bad_token")
        return prediction_id

    def webhook_secrets(self, prediction_id: str) -> list[bytes]:
        """Return every secret that a provider may present for this prediction, newest first."""
        return [signer.get_signature(prediction_id) for signer in self._webhook_secret]

    def wake(self) -> str:
        """Make the unguessable last part of the URL that drains."""
        return self._wake[0].sign("wake").decode()

    def is_wake_token(self, token: str) -> bool:
        given = token.encode("utf-8", "replace")
        # Every key is compared, so that the time taken does not show which one was nearly right.
        return any([hmac.compare_digest(each.sign("wake"), given) for each in self._wake])  # noqa: C419

    def echoes(self, now: float) -> list[str]:
        """Return an echo token for each key, newest first: a server with that key can answer it."""
        stamp = f"{int(now)}-{secrets.token_hex(8)}"
        return [signer.sign(stamp).decode() for signer, _ in self._echo]

    def answer_echo(self, token: str, digest: str, now: float) -> str:
        """Return a signature of `token` and a digest of what came with it, by the key of `token`.

        Raises Unproved, also for a token that is too old. Until then, anyone who sees a token can
        use it, but an answer is of use only for this comparison.
        """
        stamp, given = _signed(token)
        for signer, answers in self._echo:
            if hmac.compare_digest(signer.sign(stamp), given):
                if abs(now - int(stamp.partition("-")[0])) > _ECHO_LIFE:
                    raise Unproved("stale_token")
                return answers.get_signature(f"{token}/{digest}").decode()
        raise Unproved("bad_token")


def _signed(token: str) -> tuple[str, bytes]:
    """Return the text that a token seems to sign, and the token's bytes, or raise Unproved."""
    text, dot, _ = token.partition(".")
    if not dot or len(token) > _LONGEST_TOKEN or not token.isascii():
        raise Unproved("bad_token")
    return text, token.encode()


def _signers(keys: Sequence[str], salt: str) -> list[Signer]:
    return [_signer(key, f"receiver/{salt}") for key in keys]


def _signer(key: str, salt: str) -> Signer:
    """Return a signer with its key derived now; otherwise each signature would derive it again."""
    derived = Signer(key, salt=salt, digest_method=hashlib.sha256).derive_key()
    return Signer(derived, salt=salt, key_derivation="none", algorithm=_Keyed(derived))


class _Keyed(SigningAlgorithm):
    """HMAC-SHA256 that processes its key once: that is half the work for texts as short as ours."""

    def __init__(self, key: bytes) -> None:
        self._begun = hmac.new(key, digestmod="sha256")

    def get_signature(self, key: bytes, value: bytes) -> bytes:  # noqa: ARG002 - it has its key
        mac = self._begun.copy()
        mac.update(value)
        return mac.digest()
