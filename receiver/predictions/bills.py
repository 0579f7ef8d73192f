"""Ask providers what predictions cost, after their end: few say so with the outcome.

One process of all asks, a bounded number at a time. A figure is recorded once; where none comes,
asking ends after a few days, and the cost stays as it was computed, or unknown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NoReturn

import structlog

from receiver.model.errors import StoreUnavailable, Unreadable
from receiver.model.tasks import repeat
from receiver.observability.runtime import Runtime
from receiver.predictions.provider_client import Busy, ProviderClient
from receiver.providers.adapter import Billing, Provider
from receiver.store.costs import Figure, Question
from receiver.store.facade import Store

log = structlog.get_logger("receiver")

_NAP: Final = 5.0
"""Seconds between two rounds where little is due."""
_AT_ONCE: Final = 8
"""Requests to one provider at the same time, …"""
_ROUND: Final = 32
"""… and in one round."""
_ROUNDS: Final = 10
_AGAIN: Final = (60.0, 600.0, 3600.0, 6 * 3600.0, 24 * 3600.0, 48 * 3600.0)
"""Seconds to the next try, where a provider says no figure yet."""


class Bills:
    """Asks each provider that says costs for those of what has ended."""

    name = "bills"

    def __init__(
        self,
        store: Store,
        providers: Mapping[str, Provider],
        clients: Mapping[str, ProviderClient],
        runtime: Runtime,
    ) -> None:
        self._store = store
        self._providers = {
            name: each
            for name, each in providers.items()
            if isinstance(each, Billing) and each.bills_after is not None
        }
        self._clients = clients
        self._clock = runtime.clock

    @property
    def at_work(self) -> bool:
        """It is always able to do its work."""
        return True

    async def run(self) -> NoReturn:
        """Ask for as long as we run."""
        await repeat(self.ask, longest=_NAP)

    async def drain(self) -> None:
        """Ask for what is due, a few rounds of it, where nothing runs between drains."""
        for _ in range(_ROUNDS):
            if await self.ask() is None:
                return

    async def ask(self) -> float | None:
        """Ask for what is due, one round; return 0 where there is more."""
        rounds = await asyncio.gather(*(self._ask(name) for name in self._providers))
        return 0.0 if any(rounds) else None

    async def _ask(self, name: str) -> bool:
        """Ask one provider; True: there is more to ask it now."""
        provider = self._providers[name]
        most = _ROUND * provider.most_billed
        questions = await self._store.costs.questions(name, self._clock(), most)
        room = asyncio.Semaphore(_AT_ONCE)
        parts = _parts(questions, provider.most_billed)
        ends = await asyncio.gather(*(self._bill(name, some, room) for some in parts))
        is_busy = any(isinstance(each, Busy) for each in ends)
        failures = [str(each) for each in ends if each and not isinstance(each, Busy)]
        if failures:  # a line for each would be many where a provider is away
            log.warning("bill.failed", provider=name, times=len(failures), reason=failures[0])
        return len(questions) == most and not is_busy

    async def _bill(
        self, name: str, asked: Sequence[Question], room: asyncio.Semaphore
    ) -> Unreadable | None:
        """Ask for some, and record what comes of it; return what went wrong."""
        provider = self._providers[name]
        tickets = [question.ticket for question in asked]
        amounts: Mapping[str, int] = {}
        failure = None
        try:
            async with room:
                answer = await self._clients[name].ask(provider.bill(tickets))
            amounts = provider.billed(tickets, answer)
        except Busy as busy:
            return busy  # nothing was asked
        except Unreadable as error:
            failure = error
        except StoreUnavailable:
            raise
        except Exception:  # a fault of ours: one that is never known must not keep up all others
            log.exception("task.failed", provider=name)
        await asyncio.gather(*(self._learn(each, amounts.get(each.ticket.id)) for each in asked))
        return failure

    async def _learn(self, question: Question, amount: int | None) -> None:
        now = self._clock()
        again_at = None
        if amount is None and question.tries < len(_AGAIN):
            again_at = now + _AGAIN[question.tries]
        figure = Figure(prediction_id=question.ticket.id, amount=amount, again_at=again_at, at=now)
        await self._store.costs.learn(figure)


def _parts(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    for at in range(0, len(questions), size):
        yield questions[at : at + size]
