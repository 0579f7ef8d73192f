"""The ledger: predictions, callback attempts, request counts and violations of rules."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, get_args

import msgspec

from receiver.emulator.endings import Failure
from receiver.emulator.options import Provider
from receiver.emulator.prompts import Plan

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Counted = Literal["submits", "polls", "cancels", "rejected"]

PROVIDERS: tuple[Provider, ...] = get_args(Provider)
COUNTED: tuple[Counted, ...] = get_args(Counted)
PRICE = 0.039
"""Dollars for one generation, at every provider."""
_VIOLATIONS_KEPT = 10_000


class Attempt(msgspec.Struct, frozen=True, omit_defaults=True):
    """One attempt to send an outcome."""

    at: float
    status_code: int | None = None
    error: str | None = None


@dataclass(slots=True, eq=False)
class Prediction:
    """One accepted prediction and its history."""

    provider: Provider
    id: str
    model: str
    account: str
    """The account of the key it was submitted with."""
    input: dict[str, Any]
    prompt: str
    plan: Plan
    origin: str
    """Scheme and host of the submit's URL; the base of every URL in answers."""
    old: bool
    """Whether answers about it have the older shapes."""
    variant: int
    """Eight random bits that select variations of the answers."""
    submitted_at: float
    index: int = 0
    """Position among the predictions of one submit."""
    callback_url: str = ""
    secret: str = ""
    blocking: bool = False
    """Whether the caller waits on the connection for the outcome."""
    billed: int = 1
    state: State = "queued"
    started_at: float | None = None
    completed_at: float | None = None
    polls: int = 0
    callback_attempts: list[Attempt] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def finished(self) -> bool:
        return self.state not in {"queued", "running"}

    @property
    def ran(self) -> float:
        """The seconds from its start to its end; 0 before the end, and if it never started."""
        if self.started_at is None or self.completed_at is None:
            return 0.0
        return round(self.completed_at - self.started_at, 3)

    @property
    def cost(self) -> float:
        """The cost in dollars; 0 unless it succeeded."""
        return PRICE * self.billed if self.state == "succeeded" else 0.0

    def reason(self, usual: Mapping[Failure, str]) -> str:
        """Return why it failed: the reason in its ending, or the provider's `usual` one."""
        failure = self.plan.failure if self.state == "failed" else None
        return (self.plan.ending.reason or usual[failure]) if failure else ""

    def move(self, state: State) -> None:
        self.state = state
        self._notify()

    def record_attempt(self, attempt: Attempt) -> None:
        self.callback_attempts.append(attempt)
        self._notify()

    async def until(self, condition: Callable[["Prediction"], bool]) -> None:
        """Wait for a change after which the condition holds."""
        while not condition(self):
            await self._changed.wait()

    def row(self) -> dict[str, Any]:
        return {
            "provider": self.provider,
            "id": self.id,
            "model": self.model,
            "prompt": self.prompt,
            "billed": self.billed,
            "status": self.state,
            "submitted_at": self.submitted_at,
            "completed_at": self.completed_at,
            "callback_attempts": self.callback_attempts,
            "polls": self.polls,
        }

    def _notify(self) -> None:
        self._changed.set()  # wakes all who wait now
        self._changed.clear()


class Ledger:
    """The latest predictions, up to a limit, with counts and violations."""

    def __init__(self, limit: int, now: Callable[[], float]) -> None:
        self._limit = limit
        self._now = now
        self._predictions: dict[tuple[Provider, str], Prediction] = {}
        self._requests: Counter[tuple[Provider, Counted]] = Counter()
        self._violations: deque[dict[str, Any]] = deque(maxlen=_VIOLATIONS_KEPT)

    def add(self, prediction: Prediction) -> None:
        self._predictions[prediction.provider, prediction.id] = prediction
        if len(self._predictions) > self._limit:
            del self._predictions[next(iter(self._predictions))]

    def find(self, provider: Provider, prediction_id: str, account: str) -> Prediction | None:
        """Return a prediction of this account; None for any other account's."""
        found = self._predictions.get((provider, prediction_id))
        return found if found and found.account == account else None

    def all(self) -> list[Prediction]:
        """Return the predictions, in order of submission."""
        return list(self._predictions.values())

    def latest(self, provider: Provider, account: str) -> Iterator[Prediction]:
        for prediction in reversed(self._predictions.values()):
            if prediction.provider == provider and prediction.account == account:
                yield prediction

    def count(self, provider: Provider, what: Counted) -> None:
        self._requests[provider, what] += 1

    def violation(self, provider: Provider, rule: str, detail: str = "") -> None:
        entry = {"provider": provider, "rule": rule, "detail": detail, "at": self._now()}
        self._violations.append(entry)

    def report(self, limit: int | None = None) -> dict[str, Any]:
        """Return the ledger as JSON values, with at most `limit` predictions, the latest."""
        kept = len(self._predictions)
        first = 0 if limit is None else max(0, kept - limit)
        rows = islice(self._predictions.values(), first, None)
        return {
            "predictions": [prediction.row() for prediction in rows],
            "requests": {
                provider: {what: self._requests[provider, what] for what in COUNTED}
                for provider in PROVIDERS
            },
            "violations": list(self._violations),
        }
