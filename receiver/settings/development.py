"""The API key of `--dev`: made of the secret key, so that commands on the same machine find it.

Where a request comes from proves nothing: what a proxy or a tunnel on this machine passes on can
look exactly like a request of this machine.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path

from receiver.settings import Settings


def secret_file(settings: Settings) -> Path:
    """Name the file of a secret key that was made up."""
    return Path(f"{settings.sqlite_path}.dev-secret")


def api_key(secret: str) -> str:
    """Make the key that opens /v1 in development."""
    return hmac.new(secret.encode(), b"API key of --dev", hashlib.sha256).hexdigest()


def find_api_key(env: Mapping[str, str]) -> str | None:
    """Make it as a receiver does that runs with this environment, in this folder."""
    settings, _, _ = Settings.look({**env, "RECEIVER_DEV": "1"})
    if settings.secret_keys:
        return api_key(settings.secret_keys[0].reveal())
    try:
        return api_key(secret_file(settings).read_text())
    except (OSError, UnicodeError):
        return None
