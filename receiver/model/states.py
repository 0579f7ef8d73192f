"""The state machine of a prediction: one table of transitions, and the effect of an outcome.

    queued ──begin──▶ submitting ──accepted──▶ processing ──▶ succeeded | failed | canceled
      ▲                 │    │
      └───postponed─────┘    └──ambiguous──▶ unconfirmed ──accepted──▶ processing
                                                   └───────────────▶ succeeded | failed | canceled

Every other state may also change directly to a terminal one, and `queued` to `processing`: a
callback can arrive before the answer to our own submit, or prove that a refused submit was
accepted. Terminal states never change.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal

from receiver.model.values import Outcome, Status


class Cause(StrEnum):
    """The cause of a change of status."""

    BEGIN = "begin"  # there is room at the provider: the submit is about to be sent
    POSTPONED = "postponed"  # the provider did not accept it (429, 500, 503, refused connection)
    AMBIGUOUS = "ambiguous"  # bytes were sent and no answer came: money may be spent
    ACCEPTED = "accepted"  # the provider returned its own id
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


TERMINAL: Final = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELED})


IN_FLIGHT: Final = frozenset({Status.SUBMITTING, Status.PROCESSING, Status.UNCONFIRMED})


_ENDS: Final = {
    Cause.SUCCEEDED: Status.SUCCEEDED,
    Cause.FAILED: Status.FAILED,
    Cause.CANCELED: Status.CANCELED,
}


TRANSITIONS: Final[dict[Status, dict[Cause, Status]]] = {
    # It may be queued again after a refusal; the provider's id in an outcome proves acceptance.
    Status.QUEUED: {Cause.BEGIN: Status.SUBMITTING, Cause.ACCEPTED: Status.PROCESSING, **_ENDS},
    Status.SUBMITTING: {
        Cause.POSTPONED: Status.QUEUED,
        Cause.AMBIGUOUS: Status.UNCONFIRMED,
        Cause.ACCEPTED: Status.PROCESSING,
        **_ENDS,
    },
    Status.UNCONFIRMED: {Cause.ACCEPTED: Status.PROCESSING, **_ENDS},
    Status.PROCESSING: dict(_ENDS),
    Status.SUCCEEDED: {},
    Status.FAILED: {},
    Status.CANCELED: {},
}


def step(status: Status, cause: Cause) -> Status | None:
    """Return the new status; None if `cause` does not apply: callers then change nothing."""
    return TRANSITIONS[status].get(cause)


def sources(cause: Cause) -> frozenset[Status]:
    """Return the states in which `cause` applies, for the WHERE of an UPDATE."""
    return frozenset(status for status, arrows in TRANSITIONS.items() if cause in arrows)


_CAUSES: Final = {str(cause): cause for cause in _ENDS}


Verdict = Literal["accepted", "duplicate", "late", "noted", "ask", "mismatch", "unknown"]


def cause_of(outcome: Outcome) -> Cause | None:
    """Return the cause that an outcome is; None if it is not an end."""
    return _CAUSES.get(outcome.kind)


def advance(
    status: Status, provider_id: str | None, outcome: Outcome
) -> tuple[Verdict, Status, str]:
    """Return the effect of an outcome on a prediction: the verdict, the new status, the reason.

    Every status and outcome has an effect, and only `accepted` ends a prediction.
    """
    cause = cause_of(outcome)
    names = {outcome.provider_id, outcome.also_known_as} - {None}
    if provider_id is not None and names and provider_id not in names:
        return "mismatch", status, "another prediction's id"
    if status in TERMINAL:
        if cause is None or step(Status.PROCESSING, cause) is status:
            return "duplicate", status, f"already {status}"
        return "late", status, f"already {status}, then told {outcome.kind}"
    if cause is None:
        # An outcome with the provider's id proves that the submit was accepted.
        taken = names and outcome.kind != "missing" and step(status, Cause.ACCEPTED)
        return ("ask" if outcome.kind == "ask" else "noted"), taken or status, outcome.kind
    return "accepted", TRANSITIONS[status][cause], outcome.kind
