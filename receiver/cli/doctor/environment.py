"""Check the environment: unknown names, invalid values, weak secrets.

No secret is shown, not even in part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final
from urllib.parse import unquote, urlsplit

from receiver.cli.doctor.findings import Finding, Findings, fail, ok, warn
from receiver.model.text import did_you_mean
from receiver.providers import NAMES
from receiver.settings import Caller, Secret, Settings, advice, all_settings

_OURS: Final = ("RECEIVER_", *(f"{name.upper()}_" for name in NAMES))
_KNOWN_MISTAKES: Final = {
    "FAL_KEY_ID": "fal's own client joins it with FAL_KEY_SECRET: set FAL_KEY to <id>:<secret>",
    "FAL_KEY_SECRET": "fal's own client joins it with FAL_KEY_ID: set FAL_KEY to <id>:<secret>",
}

_MAKE_ONE: Final = "make one by `openssl rand -hex 32`"
_PLACEHOLDERS: Final = (
    "changeme", "change-me", "change_me", "replace", "your-", "your_", "yoursecret", "example",
    "insert", "placeholder", "dummy", "password", "passw0rd", "letmein", "qwerty",
    "supersecret", "super-secret", "mysecret", "my-secret", "not-so-secret", "unsafe", "insecure",
)  # fmt: skip
_FEWEST: Final = 8
"""Fewest different characters; 32 random hexadecimal digits have fewer once in 10^9 cases."""
SHORTEST_API_KEY: Final = 16
_SHORTEST_HIDDEN: Final = 6
"""Characters; shorter secrets are not hidden, as they occur in ordinary words.

No check quotes a secret: hiding is a second safeguard.
"""


def check_settings(env: Mapping[str, str], settings: Settings, problems: list[str]) -> Findings:
    names = {name for each in all_settings() for name in each.names}
    findings = [_problem(problem) for problem in problems]
    findings += _unknown_names(env, names)
    if settings.dev:
        findings.append(
            warn(
                "RECEIVER_DEV is on: /v1 also takes a key derived from the secret key",
                "unset it where others can reach the receiver",
            )
        )
    return findings or [ok(f"all {sum(name in env for name in names)} are valid")]


def _problem(problem: str) -> Finding:
    what, colon, fix = problem.partition(": ")
    return fail(what, fix) if colon else fail(problem)


def _unknown_names(env: Mapping[str, str], known: Collection[str]) -> Iterator[Finding]:
    for name in advice.unknown_names(env, known, *_OURS):
        text = f"{name} is not a setting{did_you_mean(name, known, cutoff=0.75)}"
        yield warn(text, _KNOWN_MISTAKES.get(name, "correct or remove it: `receiver settings`"))


# --- secrets ---


def check_secrets(caller: Caller, settings: Settings) -> Findings:
    findings = [
        *_guessable(settings),
        *_rotation(settings),
        *_placeholders(settings),
        *_shared(_named(settings)),
        *_closed(caller, settings),
    ]
    if findings or not (settings.secret_keys or settings.dev):  # the missing key was reported
        return findings
    text = "made up by --dev"
    if settings.secret_keys:
        text = f"{len(settings.secret_keys)} secret key, {len(settings.api_keys)} API key(s)"
    return [ok(f"{text}: long, random, each for one purpose")]


def _ours(settings: Settings) -> dict[str, tuple[Secret, ...]]:
    """Return the secrets that the operator generates, by the names of their settings."""
    return {
        "RECEIVER_SECRET_KEY": settings.secret_keys,
        "RECEIVER_API_KEYS": settings.api_keys,
        "RECEIVER_VIEWER_KEYS": settings.viewer_keys,
        "CRON_SECRET": settings.cron_secrets,
    }


def _guessable(settings: Settings) -> Iterator[Finding]:
    for name, secrets in _ours(settings).items():
        for number, secret in enumerate(secrets, 1):
            place = f"number {number} of {name}" if len(secrets) > 1 else name
            if len(secret.reveal()) < SHORTEST_API_KEY:
                text = f"{place} has fewer than {SHORTEST_API_KEY} characters and can be guessed"
                yield (warn if settings.dev else fail)(text, _MAKE_ONE)
            elif reason := weakness(secret.reveal()):
                yield fail(f"{place} {reason}", _MAKE_ONE)


def _placeholders(settings: Settings) -> Iterator[Finding]:
    """Find providers' keys that look like placeholders; their strength is not checked."""
    for name, given in settings.providers.items():
        if given.key is not None and any(w in given.key.reveal().lower() for w in _PLACEHOLDERS):
            text = f"the key of {name} looks like a placeholder"
            yield fail(text, "set the one that the provider gave you, or none")


def weakness(text: str) -> str | None:
    """Return why a secret could be guessed, or None."""
    if any(word in text.lower() for word in _PLACEHOLDERS):
        return "looks like a placeholder"
    return "repeats a few characters" if len(set(text)) < _FEWEST else None


def _rotation(settings: Settings) -> Iterator[Finding]:
    number = len(settings.secret_keys)
    if number > 1:
        yield warn(
            f"a rotation is under way: RECEIVER_SECRET_KEY has {number} keys; the first signs, "
            "all are accepted",
            "remove the old one RECEIVER_PREDICTION_TIMEOUT "
            f"({settings.prediction_timeout:g} s) after the last process stopped signing with it",
        )


def _named(settings: Settings) -> list[tuple[str, Secret]]:
    """Return every secret with the name of its setting."""
    return [
        *((name, secret) for name, secrets in _ours(settings).items() for secret in secrets),
        *(
            (f"the key of {name}", given.key)
            for name, given in settings.providers.items()
            if given.key is not None
        ),
    ]


def _shared(named: list[tuple[str, Secret]]) -> Iterator[Finding]:
    places: dict[Secret, list[str]] = {}
    for name, secret in named:
        places.setdefault(secret, []).append(name)
    for names in places.values():
        if len(set(names)) > 1 and any(name.startswith("RECEIVER_") for name in names):
            text = f"{' and '.join(dict.fromkeys(names))} have the same value"
            yield fail(text, f"give each its own, so that one leak does not open both: {_MAKE_ONE}")


def _closed(caller: Caller, settings: Settings) -> Iterator[Finding]:
    taken = {*settings.api_keys, *settings.viewer_keys}
    if not settings.api_keys and not settings.dev:
        yield warn(
            "RECEIVER_API_KEYS is not set, and every /v1 route answers 401",
            f"set it to a key for your callers: {_MAKE_ONE}",
        )
    elif caller.key and taken and caller.key not in taken:
        yield warn(
            "RECEIVER_API_KEY, which commands use, is not one of RECEIVER_API_KEYS",
            "set it to one of them",
        )


def hide(text: str, settings: Settings, caller: Caller) -> str:
    """Replace every secret in a text, in case an error quotes one."""
    secrets = {secret.reveal() for _, secret in _named(settings)}
    secrets |= {caller.key.reveal()} if caller.key else set()
    urls = (settings.database_url, settings.migrate_url, caller.proxy)
    for url in (*urls, *settings.proxies.by_scheme.values()):
        password = urlsplit(url or "").password or ""
        secrets |= {password, unquote(password)}
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_HIDDEN:
            text = text.replace(secret, "…")
    return text
