"""The declaration of a provider: its settings, and how its adapter is made from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import httpx
import msgspec

from receiver.providers.adapter import Network, Provider


class Api(msgspec.Struct, frozen=True):
    """The base URL of a provider, and the headers of every request to it."""

    base: str
    """Includes the declared `path`; has no trailing slash."""
    headers: Mapping[str, str]

    def get(self, path: str, **content: Any) -> httpx.Request:
        return self.call("GET", path, **content)

    def post(self, path: str, **content: Any) -> httpx.Request:
        return self.call("POST", path, **content)

    def call(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **content: Any
    ) -> httpx.Request:
        """Return a request for a path below the base, or for a complete URL that was checked."""
        url = self.base + path if path.startswith("/") else path
        return httpx.Request(method, url, headers={**self.headers, **(headers or {})}, **content)


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one provider, for its adapter."""

    key: str
    """Empty if none is set: the adapter then still proves and reads callbacks."""
    urls: Mapping[str, str]
    """As declared, or as configured; none ends in a slash or in the declared `path`."""
    admin_key: str
    """Empty if none is set, or none is declared."""
    confirm: bool
    clock: Callable[[], float]
    """For keys that expire."""

    def api(self, path: str = "", **key: str) -> Api:
        """Return the API at the base and `path`, with a bearer's key or the headers in `key`."""
        named = {name.replace("_", "-"): value for name, value in key.items()}
        held = named or {"Authorization": f"Bearer {self.key}"}
        headers = {**(held if self.key else {}), "Accept": "application/json"}
        return Api(self.urls["base"] + path, headers)


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """The declaration of a provider; `{}` stands for its name in capitals."""

    make: Callable[[Given], Provider]
    key: str
    """The environment variable of its API key, as named by its own SDK."""
    urls: Mapping[str, str]
    """The default URLs: `{}_BASE_URL` replaces `base`, `{}_JWKS_URL` replaces `jwks`."""
    example: str
    """An example model that every account may use."""
    path: str = ""
    """The path that an SDK adds to the base, as `/v1`: a configured base may include it."""
    secret: str = ""
    """The variable of an `account_secret`; several secrets by comma, newest first."""
    secret_begins: str = ""
    """The prefix that every valid secret has, as `whsec_`."""
    secret_headers: frozenset[bytes] = frozenset()
    """Headers of its callbacks that contain a secret: they are not recorded."""
    admin_key: str = ""
    """The variable of a key for billing, if the usual key is not enough."""
    max_in_flight: int | None = None
    """The default of `{}_MAX_IN_FLIGHT`."""
    requests_per_minute: int | None = None
    """The default of `{}_REQUESTS_PER_MINUTE`."""
    confirm: str = ""
    """The help of `{}_CONFIRM`, for a proof that does not cover the body; empty: no setting."""
    read_sources: Callable[[bytes], list[Network]] | None = None
    """Reads the addresses of its callbacks, which it publishes at `urls["meta"]`."""
    results_live: float | None = None
    """Seconds for which a result can be fetched; None: for a day or more."""
