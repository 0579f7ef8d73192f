"""Bulk replays: count the deliveries, then redeliver them in small steps.

New events have priority: each step is small, is followed by a pause as long as the step, and waits
while many redelivered deliveries have not started.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final, NoReturn

import structlog

from receiver.deliveries.registry import Registry
from receiver.model.answers import Replay, Selection
from receiver.model.errors import StoreUnavailable
from receiver.model.ids import new_id
from receiver.model.tasks import repeat
from receiver.model.values import Recipients
from receiver.observability.runtime import Runtime
from receiver.store.inbox import CurrentState
from receiver.store.predictions import model_test
from receiver.store.replays import Candidate, CountedReplay, Replays, ReplayStep, RunningReplay

log = structlog.get_logger("receiver")

_PAGE: Final = 200
"""Events counted in one query."""
_STEP: Final = 100
"""Events redelivered in one transaction."""
_MOST_DUE: Final = 500
"""Deliveries of one replay that may be due and not started; from this number on it waits."""
_LONGEST_WAIT: Final = 5.0
"""Seconds after which it continues anyway: one slow handler must not hold up all others."""
_LOOK: Final = 0.05
_NAP: Final = 2.0
"""Seconds between two polls for replays that were started through another process."""


class Replayer:
    """Counts replays, and runs the started ones, in one process at a time."""

    def __init__(self, replays: Replays, registry: Registry, runtime: Runtime) -> None:
        self._replays = replays
        self._registry = registry
        self._runtime = runtime
        self._clock = runtime.clock
        self._counting = asyncio.Lock()
        self.name = "replays"
        self.at_work = True

    async def count(self, wanted: Selection) -> Replay:
        """Count the selected deliveries now; store the count as a replay that may be started."""
        # One at a time: a count may read every event, and other requests need to read too.
        async with self._counting:
            counted = await self._count(wanted)
        await self._replays.create(counted)
        found = await self._replays.find(counted.id)
        if found is None:
            raise StoreUnavailable("the replay was forgotten at once")
        return found

    async def _count(self, wanted: Selection) -> CountedReplay:
        sieve = _Selector(wanted, self._registry)
        now = self._clock()
        at, last = await self._replays.bounds()
        events = matched = 0
        stretch = (last, last)
        while at < last:
            page = await self._replays.candidates(wanted, at, last, _PAGE)
            for found in page.candidates:
                if pending := sieve.count(found):
                    stretch = (stretch[0] if events else found.seq - 1, found.seq)
                    events += 1
                    matched += pending
            at = page.end
        return CountedReplay(
            id=new_id("rep", now),
            wanted=wanted,
            events=events,
            matched=matched,
            next=stretch[0],
            last=stretch[1],
            now=now,
        )

    async def start(self, replay_id: str) -> bool:
        """Start a counted replay; return False if there is no such counted replay."""
        if not await self._replays.start(replay_id):
            return False
        log.info("replay.started", **await self._counts(replay_id))
        self._runtime.wakeups.wake("role", self.name)
        return True

    async def cancel(self, replay_id: str) -> bool:
        """Stop a replay; return False if it has ended or is unknown."""
        if not await self._replays.cancel(replay_id, self._clock()):
            return False
        log.info("replay.ended", **await self._counts(replay_id))
        return True

    async def run(self) -> NoReturn:
        """Run started replays, as long as the app runs."""
        with self._runtime.wakeups.listen("role", self.name) as awake:
            await repeat(self._work, awake, longest=_NAP)

    async def _work(self) -> float:
        return 0.0 if await self.step() else _NAP

    async def step(self) -> bool:
        """Run one step of each running replay; return whether there is any."""
        running = await self._replays.running()
        for replay in running:
            await self._step(replay)
        return bool(running)

    async def _step(self, replay: RunningReplay) -> None:
        began = time.monotonic()
        sieve = _Selector(replay.wanted, self._registry)
        page = await self._replays.candidates(replay.wanted, replay.next, replay.last, _STEP)
        stepped = await self._replays.take_step(
            ReplayStep(
                replay_id=replay.id,
                begin=replay.next,
                end=page.end,
                predictions=[found.known.id for found in page.candidates if sieve.count(found)],
                choose=sieve.recipients,
                now=self._clock(),
            )
        )
        self._runtime.wakeups.wake("handler", *stepped.handlers)
        if stepped.state == "done":
            log.info("replay.ended", **await self._counts(replay.id))
        if stepped.state != "running":
            return
        await asyncio.sleep(time.monotonic() - began)
        await self._let_others_begin(replay.id)

    async def _counts(self, replay_id: str) -> dict[str, Any]:
        found = await self._replays.find(replay_id)
        counts = ("state", "matched", "replayed")
        return {"replay": replay_id, **{name: getattr(found, name, None) for name in counts}}

    async def _let_others_begin(self, replay_id: str) -> None:
        until = time.monotonic() + _LONGEST_WAIT
        while await self._replays.due(replay_id, self._clock(), _MOST_DUE) >= _MOST_DUE:
            if time.monotonic() >= until:
                return
            await asyncio.sleep(_LOOK)


class _Selector:
    """Selects the deliveries of an event that a replay redelivers."""

    def __init__(self, wanted: Selection, registry: Registry) -> None:
        self._wanted = wanted
        self._registry = registry
        self._fits = model_test(wanted.model, wanted.metadata or {})

    def count(self, found: Candidate) -> int:
        """Return how many deliveries of an event would be redelivered."""
        return len(self.recipients(found.known, found.type, found.states).handlers)

    def recipients(
        self, known: CurrentState, event_type: str, states: Mapping[str, str]
    ) -> Recipients:
        """Return the handlers that an event would be redelivered to, and what they wait for."""
        if not self._fits(known.model, known.metadata):
            return Recipients()
        wanted = self._wanted
        if wanted.state is not None:
            # Existing deliveries, in the order of registration; those of handlers that are not
            # registered are left out, as no process could run them.
            names = [name for name in self._registry.handlers if states.get(name) == wanted.state]
        else:
            busy = {"pending", "running"}
            matching = self._registry.match(known, event_type).handlers
            names = [name for name in matching if states.get(name) not in busy]
        if wanted.handler is not None:
            names = [name for name in names if name == wanted.handler]
        # They wait only for each other: the event's other handlers have ended, or may end
        # without releasing deliveries that came later.
        return Recipients(tuple(names), self._registry.waiting(names))
