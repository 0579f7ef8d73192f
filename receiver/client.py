"""A client of /v1 for the command line: RECEIVER_URL and RECEIVER_API_KEY say where and who."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from receiver.model.errors import ReceiverError, SettingsError
from receiver.settings import Caller
from receiver.settings.development import find_api_key
from receiver.settings.proxies import is_loopback
from receiver.settings.tls import trusted


class ClientError(ReceiverError):
    """The receiver refused, or could not be reached; the message is fit for a terminal."""


class Client:
    """Calls a running receiver; every method gives decoded JSON or raises ClientError.

    To make one may raise SettingsError.
    """

    def __init__(
        self, env: Mapping[str, str], transport: httpx.BaseTransport | None = None
    ) -> None:
        caller = Caller.read(env)
        self._url = caller.url
        self._way = caller.way
        try:
            base = httpx.URL(self._url)
        except httpx.InvalidURL as error:
            raise SettingsError([f"RECEIVER_URL: {error}"]) from error
        key = caller.key.reveal() if caller.key else None
        self._hint = "RECEIVER_API_KEY is none of its RECEIVER_API_KEYS"
        if not key:
            self._hint = (
                "set RECEIVER_API_KEY; for one with --dev, be in its folder and environment"
            )
        if not key and is_loopback(base.host):
            key = find_api_key(env)
        self._http = httpx.Client(
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=90.0,
            verify=trusted(),
            proxy=caller.proxy,
            trust_env=False,
            transport=transport,
        )

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        return self._call("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        content = None if body is None else msgspec.json.encode(body)
        told = {} if body is None else {"Content-Type": "application/json"}
        return self._call("POST", path, content=content, headers={**told, **(headers or {})})

    @contextmanager
    def stream(
        self, path: str, params: Mapping[str, str], headers: Mapping[str, str], silence: float
    ) -> Iterator[httpx.Response]:
        """Open a stream that may be silent for so many seconds.

        Raises ClientError if it is refused for good, httpx.HTTPError where trying again may help.
        """
        timeout = httpx.Timeout(10.0, read=silence)
        with self._http.stream(
            "GET", path, params=params, headers=headers, timeout=timeout
        ) as answer:
            if answer.is_client_error and answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
                answer.read()
                raise ClientError(self._say(answer.status_code, _json(answer)))
            answer.raise_for_status()
            yield answer

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, **content: Any) -> Any:
        try:
            answer = self._http.request(method, path, **content)
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise ClientError(
                f"no receiver answers at {self._url} ({said}{self._way}): start one with "
                "`receiver serve`, or set RECEIVER_URL"
            ) from error
        try:
            body = answer.json()
        except ValueError as error:
            where = answer.headers.get("location") if answer.is_redirect else None
            sent = f"; it redirects to {where}, so set RECEIVER_URL" if where else ""
            raise ClientError(f"what answers at {self._url} is no receiver{sent}") from error
        if answer.is_error:
            raise ClientError(self._say(answer.status_code, body))
        return body

    def _say(self, status: int, body: Any) -> str:
        detail = body.get("detail", body) if isinstance(body, dict) else body
        hint = f" ({self._hint})" if status == httpx.codes.UNAUTHORIZED else ""
        return f"{detail}{hint}"


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return f"HTTP {answer.status_code}"
