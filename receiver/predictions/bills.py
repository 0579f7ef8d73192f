"""The cost poller: asks providers what ended predictions cost; few state it in the outcome.

Only one process asks, for a bounded number at a time. A figure is recorded once; if none comes,
asking ends after a few days, and the cost stays as it was computed, or unknown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NoReturn, TypeAlias

import structlog

from receiver.model.costs import Price, micro
from receiver.model.errors import StoreUnavailable, Unreadable
from receiver.model.tasks import repeat
from receiver.observability.runtime import Runtime
from receiver.predictions.provider_client import Busy, ProviderClient
from receiver.providers.adapter import Billing, Metered, Provider
from receiver.store.costs import Figure, Question
from receiver.store.facade import Store

log = structlog.get_logger("receiver")

_NAP: Final = 5.0
"""Seconds between two rounds, if the first leaves nothing due."""
_AT_ONCE: Final = 8
"""Requests to one provider at the same time, …"""
_ROUND: Final = 32
"""… and in one round."""
_ROUNDS: Final = 10
_AGAIN: Final = (60.0, 600.0, 3600.0, 6 * 3600.0, 24 * 3600.0, 48 * 3600.0)
"""Seconds to the next try, by the number of tries, if a provider has no figure yet."""
_PRICE_HOLDS: Final = 3600.0
"""Seconds after which the price of a unit is asked for again, …"""
_NO_PRICE_HOLDS: Final = 60.0
"""… and if it could not be read."""
_MOST_PRICES: Final = 1000

Costs: TypeAlias = Mapping[str, Price | None]
"""By prediction id; None: it will never be known; missing: it is not known yet."""


class Bills:
    """Asks the providers that report costs for those of ended predictions."""

    name = "bills"
    at_work = True
    """It is always able to do its work."""

    def __init__(
        self,
        store: Store,
        providers: Mapping[str, Provider],
        clients: Mapping[str, ProviderClient],
        runtime: Runtime,
    ) -> None:
        self._store = store
        self._sources = {
            name: source
            for name, each in providers.items()
            if (source := _source(each, clients[name], runtime)) is not None
        }
        self._clock = runtime.clock

    async def run(self) -> NoReturn:
        """Ask until cancelled."""
        await repeat(self.ask, longest=_NAP)

    async def drain(self) -> None:
        """Ask for due costs, a few rounds at most, if nothing runs between drains."""
        for _ in range(_ROUNDS):
            if await self.ask() is None:
                return

    async def ask(self) -> float | None:
        """Ask for due costs, one round; return 0 if there may be more."""
        rounds = await asyncio.gather(*(self._ask(name) for name in self._sources))
        return 0.0 if any(rounds) else None

    async def _ask(self, name: str) -> bool:
        """Ask one provider; return whether there may be more to ask it now."""
        source = self._sources[name]
        most = _ROUND * source.at_once
        questions = await self._store.costs.questions(name, self._clock(), most)
        room = asyncio.Semaphore(_AT_ONCE)
        parts = _parts(questions, source.at_once)
        ends = await asyncio.gather(*(self._bill(name, some, room) for some in parts))
        is_busy = any(isinstance(each, Busy) for each in ends)
        failures = [str(each) for each in ends if each and not isinstance(each, Busy)]
        if failures:  # one line for all: a provider that is down fails many
            log.warning("bill.failed", provider=name, times=len(failures), reason=failures[0])
        return len(questions) == most and not is_busy

    async def _bill(
        self, name: str, questions: Sequence[Question], room: asyncio.Semaphore
    ) -> Unreadable | None:
        """Ask for some costs, and record the results; return the failure, if there is one."""
        costs: Costs = {}
        failure = None
        try:
            async with room:
                costs = await self._sources[name].costs(questions)
        except Busy as busy:
            return busy  # nothing was sent: not counted as a try
        except Unreadable as error:
            failure = error
        except StoreUnavailable:
            raise
        except Exception:  # a fault of ours: one cost must not block all others
            log.exception("task.failed", provider=name)
        await asyncio.gather(*(self._learn(each, costs) for each in questions))
        return failure

    async def _learn(self, question: Question, costs: Costs) -> None:
        now = self._clock()
        name = question.ticket.id
        again_at = None
        if name not in costs and question.tries < len(_AGAIN):
            again_at = now + _AGAIN[question.tries]
        figure = Figure(prediction_id=name, cost=costs.get(name), again_at=again_at, at=now)
        await self._store.costs.learn(figure)


class _Billed:
    """Costs as a provider bills them."""

    def __init__(self, provider: Billing, client: ProviderClient) -> None:
        self._provider = provider
        self._client = client
        self.at_once = provider.most_billed

    async def costs(self, questions: Sequence[Question]) -> Costs:
        tickets = [question.ticket for question in questions]
        answer = await self._client.ask(self._provider.bill(tickets))
        amounts = self._provider.billed(tickets, answer)
        return {name: Price(amount, "provider") for name, amount in amounts.items()}


class _Computed:
    """Costs computed from the units that a provider counts and its list price of a unit.

    They are recorded as `computed`: an account may pay less than the list price.
    """

    at_once = 1

    def __init__(self, provider: Metered, client: ProviderClient, runtime: Runtime) -> None:
        self._provider = provider
        self._client = client
        self._clock = runtime.monotonic
        self._prices: dict[str, tuple[float, float | None]] = {}
        """By model: until when the price holds, and dollars."""
        self._asking = asyncio.Lock()

    async def costs(self, questions: Sequence[Question]) -> Costs:
        [question] = questions
        price = await self._price(question.ticket.model)
        if price is None:
            return {}
        units = question.units
        if units is None:
            answer = await self._client.ask(self._provider.meter(question.ticket))
            units = self._provider.metered(answer)
        amount = None if units is None else micro(units * price)
        return {question.ticket.id: None if amount is None else Price(amount, "computed")}

    async def _price(self, model: str) -> float | None:
        """Return the price of a unit of a model, cached, as many predictions in a row need it."""
        async with self._asking:
            until, price = self._prices.get(model, (0.0, None))
            if self._clock() < until:
                return price
            try:
                answer = await self._client.ask(self._provider.price(model))
                price = self._provider.priced(model, answer)
            except Busy:
                raise
            except Unreadable:
                self._keep(model, None, _NO_PRICE_HOLDS)
                raise
            self._keep(model, price, _PRICE_HOLDS)
            return price

    def _keep(self, model: str, price: float | None, seconds: float) -> None:
        if len(self._prices) >= _MOST_PRICES:
            self._prices.clear()
        self._prices[model] = (self._clock() + seconds, price)


def _source(
    provider: Provider, client: ProviderClient, runtime: Runtime
) -> _Billed | _Computed | None:
    """Return how to get a provider's costs; None: not at all, or not with the keys that are set."""
    if isinstance(provider, Billing) and provider.bills_after is not None:
        return _Billed(provider, client)
    if isinstance(provider, Metered) and provider.metered_after is not None:
        return _Computed(provider, client, runtime)
    return None


def _parts(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for at in range(0, len(questions), size):
        yield questions[at : at + size]
