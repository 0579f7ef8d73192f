"""The facade of `predictions`: one run's submitters, poller and streams around the one inbox.

It covers a prediction until it ends. Deliveries are not known here: `match` only returns the
handlers of an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import httpx

from receiver.model.sealing import Seals
from receiver.model.tasks import TaskSet
from receiver.observability.runtime import Runtime
from receiver.observability.tracing import Client
from receiver.predictions.bills import Bills
from receiver.predictions.inbox import Inbox
from receiver.predictions.limits import Limits
from receiver.predictions.orders import Orders
from receiver.predictions.poller import Poller
from receiver.predictions.proofs import Proofs
from receiver.predictions.provider_client import ProviderClient
from receiver.predictions.service import PredictionService
from receiver.predictions.stream import Listener
from receiver.predictions.submitter import Schedule, Submitter
from receiver.predictions.tokens import Tokens
from receiver.providers.adapter import Streamed
from receiver.settings import Settings
from receiver.settings.egress import outward
from receiver.store.facade import Housekeeping, Store
from receiver.store.inbox import Match
from receiver.store.leases import Leader, LeaderTask

Work = TypeVar("Work", bound=LeaderTask)

_CAUGHT_UP: Final = 60.0
"""Seconds after a catch-up for which other processes that start do not repeat it."""


class Predictions:
    """Predictions until they end, in one run of the receiver."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        match: Match,
        runtime: Runtime,
        network: httpx.AsyncBaseTransport | None,
    ) -> None:
        self._store = store
        self._runtime = runtime
        self.on = [name for name, given in settings.providers.items() if given.key is not None]
        keys = [key.reveal() for key in settings.secret_keys]
        self.tokens = Tokens(keys)
        self.seals = Seals(keys, runtime.clock)
        # If an answer is compressed all the same, it is decompressed in bounded pieces.
        self.client = Client(
            runtime.tracing,
            propagates=False,
            transport=network or outward(settings.proxies, lanes=True),
            headers={"Accept-Encoding": "identity"},
        )
        providers = settings.adapters(runtime.clock)
        self._proofs = Proofs(providers, settings.providers, self.client, self.tokens, runtime)
        self.limits = Limits(settings)
        self.inbox = Inbox(store, providers, self.tokens, match, self._proofs, self.limits, runtime)
        clients = self._clients(settings)
        schedule = Schedule(settings, runtime)
        self._poller = Poller(
            store,
            self.inbox,
            providers,
            clients,
            schedule,
            runtime,
            timeout=settings.prediction_timeout,
        )
        self.streams = {
            name: self._stream(name, provider)
            for name, provider in providers.items()
            if isinstance(provider, Streamed) and name in self.on
        }
        begins = settings.mode != "serverless"  # there no work may continue after the answer
        self._submitters = {
            name: Submitter(
                providers[name],
                clients[name],
                store,
                self.inbox,
                self.tokens,
                settings,
                schedule,
                runtime,
                due=self._poller.due,
                ready=self.streams[name].ready if begins and name in self.streams else None,
            )
            for name in self.on
        }
        self.service = PredictionService(
            store,
            self.inbox,
            self._submitters,
            self._poller,
            self.limits,
            runtime,
            begins=begins,
        )
        self.orders = Orders(settings.recipes, store, self.service, runtime)
        # Bills are not urgent: they leave a quarter of a provider's requests per minute to others.
        unhurried = self._clients(settings, part=0.75)
        self.bills = Bills(store, {name: providers[name] for name in self.on}, unhurried, runtime)

    def _clients(self, settings: Settings, part: float = 1.0) -> dict[str, ProviderClient]:
        """Return the clients of the providers with a key, under this part of their rate limits."""
        limits = {name: settings.providers[name].requests_per_minute for name in self.on}
        per_minute = {name: limit and max(int(limit * part), 1) for name, limit in limits.items()}
        return {
            name: ProviderClient(name, most, self.client, self._store.limits, self._runtime)
            for name, most in per_minute.items()
        }

    def _stream(self, name: str, provider: Streamed) -> Listener | Leader:
        """Return the listener of a provider's stream, or the leader that runs it."""
        return self._alone(
            Listener(name, provider, self.client, self.inbox, self._store, self._runtime)
        )

    def _alone(self, work: Work) -> Work | Leader:
        """Return a task or, if there are other processes, the leader that runs it in only one."""
        if self._runtime.single_process:
            return work
        return self._runtime.leader(work, self._store.leases)

    def exchange(self, settings: Settings) -> None:
        """Use these recipes, limits and prices from now on."""
        self.orders.book = settings.recipes
        self.limits.exchange(settings)

    @asynccontextmanager
    async def running(self, *, outbound: bool) -> AsyncIterator[None]:
        """Submit, poll and listen until the block is left; without `outbound` only on a call.

        A submit that was sent but not answered by then is left, unconfirmed, to the next start.
        """
        tasks = TaskSet()
        try:
            if outbound:
                for stream in self.streams.values():
                    tasks.start(stream.run())
                tasks.start(self._proofs.fetch(self.on))
                await self._catch_up()
                for submitter in self._submitters.values():
                    tasks.start(submitter.run())
                tasks.start(self._poller.run())
                tasks.start(self._alone(self.bills).run())
            yield
        finally:
            await asyncio.gather(*(each.stop() for each in self._submitters.values()))
            await tasks.cancel()
            await self._poller.stop()
            await self.inbox.stop()

    async def close(self) -> None:
        """Close the connections to providers, after everything else has stopped."""
        await self.client.aclose()

    async def _catch_up(self) -> None:
        """Make all predictions at providers due for a poll: their outcomes may have been missed."""
        now, leases = self._runtime.clock(), self._store.leases
        if self._runtime.single_process or await leases.take_turn("catch-up", now, _CAUGHT_UP):
            for name in self._submitters:
                await self._store.predictions.hasten(name, now)

    def housekeeping(self) -> Housekeeping:
        """Return the steps that only one process runs every few seconds, by name."""
        return {"submits": self._submit_queued, "polls": self._poll_due}

    async def _submit_queued(self) -> None:
        """Submit queued predictions, of any process, for which there is room."""
        for submitter in self._submitters.values():
            await submitter.begin()

    async def _poll_due(self) -> None:
        """Poll due predictions, of any process."""
        await self._poller.start_due_polls()

    async def drain(self, until: float, last_start: float) -> None:
        """Submit and poll due predictions until none is left, or `until` by the loop's clock.

        Nothing is begun after `last_start`.
        """
        clock = asyncio.get_running_loop().time
        while True:
            if clock() < last_start:
                await self._submit_queued()
                await self._poll_due()
            tasks = list(self._poller.under_way)
            for submitter in self._submitters.values():
                tasks += submitter.under_way
            left = until - clock()
            if not tasks or left <= 0:
                return
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def locked(self) -> list[str]:
        """Return the providers that have locked our account, as far as this process knows."""
        return [name for name, submitter in self._submitters.items() if submitter.room.locked]

    @property
    def submits(self) -> int:
        """Number of submits begun by this process."""
        return sum(submitter.submits for submitter in self._submitters.values())

    @property
    def polls(self) -> int:
        """Number of polls begun by this process."""
        return self._poller.polls
