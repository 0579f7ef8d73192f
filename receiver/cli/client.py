"""The client of the command line, configured by RECEIVER_URL and RECEIVER_API_KEY."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import httpx

from receiver.client import ClientError, Message, Receiver
from receiver.model.errors import SettingsError
from receiver.model.values import Status
from receiver.settings import Caller
from receiver.settings.development import find_api_key
from receiver.settings.proxies import is_loopback
from receiver.settings.tls import trusted

__all__ = ["Client", "ClientError"]

_NO_RETRIES: Final = 0.0
"""Seconds for retries: none, so that a command reports a missing receiver at once."""


class Client:
    """A client of a running receiver: `get` and `post` return decoded JSON or raise ClientError.

    Creating one may raise SettingsError.
    """

    def __init__(
        self,
        env: Mapping[str, str],
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        caller = Caller.read(env)
        self._way = caller.way
        try:
            host = httpx.URL(caller.url).host
        except httpx.InvalidURL as error:
            raise SettingsError([f"RECEIVER_URL: {error}"]) from error
        key = caller.key.reveal() if caller.key else None
        self._hint = "RECEIVER_API_KEY is not one of its RECEIVER_API_KEYS"
        if not key:
            self._hint = "set RECEIVER_API_KEY; for a receiver with --dev, run this in its folder"
        if not key and is_loopback(host):
            key = find_api_key(env)
        self._receiver = Receiver(
            caller.url,
            key,
            patience=_NO_RETRIES,
            transport=transport,
            sleep=sleep,
            verify=trusted(),
            proxy=caller.proxy,
            trust_env=False,
        )

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        with self._hinting():
            return self._receiver.call("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        with self._hinting():
            return self._receiver.call("POST", path, body, headers)

    def follow(self, after: int | None, **wanted: Any) -> Iterator[Message]:
        """Yield every message of the live stream, as `Receiver.changes` does."""
        with self._hinting():
            yield from self._receiver.changes(after, **wanted)

    def place(self) -> int | None:
        """Return the current place of the live stream, or None if the stream is not available."""
        with suppress(ClientError):
            return self._receiver.place()
        return None

    def wait(self, name: str, after: int | None, changed: Callable[[Status], None]) -> None:
        """Wait until a prediction ends; call `changed` with each status after the place `after`."""
        with self._hinting():
            self._receiver.wait(name, after=after, changed=changed)

    def close(self) -> None:
        self._receiver.close()

    @contextmanager
    def _hinting(self) -> Iterator[None]:
        """Add to a ClientError a hint for the user of the command line."""
        try:
            yield
        except ClientError as error:
            text = self._with_hint(error)
            if text is None:
                raise
            raise ClientError(error.type, text, status=error.status) from error

    def _with_hint(self, error: ClientError) -> str | None:
        if error.type == "unreachable":
            detail = error.detail.removesuffix(")")
            return f"{detail}{self._way}): start one with `receiver serve`, or set RECEIVER_URL"
        if error.status == httpx.codes.UNAUTHORIZED:
            return f"{error.detail} ({self._hint})"
        if error.type == "no-receiver" and " redirects to " in error.detail:
            return f"{error.detail}, so set RECEIVER_URL"
        return None
