"""What a provider's file declares of it: its settings, and how its adapter is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import httpx
import msgspec

from receiver.providers.adapter import Network, Provider


class Api(msgspec.Struct, frozen=True):
    """Where a provider is reached, and what every request to it carries."""

    base: str
    """With the declared `path`, and no slash at its end."""
    headers: Mapping[str, str]

    def get(self, path: str, **content: Any) -> httpx.Request:
        return self.call("GET", path, **content)

    def post(self, path: str, **content: Any) -> httpx.Request:
        return self.call("POST", path, **content)

    def call(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **content: Any
    ) -> httpx.Request:
        """Build a request for a path below the base, or for a whole URL that was checked."""
        url = self.base + path if path.startswith("/") else path
        return httpx.Request(method, url, headers={**self.headers, **(headers or {})}, **content)


class Given(msgspec.Struct, frozen=True, kw_only=True):
    """What the settings say of one provider, for its adapter."""

    key: str
    """Empty where none is set: then the adapter still proves and reads callbacks."""
    urls: Mapping[str, str]
    """As declared, or as set; none ends in a slash or in the declared `path`."""
    admin_key: str
    """Empty where none is set, or none is declared."""
    confirm: bool
    clock: Callable[[], float]
    """For keys that expire."""

    def api(self, path: str = "", **key: str) -> Api:
        """Return the API at the base and `path`; its key is a bearer's, or in a header named so."""
        named = {name.replace("_", "-"): value for name, value in key.items()}
        held = named or {"Authorization": f"Bearer {self.key}"}
        headers = {**(held if self.key else {}), "Accept": "application/json"}
        return Api(self.urls["base"] + path, headers)


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """A provider, before anything is set; `{}` is its name in capitals."""

    make: Callable[[Given], Provider]
    key: str
    """The variable of its API key, as its own SDK calls it."""
    urls: Mapping[str, str]
    """Where it is reached: `base` is set by `{}_BASE_URL`, `jwks` by `{}_JWKS_URL`."""
    example: str
    """A model that anybody may try."""
    path: str = ""
    """What an SDK adds to the base, as `/v1`: a base that is set may have it or not."""
    secret: str = ""
    """`account_secret`: the variable that may hold it; several by comma, newest first."""
    secret_begins: str = ""
    """What a secret begins with, as `whsec_`: any other is a mistake."""
    secret_headers: frozenset[bytes] = frozenset()
    """Those of its callbacks that hold a secret: they are not kept with what is recorded."""
    admin_key: str = ""
    """The variable of a key for its bills, where the usual one is not enough."""
    max_in_flight: int | None = None
    """The default of `{}_MAX_IN_FLIGHT`."""
    requests_per_minute: int | None = None
    """The default of `{}_REQUESTS_PER_MINUTE`."""
    confirm: str = ""
    """The sentence of `{}_CONFIRM`, for a proof that does not cover the body; empty: no setting."""
    read_sources: Callable[[bytes], list[Network]] | None = None
    """Reads where its callbacks come from, as it publishes at `urls["meta"]`."""
    results_live: float | None = None
    """Seconds for which a result can be fetched; None: for a day or more."""
