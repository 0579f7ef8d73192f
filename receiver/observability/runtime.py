"""The runtime: what the parts of one run share, as identity, clocks, telemetry and wake-ups."""

from __future__ import annotations

import os
import random
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from receiver.model.tasks import Wakeups
from receiver.observability.clock import Clock
from receiver.observability.events import Telemetry
from receiver.observability.tracing import Tracing
from receiver.store.leases import Leader, LeaderTask, LeaseStore


def new_owner() -> str:
    """Return a name for this run of this process that no other, earlier or later, has."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One run of a receiver, as all its parts know it."""

    owner: str = field(default_factory=new_owner)
    """Names this run in leases and claims."""
    single_process: bool = True
    """No other process works on the same database."""
    clock: Clock = time.time
    """Unix seconds, for what is stored."""
    monotonic: Clock = time.monotonic
    """Seconds, for what only this process knows."""
    random: Callable[[], float] = random.random
    """From 0 to 1."""
    telemetry: Telemetry = field(default_factory=Telemetry)
    tracing: Tracing = field(default_factory=Tracing)
    wakeups: Wakeups = field(default_factory=Wakeups)

    def leader(self, work: LeaderTask, leases: LeaseStore) -> Leader:
        """Return what does `work` in one of all processes."""
        return Leader(self.owner, work, leases, self.wakeups, self.clock, self.monotonic)
