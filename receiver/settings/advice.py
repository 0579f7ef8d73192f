"""Warnings of likely mistakes in the settings, one sentence each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from receiver.model.text import did_you_mean
from receiver.providers import DECLARED
from receiver.providers.adapter import can_prove
from receiver.settings import Settings, all_settings

_FROM_KUBERNETES: Final = re.compile(
    r"RECEIVER_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)"
)
"""Variables that Kubernetes sets in every pod if there is a service called `receiver`."""
_CHATS: Final = {"slack-in", "discord-in", "telegram-in"}
"""Handlers through which people order by recipes."""
SET_A_KEY: Final = f"to submit, set one of {', '.join(each.key for each in DECLARED.values())}"


def unknown_names(env: Mapping[str, str], known: Collection[str], *prefixes: str) -> Iterator[str]:
    """Yield the variables that begin like our settings, but are not settings."""
    for name in sorted(env):
        if name.startswith(prefixes) and name not in known and not _FROM_KUBERNETES.fullmatch(name):
            yield name


def misspelled(env: Mapping[str, str]) -> list[str]:
    """Return a problem for each variable that begins like our settings, but is not a setting."""
    known = {name for each in all_settings() for name in each.names}
    return [
        f"{name} is not a setting{did_you_mean(name, known, cutoff=0.75)}"
        for name in unknown_names(env, known, "RECEIVER_")
    ]


def warnings(settings: Settings, handlers: Collection[str] = ()) -> list[str]:
    """Return the likely mistakes in the settings, with these handlers."""
    found = []
    if settings.public_url is None:
        found.append(
            "RECEIVER_PUBLIC_URL is not set: outcomes come by stream and poll only, no callbacks"
        )
    on = _with_keys(settings)
    if not on:
        found.append(f"no provider has a key: {SET_A_KEY}")
    if not settings.api_keys and not settings.dev:
        found.append("RECEIVER_API_KEYS is not set: every /v1 route answers 401")
    return [
        *found,
        *_without_proof(settings, on),
        *short_lived(settings, handlers),
        *nothing_to_order(settings, handlers),
    ]


def _with_keys(settings: Settings) -> list[str]:
    """Return the providers that have a key."""
    return [name for name, given in settings.providers.items() if given.key is not None]


def _without_proof(settings: Settings, on: Collection[str]) -> Iterator[str]:
    adapters = settings.adapters()
    for name in on:
        can = can_prove(adapters[name], settings.providers[name].secrets)
        if not can and (secret := DECLARED[name].secret):
            yield f"{secret} is not set: outcomes of {name} come by poll only, no callbacks"


def nothing_to_order(settings: Settings, handlers: Collection[str]) -> list[str]:
    """Return a warning if there are chats in which no person can order anything."""
    chats = ", ".join(sorted(_CHATS & set(handlers)))
    if not chats or (settings.recipes.recipes and settings.recipes.allow):
        return []
    missing = "no [[allow]]" if settings.recipes.recipes else "no recipe"
    return [f"nobody can order anything by {chats}: RECEIVER_RECIPES has {missing}"]


def short_lived(settings: Settings, handlers: Collection[str]) -> Iterator[str]:
    """Yield a warning for providers whose results expire within minutes, if `save` is not served.

    A provider with another URL than its own is a stand-in, without a warning.
    """
    for name in _with_keys(settings) if "save" not in handlers else ():
        seconds = DECLARED[name].results_live
        if seconds is not None and settings.providers[name].urls == DECLARED[name].urls:
            yield f"results of {name} are gone after {seconds / 60:.0f} minutes: serve `save` too"
