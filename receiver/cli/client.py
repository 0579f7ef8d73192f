"""The client of the command line, configured by RECEIVER_URL and RECEIVER_API_KEY."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar
from urllib.parse import urlencode, urlsplit

import httpx

from receiver.client import ClientError, Receiver
from receiver.client.operations import path_of
from receiver.client.steps import Steps
from receiver.model.errors import SettingsError
from receiver.settings import Caller
from receiver.settings.development import find_api_key
from receiver.settings.proxies import is_loopback
from receiver.settings.tls import trusted

__all__ = ["Client", "ClientError"]

T = TypeVar("T")

_NO_RETRIES: Final = 0.0
"""Seconds for retries: none, so that a command reports a missing receiver at once."""


class Client(Receiver):
    """A client of a running receiver, whose errors have hints for users of the command line.

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
        self._url = caller.url
        key = caller.key.reveal() if caller.key else None
        self._hint = "RECEIVER_API_KEY is not one of its RECEIVER_API_KEYS"
        if not key:
            self._hint = "set RECEIVER_API_KEY; for a receiver with --dev, run this in its folder"
        if not key and is_loopback(urlsplit(caller.url).hostname or ""):
            key = find_api_key(env)
        try:
            super().__init__(
                caller.url,
                key,
                patience=_NO_RETRIES,
                transport=transport,
                sleep=sleep,
                verify=trusted(),
                proxy=caller.proxy,
                trust_env=False,
            )
        except ClientError as error:
            raise SettingsError([f"RECEIVER_URL: {error}"]) from error

    def fetch(self, *parts: str, **params: Any) -> Any:
        """Return the JSON at a path of /v1; parameters that are None are left out."""
        given = urlencode({name: value for name, value in params.items() if value is not None})
        return self.call("GET", path_of(*parts) + (given and f"?{given}"))

    def send(self, *parts: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        """Post to a path of /v1; return the JSON of the answer."""
        return self.call("POST", path_of(*parts), body, headers)

    def run(self, steps: Steps[T]) -> T:
        with self._hinting():
            return super().run(steps)

    def iterate(self, steps: Steps[Any]) -> Iterator[Any]:
        with self._hinting():
            yield from super().iterate(steps)

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
        if error.detail == "Not Found" and self._url.endswith("/v1"):
            return f"{error.detail}: RECEIVER_URL must not end with /v1, which is added to it"
        if error.type == "no-receiver" and " redirects to " in error.detail:
            return f"{error.detail}, so set RECEIVER_URL"
        return None
