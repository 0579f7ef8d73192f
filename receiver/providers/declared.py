"""What a provider's file declares of it: its settings, and how its adapter is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from receiver.providers.adapter import Network, Provider


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
