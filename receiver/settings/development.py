"""The secrets of `--dev`: a secret key beside the database file, and an API key derived from it.

Commands on the same machine find the API key that way. The address of a request proves nothing: a
proxy or a tunnel on this machine passes on requests from anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from receiver.model.errors import StoreUnusable
from receiver.settings import SHORTEST_SECRET, ApiKey, Secret, Settings


def secret_file(settings: Settings) -> Path:
    """Return the path of the generated secret key."""
    return Path(f"{settings.sqlite_path}.dev-secret")


def api_key(secret: str) -> str:
    """Return the API key for /v1 in development."""
    return hmac.new(secret.encode(), b"API key of --dev", hashlib.sha256).hexdigest()


def with_secrets(settings: Settings) -> Settings:
    """Return the settings; in development missing secrets are generated.

    Raises StoreUnusable if that fails.
    """
    if not settings.dev:
        return settings
    secret_keys = settings.secret_keys or (_secret_key(settings),)
    key = ApiKey(api_key(secret_keys[0].reveal()))
    return replace(settings, secret_keys=secret_keys, api_keys=(*settings.api_keys, key))


def _secret_key(settings: Settings) -> Secret:
    """Read the secret key beside the database file; generate it at the first start.

    A new one at each start would refuse callbacks to URLs that an earlier one signed.
    """
    if settings.sqlite_path is None:
        raise StoreUnusable(
            "set RECEIVER_SECRET_KEY: processes that share PostgreSQL must share it too, and --dev "
            "makes one up for one process only"
        )
    path = secret_file(settings)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, secrets.token_hex(32), 0o600)  # the first of two processes wins
    text = path.read_text()
    if len(text) < SHORTEST_SECRET:
        raise StoreUnusable(f"{path} holds no secret: remove it, and start again")
    return Secret(text)


def write_new(path: Path, text: str, mode: int) -> bool:
    """Write a file whole or not at all, unless there is one; return whether it was written."""
    descriptor, part = tempfile.mkstemp(dir=path.parent)  # only we can read it
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            os.fchmod(descriptor, mode)
        with contextlib.suppress(FileExistsError):
            os.link(part, path)
            return True
        return False
    finally:
        Path(part).unlink()


def find_api_key(env: Mapping[str, str]) -> str | None:
    """Return the API key of a receiver that runs with this environment, in this folder."""
    settings, _ = Settings.parse({**env, "RECEIVER_DEV": "1"})
    if settings.api_keys:
        return settings.api_keys[0].reveal()
    if settings.secret_keys:
        return api_key(settings.secret_keys[0].reveal())
    try:
        return api_key(secret_file(settings).read_text())
    except (OSError, UnicodeError):
        return None
