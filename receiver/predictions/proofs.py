"""Callback verification, by the signature or the secret that the provider uses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final

import httpx

from receiver.model.errors import KeysUnavailable, Unproved
from receiver.observability.runtime import Runtime
from receiver.predictions.tokens import Tokens
from receiver.providers.adapter import Callback, Provider, Publishing
from receiver.providers.published import fixed, published_keys
from receiver.settings import ProviderSettings

Keys = Callable[[bool], Awaitable[Sequence[bytes]]]
"""Returns the keys of a provider's callbacks; True: fetched again, if that is allowed now."""

_FETCHED: Final = frozenset({"public_keys", "account_secret"})


class Proofs:
    """The keys of every provider: set, fetched from the provider, or derived by us."""

    def __init__(
        self,
        providers: Mapping[str, Provider],
        settings: Mapping[str, ProviderSettings],
        client: httpx.AsyncClient,
        tokens: Tokens,
        runtime: Runtime,
    ) -> None:
        self._providers = providers
        self._tokens = tokens
        self._clock = runtime.clock
        self._keys = {
            name: _keys_of(provider, settings[name], client, runtime)
            for name, provider in providers.items()
            if provider.proof in _FETCHED
        }

    async def prove(self, provider_name: str, prediction_id: str, callback: Callback) -> str | None:
        """Return the provider's id that the proof covers; raise Unproved or KeysUnavailable."""
        provider = self._providers[provider_name]
        now = self._clock()
        keys = self._keys.get(provider_name)
        if keys is None:
            secrets = self._tokens.webhook_secrets(prediction_id)
            return provider.authenticate(callback, now=now, keys=secrets)
        try:
            return provider.authenticate(callback, now=now, keys=await keys(False))
        except Unproved as error:
            if error.reason != "bad_signature":
                raise
        # The provider may have changed its keys: fetch them again, if that is allowed now.
        return provider.authenticate(callback, now=now, keys=await keys(True))

    async def fetch(self, names: Iterable[str]) -> None:
        """Fetch the keys of these providers before their first callback needs them."""
        await asyncio.gather(*(_tried(self._keys[name]) for name in names if name in self._keys))


def _keys_of(
    provider: Provider, given: ProviderSettings, client: httpx.AsyncClient, runtime: Runtime
) -> Keys:
    """Return how to get a provider's keys: from the settings, or fetched if there are none."""
    if given.secrets or not isinstance(provider, Publishing):
        return fixed([secret.reveal().encode() for secret in given.secrets])
    return published_keys(client, provider.keys, provider.read_keys, runtime.monotonic)


async def _tried(keys: Keys) -> None:
    with contextlib.suppress(KeysUnavailable):
        await keys(False)
