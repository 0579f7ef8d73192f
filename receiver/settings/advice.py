"""What in the settings is likely a mistake, in a sentence each."""

from __future__ import annotations

from receiver.settings import Settings


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
