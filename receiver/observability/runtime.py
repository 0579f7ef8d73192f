"""The runtime: the identity, clocks, telemetry and wake-ups that the parts of one run share."""

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
    """Return a unique name for this run of this process."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The values that all parts of one run of a receiver share."""

    owner: str = field(default_factory=new_owner)
    """Names this run in leases and claims."""
    single_process: bool = True
    """Whether no other process works on the same database."""
    clock: Clock = time.time
    """Unix seconds, for what is stored."""
    monotonic: Clock = time.monotonic
    """Seconds, for times that only this process uses."""
    random: Callable[[], float] = random.random
    """From 0 to 1."""
    telemetry: Telemetry = field(default_factory=Telemetry)
    tracing: Tracing = field(default_factory=Tracing)
    wakeups: Wakeups = field(default_factory=Wakeups)

    def leader(self, work: LeaderTask, leases: LeaseStore) -> Leader:
        """Return the leader that runs `work` in only one of all processes."""
        return Leader(self.owner, work, leases, self.wakeups, self.clock, self.monotonic)
