"""A client of /v1 for the command line: RECEIVER_URL and RECEIVER_API_KEY say where and who."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from receiver.model.errors import ReceiverError
from receiver.settings.development import find_api_key

_HERE: Final = {"127.0.0.1", "::1", "localhost"}


class ClientError(ReceiverError):
    """The receiver refused, or could not be reached; the message is fit for a terminal."""


class Client:
    """Calls a running receiver; every method gives decoded JSON or raises ClientError."""

    def __init__(
        self, env: Mapping[str, str], transport: httpx.BaseTransport | None = None
    ) -> None:
        self._url = env.get("RECEIVER_URL", "http://127.0.0.1:8000").rstrip("/")
        key = env.get("RECEIVER_API_KEY", "")
        if not key and urlsplit(self._url).hostname in _HERE:
            key = find_api_key(env) or ""
        self._http = httpx.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=90.0,
            transport=transport,
        )

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Any:
        return self._call("GET", path, headers=headers)

    def post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        return self._call("POST", path, json=body, headers=headers)

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
                raise ClientError(_say(answer.status_code, _json(answer)))
            answer.raise_for_status()
            yield answer

    def close(self) -> None:
        self._http.close()

    def _call(self, method: str, path: str, **content: Any) -> Any:
        try:
            answer = self._http.request(method, path, **content)
            body = answer.json()
        except httpx.HTTPError as error:
            raise ClientError(
                f"no receiver answers at {self._url} ({error}): start one with `receiver serve`, "
                "or set RECEIVER_URL"
            ) from error
        except ValueError as error:
            raise ClientError(f"what answers at {self._url} is no receiver") from error
        if answer.is_error:
            raise ClientError(_say(answer.status_code, body))
        return body


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        return f"HTTP {answer.status_code}"


def _say(status: int, body: Any) -> str:
    detail = body.get("detail", body) if isinstance(body, dict) else body
    hint = (
        " (set RECEIVER_API_KEY; for one that runs with --dev, be in its folder and environment)"
        if status == httpx.codes.UNAUTHORIZED
        else ""
    )
    return f"{detail}{hint}"
