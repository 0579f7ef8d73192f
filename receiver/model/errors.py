"""Errors that cross modules, sorted by what their catcher must do.

ReceiverError
├── SettingsError         the operator fixes the environment (all problems at once)
├── HandlerError          the operator fixes a handler file (with file and line)
├── StoreUnusable         the operator fixes the database (in use, too new, not a database)
├── StoreUnavailable      come back later: nothing was written (503)
├── KeysUnavailable       come back later: a provider's public keys cannot be fetched (503)
├── SourcesUnavailable    come back later: its address ranges cannot be fetched (503)
├── Unproved              refuse: not shown to come from the provider (401)
├── Unreadable            proved, but not understood: keep it and ask the provider
│   └── TooLarge          over the limit: another request would get the same
└── Problem               the caller of /v1 fixes the request (RFC 9457)
    └── Limited           come back later: too many requests (429)
"""

from __future__ import annotations

import math
from collections.abc import Sequence


class ReceiverError(Exception):
    """The base class of the errors that the receiver raises on purpose."""


class SettingsError(ReceiverError):
    """All problems of the environment, in one message."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(["Invalid settings:", *(f"  - {p}" for p in problems)]))
        self.problems = tuple(problems)


class HandlerError(ReceiverError):
    """A handler was registered wrongly; the message starts with its file and line."""


class StoreUnusable(ReceiverError):
    """The database cannot be opened at all; the message says what to do."""


class StoreUnavailable(ReceiverError):
    """The database did not take the write (disk full, read-only, …); nothing was written."""


class KeysUnavailable(ReceiverError):
    """A provider's public keys could not be fetched, so nothing can be proved yet."""


class SourcesUnavailable(ReceiverError):
    """The addresses of a provider's callbacks could not be fetched, so none is accepted yet."""


class Unproved(ReceiverError):
    """A callback, or a request to a plugin's route, does not prove its sender.

    `reason` is one of a few fixed words, for logs and counters; it never quotes the request.
    """

    def __init__(self, reason: str = "unproved") -> None:
        super().__init__(reason)
        self.reason = reason


class Unreadable(ReceiverError):
    """Bytes that are proved to come from a provider, but that its adapter cannot read."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after
        """Seconds that the provider asks to wait (Retry-After); None if it does not."""


class TooLarge(Unreadable):
    """An answer over our limit; the message names the limit."""


class Problem(ReceiverError):
    """An answer to a caller of /v1 as problem details; `type` is one of a few stable names."""

    def __init__(
        self,
        status: int,
        type: str,
        detail: str,
        *,
        retry_after: int | None = None,
        prediction_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.type = type
        self.detail = detail
        self.retry_after = retry_after
        """Seconds."""
        self.prediction_id = prediction_id


class Limited(Problem):
    """There were too many requests: try again after `seconds`, a whole number."""

    def __init__(self, seconds: float) -> None:
        self.seconds = math.ceil(seconds)
        detail = f"too many requests; try again in {self.seconds} s"
        super().__init__(429, "rate-limited", detail, retry_after=self.seconds)
