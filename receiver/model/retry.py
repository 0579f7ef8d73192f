"""Retry policy: what follows a failed attempt, with exponential backoff and full jitter."""

from __future__ import annotations

from typing import Final, Literal

from receiver.model.values import Value


class Policy(Value, frozen=True, kw_only=True):
    """How often and how fast a handler is tried again."""

    attempts: int = 10
    base: float = 2.0
    """Seconds before the second attempt, at most."""
    cap: float = 3600.0
    """Seconds between two attempts, at most."""


FailureKind = Literal["error", "timeout", "lost", "retry", "skip", "dead"]


class Failure(Value, frozen=True, kw_only=True):
    """How an attempt ended when it did not succeed."""

    kind: FailureKind
    """`lost`: the process that ran it is gone, and what it did is not known."""
    reason: str = ""
    after: float | None = None
    """Seconds the handler asked to wait; None leaves it to the policy."""


class Decision(Value, frozen=True, kw_only=True):
    """The state of a delivery after an attempt."""

    state: Literal["pending", "done", "skipped", "dead"]
    delay: float = 0.0
    """Seconds until the next attempt; only for `pending`."""
    reason: str = ""


LOSSES: Final = 3
"""A lost attempt makes a delivery dead at this number, or at the policy's if that is higher."""


LONGEST_DELAY: Final = 7 * 86400.0


DONE: Final = Decision(state="done")


def backoff(attempt: int, base: float, cap: float, chance: float) -> float:
    """Return the seconds to wait after the 1-based `attempt`: exponential, with full jitter.

    `chance` is uniform in [0, 1). The result is never above `cap`.
    """
    return chance * min(cap, base * 2.0 ** min(attempt - 1, 64))


def decide(attempt: int, failure: Failure, policy: Policy, chance: float) -> Decision:
    """Return what follows a failed attempt, for every kind of failure."""
    match failure.kind:
        case "skip":
            return Decision(state="skipped", reason=failure.reason)
        case "dead":
            return Decision(state="dead", reason=failure.reason)
        case "lost":
            if attempt >= max(policy.attempts, LOSSES):
                return Decision(state="dead", reason=failure.reason)
            return Decision(state="pending", reason=failure.reason)
    if attempt >= policy.attempts:
        return Decision(state="dead", reason=failure.reason)
    if failure.after is None:
        delay = backoff(attempt, policy.base, policy.cap, chance)
    else:
        # In this order nan, which compares false with everything, ends as 0.
        delay = min(LONGEST_DELAY, max(0.0, failure.after))
    return Decision(state="pending", delay=delay, reason=failure.reason)
