"""What in the settings is likely a mistake, in a sentence each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Final

from receiver.model.text import meant
from receiver.settings import Settings, all_settings

_OF_KUBERNETES: Final = re.compile(
    r"RECEIVER_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What it tells every pod of a service called `receiver`."""


def unread(env: Mapping[str, str], known: Collection[str], *prefixes: str) -> Iterator[str]:
    """Return the names that begin like ours and that nobody reads."""
    for name in sorted(env):
        if name.startswith(prefixes) and name not in known and not _OF_KUBERNETES.fullmatch(name):
            yield name


def misspelled(env: Mapping[str, str]) -> list[str]:
    """Say which settings nobody reads."""
    known = {name for each in all_settings() for name in each.names}
    return [
        f"nobody reads {name}{meant(name, known, cutoff=0.75)}"
        for name in unread(env, known, "RECEIVER_")
    ]


def warnings(settings: Settings) -> list[str]:
    found = []
    if settings.public_url is None:
        found.append(
            "RECEIVER_PUBLIC_URL is not set: outcomes come by stream and poll only, no callbacks"
        )
    if all(given.key is None for given in settings.providers.values()):
        found.append(
            "no provider has a key: set OXEN_API_KEY, EACHLABS_API_KEY or FAL_KEY to submit"
        )
    if not settings.api_keys and not settings.dev:
        found.append("RECEIVER_API_KEYS is not set: every /v1 route answers 401")
    return found
