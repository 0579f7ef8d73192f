"""The common part of the emulated providers: submits, polls, faults and callbacks."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver.emulator import pictures, prompts, wire
from receiver.emulator.callback_sender import Callback
from receiver.emulator.faults import Fault, Rule
from receiver.emulator.ledger import Prediction
from receiver.emulator.options import Provider, Schedule
from receiver.emulator.wire import Refusal
from receiver.emulator.world import World

NO_SUCH_MODEL = "no-such-model"
TEXT_ONLY = "text-only"
_EARLY_PATIENCE = 1.0
_MINUTE = 60

_STALE = 600
"""Age of a stale signature, in seconds."""


class Emulated(ABC):
    """An emulated provider."""

    name: ClassVar[Provider]

    def __init__(self, world: World) -> None:
        self.world = world
        self._request_times: defaultdict[str, deque[float]] = defaultdict(deque)
        world.lifecycle.on_finish[self.name] = self.push

    @classmethod
    def settings(cls) -> dict[str, str]:
        """Return the environment of a receiver: paths below the emulator's URL, and secrets."""
        return {f"{cls.name.upper()}_BASE_URL": f"/{cls.name}"}

    @abstractmethod
    def calls(self) -> wire.Calls:
        """Return the calls that need a key."""

    @abstractmethod
    def account(self, request: Request) -> str:
        """Return the account of a call's key; raise Refusal if the key is unknown."""

    @abstractmethod
    def not_found(self, request: Request) -> Response:
        """Return the answer to a call about a prediction that the account does not have."""

    @abstractmethod
    def push(self, prediction: Prediction) -> None:
        """Send the outcome of a prediction that has ended."""

    def routes(self) -> list[BaseRoute]:
        return wire.routes(self.name, self.account, self.calls())

    def take(self, fault: Fault, prompt: str = "") -> Rule | None:
        return self.world.faults.take(fault, self.name, prompt)

    # --- submits ---

    def refusal(self, prompt: str) -> Rule | None:
        """Return the rule that refuses this submit; hang up if a rule drops it unbilled."""
        if self.take("drop_submit", prompt):
            raise Refusal(wire.HangUp())
        return self.take("refuse_submit", prompt)

    def is_full(self, account: str, limit: int | None) -> bool:
        """Return whether an account has reached its limit of unfinished predictions."""
        if limit is None or self.world.lifecycle.in_flight[self.name, account] < limit:
            return False
        self.world.ledger.violation(self.name, "in_flight", str(limit))
        return True

    def wait_for_rate(self, account: str, limit: int | None) -> int | None:
        """Count a request; return the seconds to wait if the account exceeds its minute's limit."""
        if limit is None:
            return None
        times, now = self._request_times[account], self.world.now()
        while times and times[0] <= now - _MINUTE:
            times.popleft()
        if len(times) >= limit:
            self.world.ledger.violation(self.name, "per_minute", str(limit))
            return int(times[0] + _MINUTE - now) + 1
        times.append(now)
        return None

    def check(self, problems: Iterable[Response]) -> None:
        """Count a refused submit and raise Refusal with its first problem, if it has one."""
        for problem in problems:
            self.world.ledger.count(self.name, "rejected")
            raise Refusal(problem)

    def prediction(
        self,
        request: Request,
        account: str,
        model: str,
        inputs: Mapping[str, Any] | None,
        **more: Any,
    ) -> Prediction:
        """Return a new prediction, not accepted yet."""
        inputs = inputs or {}
        world, prompt = self.world, wire.text_of(inputs.get("prompt"))
        return Prediction(
            provider=self.name,
            id=world.id_for(self.name),
            model=model,
            account=account,
            input=dict(inputs),
            prompt=prompt,
            plan=prompts.read(prompt, inputs, world.options, world.rng),
            origin=wire.origin(request),
            old=world.old(),
            variant=world.rng.getrandbits(8),
            submitted_at=world.now(),
            **more,
        )

    async def accept(self, predictions: Sequence[Prediction], response: Response) -> Response:
        """Bill, start and answer; a fault may call back first, or hang up instead of the answer."""
        self._charge(predictions)
        if rule := self.take("early_callback", predictions[0].prompt):
            await self._finish_early(predictions, rule.seconds)
        self._stall(predictions[0])
        return response

    async def run(self, prediction: Prediction, seconds: float | None = None) -> Prediction:
        """Bill a prediction whose caller waits for its end; wait for it, `seconds` at most."""
        prediction.blocking = True
        self._charge([prediction])
        self._stall(prediction)
        if self.world.options.by_hand is not None:
            self.world.lifecycle.end(prediction)  # the test is blocked and cannot end it
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await prediction.until(lambda p: p.finished)
        return prediction

    def _charge(self, predictions: Sequence[Prediction]) -> None:
        """Record predictions and start them: from here on they cost money."""
        self.world.ledger.count(self.name, "submits")
        for prediction in predictions:
            self.world.ledger.add(prediction)
            self.world.lifecycle.start(prediction)

    def _stall(self, prediction: Prediction) -> None:
        if rule := self.take("stall_submit", prediction.prompt):
            raise Refusal(wire.HangUp(rule.seconds or 0))

    async def _finish_early(self, predictions: Sequence[Prediction], seconds: float | None) -> None:
        for prediction in predictions:
            self.world.lifecycle.finish(prediction)
        with suppress(TimeoutError):
            async with asyncio.timeout(_EARLY_PATIENCE if seconds is None else seconds):
                for prediction in predictions:
                    await prediction.until(lambda p: bool(p.callback_attempts))

    # --- other calls ---

    def id_in(self, request: Request) -> str:
        """Return the id of the prediction that a call is about."""
        return str(request.path_params["id"])

    def find(self, request: Request, account: str) -> Prediction:
        """Return the prediction that a call is about; raise Refusal if the account has none."""
        prediction = self.world.ledger.find(self.name, self.id_in(request), account)
        if prediction is None:
            raise Refusal(self.not_found(request))
        return prediction

    def polled(self, request: Request, account: str) -> Prediction:
        """Return the prediction and count the poll; a fault may break the answer."""
        self.world.ledger.count(self.name, "polls")
        known = self.world.ledger.find(self.name, self.id_in(request), account)
        if rule := self.take("break_poll", known.prompt if known else ""):
            raise Refusal(_broken(rule))
        prediction = self.find(request, account)
        prediction.polls += 1
        return prediction

    def canceled(self, request: Request, account: str) -> tuple[Prediction, bool]:
        """Count a cancellation; return the prediction, and whether this has canceled it."""
        self.world.ledger.count(self.name, "cancels")
        prediction = self.find(request, account)
        return prediction, self.world.lifecycle.cancel(prediction)

    def hand_out(self, keys: object) -> Response:
        """Return an answer with keys or a secret; a fault may break it."""
        rule = self.take("break_jwks")
        return _broken(rule) if rule else wire.answer(keys)

    def drawn(self, prediction: Prediction) -> list[str]:
        """Return the URLs of the pictures drawn for a prediction, or data URIs."""
        names = picture_names(prediction)
        rule = self.take("large_output", prediction.prompt)
        if rule or prediction.input.get("sync_mode") is True:
            return [pictures.data_uri(name, rule.size if rule else 0) for name in names]
        return picture_urls(prediction)


class CallsBack(Emulated):
    """An emulated provider that calls back; all but Oxen do."""

    schedule: ClassVar[Schedule]

    @abstractmethod
    def content(self, prediction: Prediction) -> dict[str, Any]:
        """Return the content of the callback for a prediction that has ended."""

    @abstractmethod
    def proof(self, prediction: Prediction, body: bytes, at: float | None) -> dict[str, str]:
        """Return the headers that prove a body, with the current time or `at`."""

    def callback(self, prediction: Prediction) -> bytes:
        """Return the body of the callback for a prediction that has ended."""
        return msgspec.json.encode(self.content(prediction))

    def headers(
        self, prediction: Prediction, body: bytes, at: float | None = None
    ) -> dict[str, str]:
        """Return the headers of a callback, with the current time or `at`."""
        kind = {"content-type": "application/json", "user-agent": f"{self.name}-emulator"}
        return kind | self.proof(prediction, body, at)

    def push(self, prediction: Prediction) -> None:
        if prediction.callback_url:
            self.send(prediction, self.callback(prediction))

    def send(self, prediction: Prediction, body: bytes) -> None:
        """Send a callback to the URL of the submit, with the retries of the schedule."""

        def deliver() -> None:
            headers = partial(self.headers, prediction, body)
            self.world.callbacks.send(Callback(prediction, body, headers, self.schedule))

        self.world.push_faults.push(prediction, deliver)

    def signing(self, prediction: Prediction, at: float | None) -> tuple[int, bool]:
        """Return the time to sign a callback with, and whether to sign it with a wrong key."""
        seconds = int(self.world.now() if at is None else at)
        if rule := self.take("stale_timestamp", prediction.prompt):
            seconds -= int(_STALE if rule.seconds is None else rule.seconds)
        return seconds, self._is_forged(prediction)

    def secret_of(self, prediction: Prediction) -> str:
        """Return the secret of the submit; a wrong one for a forged callback."""
        return prediction.secret[::-1] if self._is_forged(prediction) else prediction.secret

    def _is_forged(self, prediction: Prediction) -> bool:
        return self.take("wrong_signature", prediction.prompt) is not None


def is_unknown(model: str) -> bool:
    return bool({NO_SUCH_MODEL, TEXT_ONLY} & set(model.split("/")))


def picture_names(prediction: Prediction) -> list[str]:
    """Return the names of a prediction's pictures: as many as requested, one to four."""
    inputs = prediction.input
    count_text = str(inputs.get("num_images") or inputs.get("num_outputs") or 1)
    count = min(max(int(count_text), 1), 4) if count_text.isdecimal() else 1
    ratio = wire.text_of(inputs.get("aspect_ratio"))
    first = prediction.index
    return [pictures.name_for(prediction.prompt, first + n, ratio) for n in range(count)]


def picture_urls(prediction: Prediction) -> list[str]:
    return [f"{prediction.origin}/files/{name}" for name in picture_names(prediction)]


def _broken(rule: Rule) -> Response:
    """Return the broken response that a rule specifies."""
    if rule.answer == "garbage":
        return Response("<html>not what you wanted", media_type="text/html")
    status = 404 if rule.answer == "missing" else 500
    return wire.answer({"error": {"message": "broken on request"}}, status)
