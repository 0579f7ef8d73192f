"""The providers that exist: one line each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from receiver.providers.adapter import Provider
from receiver.providers.eachlabs import Eachlabs
from receiver.providers.fal import Fal
from receiver.providers.oxen import Oxen
from receiver.settings import ProviderSettings

_MAKERS: Final[dict[str, Callable[[str, ProviderSettings], Provider]]] = {
    "oxen": lambda key, s: Oxen(key, s.urls["base"]),
    "eachlabs": lambda key, s: Eachlabs(key, s.urls["base"], confirm=s.confirm),
    "fal": lambda key, s: Fal(
        key,
        s.urls["queue"],
        s.urls["run"],
        s.urls["api"],
        s.admin_key.reveal() if s.admin_key else None,
    ),
}

NAMES: Final = tuple(_MAKERS)


def make_providers(settings: Mapping[str, ProviderSettings]) -> dict[str, Provider]:
    """Make every adapter; one without a key can still prove and read callbacks."""
    return {
        name: make(given.key.reveal() if given.key else "", given)
        for name, make in _MAKERS.items()
        for given in [settings[name]]
    }
