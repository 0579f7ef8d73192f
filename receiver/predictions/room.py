"""Backpressure: how many submits a provider takes at the moment, learnt from its refusals.

It is not stored: a new process learns it with its first submits.
"""

from __future__ import annotations

from typing import Final

from receiver.observability.clock import Clock

QUIET: Final = 90.0
"""Seconds without a submit after a second refusal in a row: each new submit keeps Eachlabs full
(seen for minutes, with nothing in progress, until no submit was sent for so long)."""
LEARNT_FOR: Final = 600.0
"""Seconds after the last refusal until more submits are tried than were in flight then."""
LOCKED: Final = 60.0
"""Seconds between submits that test whether an account is still locked."""


class Room:
    """Whether a provider is full, or has locked our account: both hold for all submits."""

    def __init__(self, monotonic: Clock) -> None:
        self._now = monotonic
        self.locked = ""
        """The provider's message about the lock; empty if there is none."""
        self._most: int | None = None
        self._refused_at = float("-inf")
        self._is_refused = False
        """Whether the provider has taken no submit since the last refusal."""
        self._until = float("-inf")

    def wait(self) -> float:
        """Return for how many seconds nothing may be submitted."""
        return max(self._until - self._now(), 0.0)

    def at_once(self, most: int) -> int:
        """Return how many submits may be under way; one, as a test, if the account is locked."""
        return 1 if self.locked else most

    def in_flight(self, limit: int | None) -> int | None:
        """Return how many predictions may be in flight: `limit`, or fewer if refusals showed so."""
        if self._most is None or self._now() - self._refused_at > LEARNT_FOR:
            self._most = None
            return limit
        return self._most if limit is None else min(limit, self._most)

    def note_full(self, at_work: int, began: float, after: float | None) -> None:
        """Record that `at_work` fill the provider, by the refusal of a submit begun at `began`."""
        self._rest(after or 0.0)
        if self._is_refused and began > self._refused_at:
            self._rest(QUIET)
        at_work = max(at_work, 1)
        self._most = at_work if self._most is None else min(self._most, at_work)
        self._note_refusal()

    def note_lock(self, message: str) -> None:
        """Record that the provider has locked our account."""
        self.locked = message
        self._rest(LOCKED)
        self._note_refusal()

    def note_accepted(self, began: float) -> bool:
        """Record that a submit, begun at `began`, was taken; return whether that ended a lock."""
        if began < self._refused_at:
            return False
        self._is_refused = False
        was_locked, self.locked = bool(self.locked), ""
        return was_locked

    def _rest(self, seconds: float) -> None:
        self._until = max(self._until, self._now() + seconds)

    def _note_refusal(self) -> None:
        self._is_refused = True
        self._refused_at = self._now()
