"""The facade of `deliveries`: the worker, the replayer and the handlers of one run.

It does everything for an event after its prediction has ended, except to submit a handler's next
prediction: `submit` does that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import structlog

from receiver.deliveries.breaker import BreakerPolicy
from receiver.deliveries.context import Submit, Tools, client_over
from receiver.deliveries.fetch import Fetched, fetch
from receiver.deliveries.guard import guarded_client
from receiver.deliveries.registry import Registry
from receiver.deliveries.replay import Replayer
from receiver.deliveries.reply_to import check_reply_to
from receiver.deliveries.worker import Worker
from receiver.model.errors import Problem
from receiver.model.retry import Policy
from receiver.model.sealing import Seals
from receiver.model.values import Output
from receiver.observability.runtime import Runtime
from receiver.observability.tracing import Client
from receiver.providers.adapter import Guarding
from receiver.settings import Settings
from receiver.settings.egress import outward
from receiver.store.deliveries import ReplayResult
from receiver.store.facade import Store
from receiver.store.leases import Leader

log = structlog.get_logger("receiver")


class Deliveries:
    """Events on their way to handlers, in one run of the receiver."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        registry: Registry,
        submit: Submit,
        runtime: Runtime,
        *,
        http: httpx.AsyncBaseTransport | None = None,
        results: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._store = store
        self._runtime = runtime
        self.registry = registry
        self._hosts = settings.forward_hosts
        self._allow_private = settings.allow_private_fetch
        world = http or outward(settings.proxies)
        self._http = Client(runtime.tracing, propagates=True, transport=world, timeout=30.0)
        self._results = guarded_client(allow_private=settings.allow_private_fetch, instead=results)
        self.worker = Worker(
            store,
            registry,
            Tools(
                store.deliveries,
                submit,
                self._http,
                self._results,
                Seals([key.reveal() for key in settings.secret_keys], runtime.clock),
                {
                    name: adapter
                    for name, adapter in settings.adapters(runtime.clock).items()
                    if isinstance(adapter, Guarding)
                },
                settings.max_chain,
            ),
            runtime,
            policy=Policy(
                attempts=settings.retry_attempts, base=settings.retry_base, cap=settings.retry_cap
            ),
            breaker=BreakerPolicy(failures=settings.breaker_failures),
        )
        self.replayer = Replayer(store.replays, registry, runtime)

    async def replace_handlers(self, registry: Registry) -> None:
        """Run these handlers from now on; attempts under way continue unchanged."""
        self.registry.become(registry)
        self._runtime.telemetry.expect((), registry.handlers)
        self._announce()
        await self.worker.replace_handlers()

    def _announce(self) -> None:
        for handler in self.registry.handlers.values():
            log.info("handler.registered", handler=handler.name, place=handler.place)
        for route in self.registry.routes.values():
            log.info("route.registered", plugin=route.name, place=route.place)
        for source in self.registry.sources.values():
            log.info("source.registered", plugin=source.name, place=source.place)

    def replays(self) -> Replayer | Leader:
        """Return the task that runs replays; with several processes, only the leader runs them."""
        if self._runtime.single_process:
            return self.replayer
        return self._runtime.leader(self.replayer, self._store.leases)

    @asynccontextmanager
    async def running(self, *, handlers: bool) -> AsyncIterator[None]:
        """Run handlers until the block ends; without `handlers`, only in drains and requests.

        An attempt that an error in the block cuts short counts: it may have caused the error.
        """
        is_asked_to_stop = False
        try:
            self._announce()
            await self.worker.start(by_itself=handlers)
            yield
            is_asked_to_stop = True
        finally:
            await self.worker.stop(asked=is_asked_to_stop)

    def http_client(self, *, guarded: bool = False) -> httpx.AsyncClient:
        """Return a client that uses the handlers' connections; guarded: public addresses only."""
        return client_over(self._results if guarded else self._http)

    async def fetch(
        self, output: Output, folder: Path, *, max_bytes: int, seconds: float
    ) -> Fetched:
        """Download an output into a new file below `folder`, guarded; raise as `fetch` does."""
        return await fetch(self._results, output, folder, max_bytes=max_bytes, seconds=seconds)

    async def send(self, url: str, seconds: float) -> int | None:
        """Send a POST without a body; return the status, or None if none came within `seconds`.

        The rest of the answer is not read. Raises httpx.HTTPError, or TimeoutError if the request
        could not be written within `seconds`.
        """
        is_written = False

        async def trace(step: str, _: object) -> None:
            nonlocal is_written
            is_written |= step.endswith("send_request_body.complete")

        extensions = {"trace": trace}
        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream("POST", url, timeout=seconds, extensions=extensions) as answer,
            ):
                return answer.status_code
        except httpx.ReadTimeout:
            return None
        except TimeoutError:
            if is_written:
                return None
            raise TimeoutError(f"it could not be sent within {seconds:g} s") from None

    async def close(self) -> None:
        """Close the connections of handlers; call it last."""
        for client in (self._results, self._http):
            await client.aclose()

    async def check_reply_to(self, url: str | None) -> None:
        """Raise a Problem for a URL, unless it is allowed and a handler sends events there."""
        if url is None:
            return
        if not any(handler.reply_to for handler in self.registry.handlers.values()):
            raise Problem(403, "reply-to-refused", "reply_to: no handler here takes it")
        await check_reply_to(url, self._hosts, allow_private=self._allow_private)

    async def replay(self, prediction_id: str) -> ReplayResult:
        """Redeliver a prediction's event to all handlers that match it now."""
        replayed = await self._store.deliveries.replay(
            prediction_id, self.registry.match, self._runtime.clock()
        )
        self._runtime.wakeups.wake("handler", *replayed.handlers)
        return replayed
