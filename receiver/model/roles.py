"""The roles of processes: what each of them does by itself."""

from __future__ import annotations

from typing import Final

import msgspec


class Role(msgspec.Struct, frozen=True):
    """What a process does by itself; every process also drains on request."""

    accepts: bool
    """Answers requests."""
    outbound: bool
    """Submits queued predictions, polls due ones, listens to event streams."""
    handlers: bool
    """Runs handlers."""
    housekeeping: bool
    """Competes for tasks of a single process: retention, replays, cleanup after dead processes."""


ROLES: Final = {
    "serve": Role(accepts=True, outbound=True, handlers=True, housekeeping=True),
    "serve --no-dispatch": Role(accepts=True, outbound=True, handlers=False, housekeeping=True),
    "serverless": Role(accepts=True, outbound=False, handlers=False, housekeeping=False),
    "worker": Role(accepts=False, outbound=False, handlers=True, housekeeping=True),
    "drain": Role(accepts=False, outbound=False, handlers=False, housekeeping=False),
}


def role_of(dispatch: object, mode: object) -> Role:
    """Return the role of an app; raise ValueError for unknown values."""
    if not isinstance(dispatch, bool) and dispatch != "inline":
        raise ValueError(f"dispatch must be True, False or 'inline', not {dispatch!r}")
    if mode not in ("server", "serverless"):
        raise ValueError(f"mode must be 'server' or 'serverless', not {mode!r}")
    serving = "serve" if dispatch is True else "serve --no-dispatch"
    return ROLES["serverless" if mode == "serverless" else serving]
